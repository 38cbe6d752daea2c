"""Everything a person can get wrong, through the command: one line naming field, value and rule, and exit code 2."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecast import cli

ROOT = Path(__file__).parents[1]
JOB = """
model: mixtral-8x7b
cluster: {chip: h100-sxm, nodes: 8}
plan: {expert: 8, shard: optimizer}
batch: {sequences: 256, length: 4096}
"""
FORMULA = ("--engine", "closed-form")
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000,
    "num_key_value_heads": 8, "num_hidden_layers": 4, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
CHIP: dict[str, Any] = yaml.safe_load((ROOT / "hw_profiles" / "chips" / "h100-sxm.yaml").read_text(encoding="utf-8"))
# What only a programmer would say.
JARGON = re.compile(
    r"Traceback|pydantic|[Ii]nput should|Value error|constrained-|\.Capacity|dictionary|valid integer|\[type="
)

Refused = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good job in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    return tmp_path


@pytest.fixture
def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command in this process, and checks that it says one line with `expected` in it, and nothing else."""

    def check(expected: str, *arguments: str, code: int = 2) -> None:
        monkeypatch.setattr(sys, "argv", ["moecast", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, said = capsys.readouterr()
        assert expected in said
        assert (left.value.code, out) == (code, "")
        assert said.startswith("moecast: ") and said.endswith("\n") and said.count("\n") == 1
        assert said[:-1].isprintable() and len(said) <= 620 and not JARGON.search(said)

    return check


# A change of a good job, and what the line says of it.
CHANGES = {
    # Between fields.
    "plan.data=5": "plan.data = 5: data x tensor x context x pipeline is 5; h100-",
    "plan.tensor=3": "product 3 must divide the 64 devices of h100-sxm-64",
    "plan.expert=16": "plan.expert = 16: must divide the 8 experts of Mixtral-8x7B",
    "plan.expert=3": "plan.expert = 3: expert x expert_tensor (3) must divide data x context",
    "plan.tensor=64": "plan.tensor = 64: must divide the 32 attention heads of the decoder",
    "batch.sequences=65": "batch.sequences = 65: must be a multiple of the data degree 64",
    "plan.microbatch_sequences=3": "plan.microbatch_sequences = 3: must divide the 4 sequences of a data",
    "plan={pipeline: 64}": "plan.pipeline = 64: x virtual_stages 1 exceeds the 32 layers",
    "plan.stages=[1, 2]": "plan.stages = [1, 2]: 2 entries; pipeline x virtual_stages is 1",
    "plan.stages=[5]": "plan.stages = [5]: 5 layers in all; the model has 32",
    "plan.stages=abc": "plan.stages = 'abc': a layout has only E, t, m, L, |, brackets and *n",
    "plan.stages=Et*32": "the model needs E, 32 t, 0 m, L in that order",
    "plan={virtual_stages: 2}": "plan.virtual_stages = 2: needs schedule interleaved, not 1f1b",
    "plan={pipeline: 4, schedule: dualpipe, microbatch_sequences: 4}":
        "plan.schedule = dualpipe: needs an even number of microbatches, at least 2 x pipeline; there are",
    "plan.shard_degree=3": "plan.shard_degree = 3: must divide data x context (64)",
    "training.dispatch.layout=one_hot": "layout = one_hot: needs training.capacity",
    "model=t5-base": "plan.expert = 8: T5-Base has no experts",
    "batch.length={encoder: 8, decoder: 8}": "Mixtral-8x7B has no encoder: give one number",
    "model.decoder.layers=1000000000": "model.decoder.layers = 1000000000: must be at most 10,000",
    "model.decoder.moe.experts=1000000000": "model.decoder.moe.experts = 1000000000: must be at most 262,144",
    "model.decoder.moe.expert.depth=1000000000": "model.decoder.moe.expert.depth = 1000000000: must be at most 100",
    "model.mtp_layers=1000000000": "model.mtp_layers = 1000000000: must be at most 10,000",
    # One field.
    "batch.sequences=-1": "job.yaml: batch.sequences = -1: must be greater than 0",
    "batch.sequences=0": "batch.sequences = 0: must be greater than 0",
    "batch.sequences=.nan": "batch.sequences = nan: must be a finite number",
    "training.capacity={factor: .inf, basis: tokens}": "training.capacity.factor = inf: must be a finite",
    "batch.sequences=9999999999": "batch.sequences = 9999999999: must be at most 1,000,000,000",
    f"batch.sequences=0x{'f' * 9000}": "(too long to print): must be at most 1,000,000,000",
    f"batch.sequences={'9' * 9000}": "--set batch.sequences: a number in it is too long to read",
    "batch.sequences=4.5": "batch.sequences = 4.5: must be a whole number",
    "batch.sequences='8'": "batch.sequences = '8': must be a whole number",
    "batch.sequences=true": "batch.sequences = True: must be a whole number",
    "plan.expert=": "plan.expert = null: must be a whole number",
    "plan.sequence_parallel=2": "plan.sequence_parallel = 2: must be true or false",
    "software.release=5": "software.release = 5: must be text",
    "software.overlap=[1]": "= [1]: must be a mapping of keys (all_to_all, gradients, parameters)",
    "plan.shard=optimiser": "'none', 'optimizer', 'gradients' or 'parameters'; did you mean 'optimizer'?",
    "training.precision=16": "training.precision = 16: must be 'fp32', 'bf16',",
    "training.routing.model=zipf": "training.routing: model zipf needs exponent",
    "training.routing.exponent=1": "exponent = 1.0: goes with model zipf, not chance",
    "training.routing={model: zipf, exponent: 1e300}": "exponent = 1e+300: must be at most 20",
    "training.routing={model: dirichlet, concentration: 5e-324}": "concentration = 5e-324: must be at least 1e-09",
    "plan.placement={order: [tensor]}": "order = tensor: needs each of tensor, context, data, pipeline once",
    # Unions: what was meant is told by the value.
    "training.capacity={factor: 1, basis: tokns}": "training.capacity.basis = 'tokns': must be 'tokens' or",
    "training.capacity={factor: 1}": "training.capacity.basis: required, and missing\n",
    "training.capacity={factor: 1, basis: tokens, minimm: 4}":
        "training.capacity.minimm: unknown key; did you mean 'minimum'?\n",
    "training.capacity=droples": "or 'dropless'; did you mean 'dropless'?",
    "training.capacity=1.25": "= 1.25: must be a mapping of keys (factor, eval_factor, basis,",
    "training.capacity={factor: -1, basis: tokens}": "training.capacity.factor = -1: must be greater than 0\n",
    "batch.length=long": "batch.length = 'long': must be a whole number, or a mapping of keys (encoder, decoder)",
    "batch.length=-4": "batch.length = -4: must be greater than 0\n",
    "batch.length={encoder: 4, decodr: 4}": "batch.length.decodr: unknown key; did you mean 'decoder'?",
    "training.remat=ful": "mapping of keys (save, recompute, offload); did you mean 'full'?",
    "training.remat={save: [qkvv]}": "training.remat.save.0 = 'qkvv': must be 'norms', 'qkv',",
    "training.remat={save: [qkv], offload: [qkv]}": "training.remat: qkv is named twice\n",
    # Names.
    "plan.expertt=8": "job.yaml: plan.expertt: unknown key; did you mean 'expert'?",
    "plann.expert=8": "job.yaml: plann: unknown key; did you mean 'plan'?",
    "model.decoder.moe.topk=2": "model.decoder.moe.topk: unknown key; did you mean 'top_k'?",
    "model.decoder.variants={w: {windoww: 5}}": "windoww: unknown key",
    "model=mixtral-8x7": "job.yaml: model: unknown model 'mixtral-8x7'; did you mean 'mixtral-8x7b'?",
    "model={preset: mixtrl-8x7b}": "unknown model 'mixtrl-8x7b'; did you mean 'mixtral-8x7b'?",
    "model=5": "model = 5: must be a preset's name, a model file in the job's folder, or a mapping",
    "model.decoder.attention.heads=7": "model.decoder.attention: heads 7 is not a multiple of kv_heads 8",
    "model.decoder.moe.router={groups: 8, top_groups: 1}": "top_k 2 exceeds the 1 experts in router.top_groups 1",
    "model.decoder.moe.hierarchy={branches: 8, top_k: 1}": "/ hierarchy.top_k 2 exceeds experts / hierarchy.branches 1",
    "model.decoder.moe.hierarchy={branches: 1, top_k: 2}": "hierarchy.top_k 2 exceeds hierarchy.branches 1",
    "cluster.chip=h10O": "cluster.chip = 'h10O': unknown chip; did you mean 'h100'?",
    "cluster=h800-2049": "cluster = 'h800-2049': no such cluster; did you mean 'h800-2048'?",
    "cluster={chip: tpu-v5p, slice: 4x4x5}": "'4x4x5': tpu-v5p has no such slice; nearest: 4x4x4 (v5p-128)",
    "cluster.node=8": "cluster.node: unknown key; did you mean 'nodes'?",
    "cluster.nodes=-8": "job.yaml: cluster.nodes = -8: must be greater than 0\n",
    "cluster=[1]": "cluster = [1]: must be text, or a mapping of keys\n",
    "cluster.chip.memory_bandwith_gb_per_s=5": "did you mean 'memory_bandwidth_gb_per_s'?",
    "cluster.chip.peak_tflops.bf16=0": "cluster.chip.peak_tflops.bf16 = '0.0': must be a finite number above",
    "cluster.chip.memory_bandwidth_gb_per_s=1e300": "= 1e+300: must be from 1e-06 to 1e+09",
    "cluster.chip.scale_out.nic_gb_per_s=1e-300": "nic_gb_per_s = 1e-300: must be from 1e-06 to",
    # The form of a change.
    "plan.expert": "--set plan.expert: write it as field.name=value",
    "=5": "--set =5: write it as field.name=value",
    "plan..expert=5": "--set plan..expert=5: write it as field.name=value",
    "plan.expert.deep=5": "--set plan.expert.deep: plan.expert is a value, not a section",
    "batch.sequences.a.b=5": "--set batch.sequences.a.b: batch.sequences is a value, not a section",
    "plan.stages=[1": "--set plan.stages, line 2: not YAML: did not find expected ',' or ']'",
    "plan.expert=!!python/object:os.system x": "line 1: tag !!python/object:os.system is not allowed",
    "plan.expert=*x": "--set plan.expert, line 1: anchors and aliases are not allowed; write the value out",
    "\x1b[31m=5": r"job.yaml: \x1b[31m: unknown key",
    # A model file.
    "model=../config.json": "model = '../config.json': a model file must lie in the job's folder",
    "model=/etc/config.yaml": "model = '/etc/config.yaml': a model file must lie in the job's",
    "model=config.json": "job.yaml: config.json: no such file",
    'model="a\\0.yaml"': r"model = 'a\x00.yaml': not a path",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[:50])
def test_a_wrong_field_is_named_with_its_value_and_rule(change: str, refused: Refused) -> None:
    refused(CHANGES[change], "forecast", "job.yaml", "--set", change)


TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "bad.yaml: a job is a mapping with model, cluster and batch"),
    "list": ("- a\n- b\n", "bad.yaml: a job is a mapping with model, cluster and batch"),
    "word": ("hello", "bad.yaml: a job is a mapping with model, cluster and batch"),
    "missing sections": ("plan: {expert: 8}", "bad.yaml: model: required, and missing (and 2 more)"),
    "no cluster": ("model: t5-base\nbatch: {sequences: 8, length: 8}", "bad.yaml: cluster: required, and missing\n"),
    "empty section": (JOB.replace("{expert: 8, shard: optimizer}", ""), "plan = null: must be a mapping of keys"),
    "binary": (bytes(range(256)), "bad.yaml: not a text file (UTF-8)"),
    "NUL": (b"model: a\x00b\n", "bad.yaml: not a text file (NUL byte)"),
    "UTF-16": ("model: a\n".encode("utf-16"), "bad.yaml: not a text file (UTF-8)"),
    "control character": (b"model: \x07\n", "bad.yaml: not YAML: unacceptable character #x0007"),
    "aliases that explode": (
        "a: &a [x]\n" + "".join(f"{x}: &{x} [{f'*{y},' * 9}]\n" for x, y in zip("bcdefghi", "abcdefgh", strict=True)),
        "bad.yaml, line 1: anchors and aliases are not allowed; write the value out",
    ),
    "merge key": ("<<: {a: 1}\nmodel: a\ncluster: b\nbatch: {sequences: 1, length: 1}\n", "unknown model 'a'"),
    "tag that runs": ("model: !!python/object/apply:os.system ['ls']\n", "tag !!python/object/apply:os.system is not"),
    "tag": ("model: !foo bar\n", "bad.yaml, line 1: tag !foo is not allowed; use plain values"),
    "duplicate key": ("model: a\nplan: {data: 1}\nmodel: b\n", "bad.yaml, line 3: key 'model' appears twice"),
    "duplicate key within": ("model: a\nplan: {data: 1, data: 2}\n", "bad.yaml, line 2: key 'data' appears twice"),
    "deep": (f"model: {'[' * 100_000}", "bad.yaml, line 1: nested deeper than 40 levels"),
    "deep in blocks": ("".join(" " * i + "a:\n" for i in range(100)), "line 41: nested deeper than 40 levels"),
    "tab": ("plan:\n\tdata: 1\n", "bad.yaml, line 2: not YAML: indented with a tab; use spaces"),
    "two documents": ("model: a\n---\nmodel: b\n", "bad.yaml, line 2: not YAML"),
    "key that is a list": ("? [a, b]\n: c\n", "bad.yaml, line 1: a key must be a plain word"),
    "key that is nothing": (f"null: 2\n{JOB}", "bad.yaml: None: unknown key"),
    "key that is a number": (f"1: 2\n{JOB}", "bad.yaml: 1: unknown key; known: name, model, cluster, plan"),
    "unclosed": ("model: {a: b\n", "bad.yaml, line 2: not YAML: did not find expected ',' or '}'"),
    "number without end": (f"batch: {'9' * 5000}", "bad.yaml: a number in it is too long to read"),
    "name without end": (JOB.replace("mixtral-8x7b", "k" * 5000), "bad.yaml: model: unknown model 'kkkk"),
    "name with line breaks": (JOB.replace("mixtral-8x7b", "'a\n\n  b'"), r"bad.yaml: model: unknown model 'a\nb'"),
    "name that paints": (JOB.replace("mixtral-8x7b", '"a\\e[31m"'), r"bad.yaml: model: unknown model 'a\x1b[31m'"),
    "key that paints": ('"a\\e[31m": 1', r"bad.yaml: a\x1b[31m: unknown key"),
    "many wrong keys": ("".join(f"k{i}: 1\n" for i in range(5000)), "bad.yaml: k0: unknown key"),
    "chip without a name": (JOB.replace("h100-sxm", "{a: 1}"), "cluster.chip: {'a': 1} is neither the name of a chip"),
    "chip with a list": (JOB.replace("h100-sxm", "{name: h100, a: [1]}"), "chip: a = [1]: a number, or a factor"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_wrong_job_file_is_refused_by_line_or_field(case: str, folder: Path, refused: Refused) -> None:
    text, expected = TEXTS[case]
    (folder / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(expected, "forecast", "bad.yaml")


CONFIGS: dict[str, tuple[Any, str]] = {
    "unknown architecture": (
        CONFIG | {"architectures": ["MixtralForCausaLM"]},
        "architectures = 'MixtralForCausaLM': no reader for it; did you mean 'MixtralForCausalLM'?",
    ),
    "unknown type": ({"model_type": "mixtrl"}, "model_type = 'mixtrl': no reader for it"),
    "architecture of no kind": (CONFIG | {"architectures": [["a"]]}, "architectures = "),
    "not JSON": ("{\n,", "config.json, line 2: not JSON"),
    "not text": (b"\xff\xfe\x00", "config.json: not a text file (UTF-8)"),
    "list": ("[1]", "config.json: a mapping of keys is needed, not [1]"),
    "not a number": (json.dumps(CONFIG | {"hidden_size": float("nan")}), "hidden_size = nan: a whole number from 1"),
    "negative": (CONFIG | {"hidden_size": -1}, "hidden_size = -1: a whole number from 1 to 1000000000 is needed"),
    "text for a number": (CONFIG | {"hidden_size": "a"}, "hidden_size = 'a': a whole number"),
    "missing field": (CONFIG | {"vocab_size": None}, "config.json: vocab_size: required, and missing"),
    "rule of the model": (CONFIG | {"num_key_value_heads": 5}, "heads 32 is not a multiple of kv_heads 5"),
    "deep list": ("[" * 100_000, "config.json: not JSON"),
    "deep mapping": ('{"a":' * 5000 + "1" + "}" * 5000, "config.json: not JSON"),
    "neither": ({"hiden": 4}, "config.json: hiden: unknown key; did you mean 'hidden'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_hugging_face_config_is_refused_by_file_and_field(case: str, folder: Path, refused: Refused) -> None:
    content, expected = CONFIGS[case]
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    (folder / "config.json").write_bytes(data)
    refused(expected, "forecast", "job.yaml", "--set", "model=config.json")
    refused("job.yaml: config.json", "forecast", "job.yaml", "--set", "model=config.json")


def test_a_model_file_reached_by_a_link_out_of_the_folder_is_refused(folder: Path, refused: Refused) -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "job.yaml").write_text(JOB, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "inside" / "link.json").symlink_to(folder / "config.json")
    (folder / "inside" / "loop.yaml").symlink_to("loop.yaml")
    refused(
        "'link.json': a model file must lie in the job's", "forecast", "inside/job.yaml", "--set", "model=link.json"
    )
    refused("model = 'loop.yaml': not a path", "forecast", "inside/job.yaml", "--set", "model=loop.yaml")


@pytest.mark.parametrize("name", ["huge.yaml", "huge.json"])
def test_a_sparse_gigabyte_is_refused_by_its_size(name: str, folder: Path, refused: Refused) -> None:
    path = folder / name
    path.touch()
    os.truncate(path, 10**9)
    said = f"{name}: 1,000,000,000 bytes; at most 1,000,000 are read"
    refused(said, "forecast", "job.yaml", "--set", f"model={name}")
    refused(said, "forecast", name)
    refused(said, "forecast", "job.yaml", "--profile", name)


@pytest.mark.parametrize("option", ["forecast", "--profile"])
def test_what_is_no_file_is_refused(option: str, folder: Path, refused: Refused) -> None:
    os.mkfifo(folder / "pipe.yaml")
    before = ("forecast",) if option == "forecast" else ("forecast", "job.yaml", "--profile")
    refused("none.yaml: no such file", *before, "none.yaml")
    refused(".: not a file", *before, ".")
    refused("pipe.yaml: not a file", *before, "pipe.yaml")
    refused("/dev/zero: not a file", *before, "/dev/zero")
    refused("moecast: aaaa", *before, "a" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(folder: Path, refused: Refused) -> None:
    (folder / "job.yaml").chmod(0)
    refused("job.yaml: permission denied", "forecast", "job.yaml")


def test_the_file_with_the_mistake_is_named_among_several(folder: Path, refused: Refused) -> None:
    (folder / "other.yaml").write_text(JOB.replace("expert: 8", "expert: 16"), encoding="utf-8")
    refused("moecast: other.yaml: plan.expert = 16: must divide", "forecast", "job.yaml", "other.yaml")


def _changed(path: str, value: Any) -> dict[str, Any]:
    """The profile of H100 with the entry at `path` replaced, or taken out where `value` is ...."""
    data: dict[str, Any] = json.loads(json.dumps(CHIP))
    here, (*sections, last) = data, path.split(".")
    for section in sections:
        here = here[section]
    if value is ...:
        del here[last]
    else:
        here[last] = value
    return data


PROFILES: dict[str, tuple[str, Any, str]] = {
    "unknown key": ("scale_up.links_per_chp", 1, "scale_up.links_per_chp: unknown key; did you mean 'links_per_chip'?"),
    "missing key": ("kernel_overhead_us", ..., "kernel_overhead_us: required, and missing"),
    "missing value": ("memory_bandwidth_gb_per_s.value", ..., "memory_bandwidth_gb_per_s.value: required, and missing"),
    "negative": ("memory_bandwidth_gb_per_s.value", -1, "memory_bandwidth_gb_per_s.value = -1: must be at least 0"),
    "zero": ("memory_bandwidth_gb_per_s.value", 0, "memory_bandwidth_gb_per_s = '0.0': must be a finite number"),
    "next to nothing": ("peak_tflops.bf16.value", 1e-300, "peak_tflops.bf16 = 1e-300: must be from 1e-06 to 1e+09"),
    "without end": ("peak_tflops.bf16.value", 1e300, "peak_tflops.bf16 = 1e+300: must be from 1e-06 to 1e+09"),
    "not a number": ("peak_tflops.bf16.value", float("nan"), "peak_tflops.bf16.value = nan: must be a finite number"),
    "infinite": ("peak_tflops.bf16.value", float("inf"), "peak_tflops.bf16.value = inf: must be a finite number"),
    "text": ("peak_tflops.bf16.value", "fast", "peak_tflops.bf16.value = 'fast': must be a number"),
    "list": ("peak_tflops.bf16.value", [1], "peak_tflops.bf16.value = [1]: must be a number"),
    "bare number": ("peak_tflops.bf16", 989, "peak_tflops.bf16 = 989: must be a mapping of keys (value, source, date,"),
    "unknown format": ("peak_tflops.bf17", {"value": 1}, "peak_tflops.bf17: unknown key; did you mean 'bf16'?"),
    "no format": ("peak_tflops", {}, "peak_tflops = {}: must have at least one number format"),
    "no curve": ("efficiency.matmul", {}, "efficiency.matmul = {}: must have at least one number format"),
    "share above one": ("scale_up.ring_efficiency.value", 2, "ring_efficiency = '2.0': a fraction of the peak,"),
    "tile of nothing": ("efficiency.tile.rows", 0, "efficiency.tile.rows = 0: must be greater than 0"),
    "no links": ("scale_up.links_per_chip", 0, "scale_up.links_per_chip = 0: must be greater than 0"),
    "no devices": ("devices_per_chip", 0, "devices_per_chip = 0: must be greater than 0"),
    "faster beside a collective": ("overlap_slowdown.value", 0.5, "overlap_slowdown = 0.5: must be at least 1"),
    "confidence": ("overlap_slowdown.confidence", "hgh", "'disputed' or 'assumption'; did you mean 'high'?"),
    "curve that falls back": ("efficiency.matmul.bf16.points", [[1e9, 0.5], [1e8, 0.6]], "points must be in ascending"),
    "curve above the peak": ("efficiency.matmul.bf16.points", [[1e9, 1.5]], "points.0.1 = 1.5: must be at most 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROFILES)
def test_a_wrong_profile_is_refused_by_file_and_field(case: str, folder: Path, refused: Refused) -> None:
    path, value, expected = PROFILES[case]
    (folder / "chip.yaml").write_text(yaml.safe_dump(_changed(path, value)), encoding="utf-8")
    refused("moecast: chip.yaml: ", "forecast", "job.yaml", "--profile", "chip.yaml")
    refused(expected, "forecast", "job.yaml", "--profile", "chip.yaml")


def test_a_profile_of_another_kind_is_refused(refused: Refused) -> None:
    tpu = str(ROOT / "hw_profiles" / "chips" / "tpu-v3.yaml")
    refused(
        "cluster.nodes = 8: tpu-v3 is a TPU; its keys are curves, slice, slices",
        "forecast",
        "job.yaml",
        "--profile",
        tpu,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("forecast", "job.yaml", "--engine", "event"), "engine = 'event': known engines: "),
        (("models", "mixtral-8x7"), "model: unknown model 'mixtral-8x7'; did you mean 'mixtral-8x7b'?"),
        (("chips", "h10O"), "cluster.chip = 'h10O': unknown chip; did you mean 'h100'?"),
        (("clusters", "h800-2049"), "cluster = 'h800-2049': no such cluster; did you mean 'h800-2048'?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    arguments: tuple[str, ...], expected: str, refused: Refused
) -> None:
    refused(expected, *arguments)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--straggler", "3"), "--straggler 3: write it as DEVICE=FACTOR"),
        (("--straggler", "x=2"), "--straggler x: a device is a number from 0"),
        (("--straggler", "3=nan"), "--straggler 3 = nan: a factor is from 0.001 to 1000"),
        (("--straggler", "3=-1"), "--straggler 3 = -1: a factor is from 0.001 to 1000"),
        (("--straggler", "3=1e300"), "--straggler 3 = 1e+300: a factor is from 0.001 to 1000"),
        (("--straggler", "64=2"), "job.yaml: straggler 64: devices are 0 to 63"),
        (("--slow-link", "=0.5"), "--slow-link =0.5: write it as NAME=FACTOR"),
        (("--slow-link", "NVLink=0"), "--slow-link NVLink = 0: a factor is from 0.001 to 1000"),
        (("--slow-link", "nothing=0.5"), "slow link 'nothing': no link of h100-sxm-64 has this in its name"),
        (("--slow-link", "NVLink=0.5", *FORMULA), "--straggler, --slow-link and --topology: need --engine events"),
        (("--perfetto", "trace.json", *FORMULA), "--perfetto: needs one job, and --engine events"),
        (("--topology", "none.json"), "none.json: no such file"),
        (("--topology", "job.yaml"), "job.yaml: must end in .graphml, .xml or .json"),
        (("--set", "training.routing={model: replay, file: ../x.csv}"), "'../x.csv': must lie in the job's folder"),
        (("--set", "training.routing={model: replay, file: x.csv}"), "training.routing.file = 'x.csv': no such file"),
        (("--set", "training.routing={placement_file: /etc/x}"), "'/etc/x': must lie in the job's folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_of_the_events_is_named(options: tuple[str, ...], expected: str, refused: Refused) -> None:
    refused(expected, "forecast", "job.yaml", *options)


ENTITIES = "".join(f'<!ENTITY {x} "{f"&{y};" * 9}">' for x, y in zip("bcdefghi", "abcdefgh", strict=True))
FABRICS: dict[str, tuple[str | bytes, str]] = {
    "list.json": ("[1]", "a mapping with lists `nodes` and `links` is needed"),
    "half.json": ("{", "not JSON"),
    "deep.json": ("[" * 100_000, "not JSON"),
    "binary.json": (b"\xff\xfe", "not JSON"),
    "half.graphml": ("<a", "line 1: not XML"),
    "explodes.graphml": (f'<!DOCTYPE l [<!ENTITY a "x">{ENTITIES}]><graphml>&i;</graphml>', "entities are not allowed"),
    "empty.graphml": ("<graphml/>", "0 graphs; one is needed"),
}


@pytest.mark.parametrize("name", FABRICS)
def test_a_wrong_fabric_is_refused_by_file_and_rule(name: str, folder: Path, refused: Refused) -> None:
    text, expected = FABRICS[name]
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(expected, "forecast", "job.yaml", "--topology", name)
    refused(f"{name}", "forecast", "job.yaml", "--topology", name)


@pytest.mark.parametrize("command", ["link-load", "placement"])
def test_other_commands_name_the_job_file_too(command: str, folder: Path, refused: Refused) -> None:
    refused("moecast: none.yaml: no such file", command, "none.yaml")
    refused("moecast: job.yaml: plan.expert = 3: expert x", command, "job.yaml", "--set", "plan.expert=3")


def test_a_page_replaces_a_file_and_nothing_else(folder: Path, refused: Refused) -> None:
    """A folder, a named pipe (for root, /dev/null no less) and a link to one stay; a missing folder stays missing."""
    (folder / "taken").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    before = sorted(folder.rglob("*"))
    for name, said in (
        ("none/page.html", "moecast: none: no such folder"),
        ("job.yaml/page.html", "moecast: job.yaml: no such folder"),
        ("taken", "moecast: taken: is there and is not a file"),
        ("pipe", "moecast: pipe: is there and is not a file"),
        ("link", "moecast: link: is there and is not a file"),
        (f"{'a' * 300}.html", "aaa.html: File name too long"),
    ):
        for option in ("--html", "--perfetto"):
            refused(said, "forecast", "job.yaml", option, name, code=4)
    assert sorted(folder.rglob("*")) == before and (folder / "pipe").is_fifo()


def _command(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moecast", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, check=False, timeout=60, **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("forecast", "job.yaml", "--set", "plan.exprt=8"),
            "job.yaml: plan.exprt: unknown key; did you mean 'expert'?",
        ),
        (("forecast", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_the_real_command_says_one_line_and_exits_with_2(arguments: tuple[str, ...], said: str, folder: Path) -> None:
    done = _command(*arguments, cwd=folder, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"moecast: {said}\n")


@pytest.mark.parametrize(
    "arguments", [("forecast",), ("forecast", "job.yaml", "--nope"), ("forcast",), ("forecast", "--set")]
)
def test_a_wrong_option_is_refused_without_a_traceback(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moecast", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, said = capsys.readouterr()
    assert (left.value.code, out) == (2, "") and "Error: " in said and not JARGON.search(said)


def test_a_full_disk_exits_with_4_and_leaves_nothing(folder: Path) -> None:
    """Standard output on a full device; and a page larger than the files that this process may write."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = _command("forecast", "job.yaml", *FORMULA, "--json", cwd=folder, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (4, "moecast: standard output: No space left on device\n")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = _command(
        "forecast", "job.yaml", "--html", "page.html", cwd=folder, capture_output=True, preexec_fn=small_files
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "", "moecast: page.html: File too large\n")
    assert [path.name for path in folder.iterdir()] == ["job.yaml"]
