"""The presets against what their authors print, and against the table of models of the published measurements."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import read_yaml
from simulator.job.model import Model
from simulator.job.presets import load_preset, preset_files, preset_names, unavailable
from simulator.workload.parameters import count_parameters, layer_parameters

MODELS_CSV = Path(__file__).parents[1].parent / "shared" / "facts" / "models.csv"


def slug(name: str) -> str:
    """A preset's file stem: its name in lower case, without a remark in parentheses."""
    return re.sub(r" \(.*\)$", "", name).lower()


def csv_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(MODELS_CSV.read_text().splitlines())) if MODELS_CSV.exists() else []


@pytest.mark.parametrize("name", preset_names())
def test_counts_agree_with_what_is_published(name: str) -> None:
    model = load_preset(name)
    p, count = model.published, count_parameters(model)
    assert p is not None and p.source and model.source != "inline"
    embeddings = count.embedding + count.logits if p.excludes_embeddings else 0
    if p.total_parameters is not None:
        assert count.total - embeddings == pytest.approx(p.total_parameters, rel=p.tolerance)
    if p.active_parameters is not None:
        assert count.active - embeddings == pytest.approx(p.active_parameters, rel=p.active_tolerance)
    # A figure that is missing, or met only roughly, is explained.
    if p.total_parameters is None or p.tolerance > 0.01 or p.active_tolerance > 0.01:
        assert p.note


@pytest.mark.parametrize("name", preset_names())
def test_name_and_file_agree_and_case_does_not_matter(name: str) -> None:
    model = load_preset(name)
    assert slug(model.name) == name
    assert load_preset(name.upper()) == model
    assert count_parameters(model).active <= count_parameters(model).total


def test_counts_of_compiled_models_are_exact() -> None:
    """MaxText's own count, as compiled by XLA for TPU."""
    compiled = {
        "llama2-7b": 6_738_415_616,
        "mixtral-8x7b": 46_702_792_704,
        "mixtral-8x22b": 140_630_071_296,
        "qwen3-30b-a3b": 30_532_122_624,
    }
    assert {name: count_parameters(load_preset(name)).total for name in compiled} == compiled


def test_switch_base_grows_by_twelve_experts_and_gates() -> None:
    totals = {e: count_parameters(load_preset(f"switch-base-{e}")).total for e in (16, 32, 64, 128, 256)}
    per_expert = 12 * (3 * 768 * 2048 + 768)  # 56.6 million: 12 sparse layers
    assert all((totals[e] - totals[16]) == (e - 16) * per_expert for e in totals)
    printed = {16: 1.1e9, 32: 2.0e9, 64: 3.8e9, 128: 7.4e9, 256: 14.7e9}  # arXiv:2101.03961 table 7
    assert {e: round(total / 1e9, 1) * 1e9 for e, total in totals.items()} == pytest.approx(printed)


@pytest.mark.parametrize(
    ("name", "printed_billions"),
    [
        ("moe-4", 0.8), ("moe-32", 0.9), ("moe-256", 1.1), ("moe-256-h", 1.1), ("moe-1024-h", 1.9), ("moe-4096-h", 5.1),
        ("moe-34m", 6.0), ("moe-143m", 6.0), ("moe-1-wide", 0.8), ("moe-1-deep", 0.8), ("4xlstm-512", 0.8),
        ("lstm-2048-512", 0.8), ("2xlstm-8192-1024", 1.8),
        ("moe-16384-h", 17.3), ("moe-65536-h", 68.9), ("moe-131072-h", 137.7),
    ],
)  # fmt: skip
def test_shazeer_totals_with_embeddings(name: str, printed_billions: float) -> None:
    total = count_parameters(load_preset(name)).total / 1e9
    assert total == pytest.approx(printed_billions, abs=0.065 if name == "moe-34m" else 0.0501)


def test_two_level_gates_count_only_where_a_word_goes() -> None:
    layer = load_preset("moe-131072-h").decoder_layers[0]
    p = layer_parameters(layer, load_preset("moe-131072-h"))
    assert p.router == 2 * 512 * (131072 + 256)
    assert p.active_router == 2 * 512 * (256 + 2 * 512)


@pytest.mark.parametrize(("experts", "layers"), [(e, n) for e in (128, 512, 2048) for n in (12, 36)])
def test_gshard_has_as_many_experts_as_table_1_counts(experts: int, layers: int) -> None:
    model = load_preset(f"gshard-{experts}e-{layers}l")
    in_all = sum(layer.moe.experts for layer in (*model.encoder_layers, *model.decoder_layers) if layer.moe)
    assert in_all == experts * layers // 2


def test_attention_patterns() -> None:
    oss = [layer.attention for layer in load_preset("gpt-oss-120b").decoder_layers]
    assert [a.window for a in oss if a][:4] == [128, None, 128, None]
    assert all(a and a.sinks and a.qkv_bias and a.output_bias for a in oss)
    llama = [layer.attention for layer in load_preset("llama4-maverick-17b-128e").decoder_layers]
    assert [a.chunk for a in llama if a][:8] == [8192, 8192, 8192, None] * 2
    gemma = [layer.attention for layer in load_preset("gemma4-26b-a4b").decoder_layers]
    assert [i for i, a in enumerate(gemma) if a and a.window is None] == [5, 11, 17, 23, 29]
    assert {(a.kv, a.head_dim, a.shared_kv) for a in gemma if a} == {(8, 256, False), (2, 512, True)}


def test_sparse_layers() -> None:
    maverick = load_preset("llama4-maverick-17b-128e").decoder_layers
    assert [i for i, layer in enumerate(maverick) if layer.moe] == list(range(1, 48, 2))
    assert [i for i, layer in enumerate(load_preset("deepseek-v3").decoder_layers) if layer.ffn] == [0, 1, 2]
    st_moe = load_preset("st-moe-32b").encoder_layers
    assert [i for i, layer in enumerate(st_moe) if layer.moe] == [3, 7, 11, 15, 19, 23]
    assert all(layer.ffn for layer in st_moe)


def test_every_model_of_the_measurements_has_a_preset_or_a_reason() -> None:
    if not MODELS_CSV.exists():
        pytest.skip("the table of models is not here")
    known = {*preset_names(), *map(str.lower, unavailable())}
    assert [row["model"] for row in csv_rows() if slug(row["model"]) not in known] == []


def leading_number(cell: str) -> int | None:
    found = re.match(r"\d+", cell)
    return int(found.group()) if found else None


@pytest.mark.parametrize("row", [r for r in csv_rows() if slug(r["model"]) in preset_files()], ids=lambda r: r["model"])
def test_dimensions_agree_with_the_table_of_models(row: dict[str, str]) -> None:
    model = load_preset(slug(row["model"]))
    d = model.decoder
    a = d.attention
    assert a is not None
    here: dict[str, Any] = {
        "layers": d.layers, "hidden": model.hidden, "heads": a.heads, "kv_heads": a.kv, "head_dim": a.head_dim,
        "vocab": model.vocab,
    }  # fmt: skip
    if d.ffn:
        here["dense_ffn"] = d.ffn.hidden
    if d.moe:
        here |= {
            "moe_ffn": d.moe.expert.hidden, "experts": d.moe.experts, "top_k": d.moe.top_k,
            "shared_experts": d.moe.shared_experts, "shared_ffn_total": d.moe.shared_hidden,
            "first_k_dense": d.moe.first_dense,
        }  # fmt: skip
    if a.mla:
        here |= {
            "q_lora_rank": a.mla.q_lora_rank, "kv_lora_rank": a.mla.kv_lora_rank, "qk_nope_dim": a.mla.nope_dim,
            "qk_rope_dim": a.mla.rope_dim, "v_head_dim": a.mla.value_dim,
        }  # fmt: skip
    stated = {key: leading_number(row[key]) for key in here}
    assert model.name == row["model"]
    assert {k: v for k, v in here.items() if stated[k] is not None} == {
        k: v for k, v in stated.items() if v is not None
    }
    if row["tied_embeddings"]:
        assert model.tied_embeddings == (row["tied_embeddings"] == "yes")


def test_multi_token_prediction_is_a_preset_of_its_own() -> None:
    plain, mtp = load_preset("deepseek-v3"), load_preset("deepseek-v3-mtp")
    extra = count_parameters(mtp).total - count_parameters(plain).total
    assert extra == layer_parameters(plain.decoder_layers[-1], plain).total + 2 * 7168**2 + 3 * 7168


def test_a_model_without_preset_says_why_and_a_misspelt_one_what_is_near() -> None:
    for name, reason in unavailable().items():
        with pytest.raises(QuestionError) as caught:
            load_preset(name.lower())
        assert reason in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(QuestionError, match="did you mean 'mixtral-8x7b'"):
        load_preset("mixtral8x7b")


def test_a_preset_validates_within_five_milliseconds() -> None:
    data = {name: read_yaml(path) for name, path in preset_files().items()}
    validate(Model, data["mixtral-8x7b"], "first")  # builds the schema

    def seconds(name: str) -> float:
        start = time.perf_counter()
        validate(Model, data[name], name)
        return time.perf_counter() - start

    assert max(min(seconds(name) for _ in range(5)) for name in data) < 5e-3
