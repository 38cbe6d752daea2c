"""Configurations of other trainers as jobs and back: flags written out by hand, round trips, and bad input."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.job.convert.convert import export_job, form_of, import_text
from simulator.job.convert.megatron_layers import expand_pattern, pattern_of, rule_of
from simulator.job.convert.torchtitan_import import split
from simulator.job.load import load_job

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.yaml"))
# Encoder-decoders and LSTMs are no model of these trainers; each of the others by what it lacks.
NO_DECODER = ("t5-base", "st-moe-l", "switch-base-128", "moe-32")
REFUSED: dict[str, dict[str, str]] = {
    "megatron": {},
    "maxtext": {
        "qwen3-235b-a22b.yaml": "expert axis",
        "small/qwen3-235b-a22b.yaml": "expert axis",
        "deepseek-v3.yaml": "do not divide",
    },
    "torchtitan": dict.fromkeys(
        ("mixtral-8x7b.yaml", "gpt3-175b.yaml", "tiny-moe.yaml", "deepseek-v3.yaml", "small/mixtral-8x7b.yaml",
         "small/deepseek-v3.yaml", "small/qwen3-235b-a22b.yaml"), "its models are"),
}  # fmt: skip

# Each flag by hand. Sources: megatron/training/arguments.py@000c4ac24 for names and meanings; dimensions from
# Qwen3-235B-A22B's config.json; the split from Megatron Bridge's benchmark of 256 H100 (TP 2, PP 8, VP 4, EP 32).
QWEN3_MEGATRON: dict[str, Any] = {
    "num-layers": 94, "hidden-size": 4096, "ffn-hidden-size": 1536, "num-attention-heads": 64,
    "group-query-attention": True, "num-query-groups": 4, "kv-channels": 128, "qk-layernorm": True,
    "position-embedding-type": "rope", "max-position-embeddings": 4096, "normalization": "RMSNorm",
    "disable-bias-linear": True, "untie-embeddings-and-output-weights": True, "swiglu": True,
    "vocab-size": 151936,
    # 151,936 = 2^7 x 1,187: with two tensor ranks only multiples of 64 leave the table unpadded.
    "make-vocab-size-divisible-by": 64,
    "tensor-model-parallel-size": 2, "sequence-parallel": True, "pipeline-model-parallel-size": 8,
    "context-parallel-size": 1, "expert-model-parallel-size": 32,
    # Not given, Megatron would split each expert over the two tensor ranks.
    "expert-tensor-parallel-size": 1,
    "pipeline-model-parallel-layout": "Ett|(ttt|)*30ttL", "use-distributed-optimizer": True,
    "micro-batch-size": 1, "global-batch-size": 2048, "seq-length": 4096, "train-iters": 200, "bf16": True,
    # Current scaling in Megatron's words: E4M3 forward and E5M2 backward, one scale a tensor.
    "optimizer": "adam", "fp8-format": "hybrid", "fp8-recipe": "tensorwise",
    "lr": 0.001, "lr-decay-style": "inverse-square-root", "lr-warmup-iters": 100, "weight-decay": 0.0,
    "adam-beta1": 0.9, "adam-beta2": 0.95, "clip-grad": 1.0, "hidden-dropout": 0.0, "attention-dropout": 0.0, "seed": 0,
    "num-experts": 128, "moe-ffn-hidden-size": 1536, "moe-layer-freq": "1", "moe-router-topk": 8,
    # Softmax after the choice, Megatron's default, is Qwen3's norm_topk_prob.
    "moe-router-score-function": "softmax", "moe-grouped-gemm": True, "moe-token-dispatcher-type": "flex",
    "moe-enable-deepep": True, "moe-router-force-load-balancing": True, "moe-router-load-balancing-type": "aux_loss",
    "moe-aux-loss-coeff": 0.01, "moe-router-bias-update-rate": 0.001,
    "overlap-grad-reduce": True, "overlap-param-gather": True, "overlap-moe-expert-parallel-comm": True,
}  # fmt: skip

# Each key by hand. Source: src/maxtext/configs/base.yml@000b810bb; the model is configs/models/mixtral-8x7b.yml.
MIXTRAL_MAXTEXT = {
    "run_name": "mixtral-8x7b", "hardware": "tpu", "model_name": "mixtral-8x7b",
    # 4 x 4 x 4 chips, one JAX device each; all weights over all of them.
    "ici_data_parallelism": "1", "ici_fsdp_parallelism": "64", "ici_context_parallelism": "1",
    "ici_tensor_parallelism": "1", "ici_expert_parallelism": "1", "ici_pipeline_parallelism": "1",
    # 2,048 sequences over 64 devices at once.
    "per_device_batch_size": "32", "gradient_accumulation_steps": "1", "max_target_length": "4096", "steps": "200",
    "dtype": "bfloat16", "weight_dtype": "float32", "opt_type": "adamw", "remat_policy": "full",
    "learning_rate": "0.001", "adam_b1": "0.9", "adam_b2": "0.95", "adam_weight_decay": "0.0",
    "gradient_clipping_threshold": "1.0", "dropout_rate": "0.0", "init_weights_seed": "0",
    # MaxText's loss is k = 2 at balance, a job's 1: half of 0.01.
    "load_balance_loss_weight": "0.005",
    # Dropping needs the dense path: capacity_factor has no effect with sparse_matmul.
    "sparse_matmul": "false", "megablox": "false", "capacity_factor": "1.25",
}  # fmt: skip

SCRIPT = """
GPUS_PER_NODE=8
NODES=${NODES:-4}
MODEL_ARGS=(
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336   # Mixtral
  --num-attention-heads 32 --group-query-attention --num-query-groups 8
  --vocab-size 32000 --max-position-embeddings 32768 --position-embedding-type rope
  --normalization RMSNorm --swiglu --untie-embeddings-and-output-weights --disable-bias-linear
)
MOE_ARGS="--num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall"
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes ${NODES} pretrain_gpt.py \\
  "${MODEL_ARGS[@]}" $MOE_ARGS \\
  --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 \\
  --num-layers-per-virtual-pipeline-stage 4 --use-distributed-optimizer --bf16 \\
  --micro-batch-size 1 --global-batch-size $((8*NODES*8)) --seq-length 4096 --lr 1e-4 --lr-decay-style constant \\
  --log-throughput --wibble 3 --moe-expert-capacty-factor 1.5
"""


def _mixtral() -> Any:
    return load_job(EXAMPLES / "mixtral-8x7b.yaml", ["cluster={chip: tpu-v5p, slice: 4x4x4}", "plan.data=64"])


def test_megatron_arguments_of_qwen3_on_256_h100_flag_by_flag() -> None:
    made = export_job(load_job(EXAMPLES / "qwen3-235b-a22b.yaml"), "megatron")
    assert made.settings == QWEN3_MEGATRON
    # What the text says is what the settings say, read here by hand and not by our reader.
    words = shlex.split(made.text.partition("torchrun")[2].replace("\\\n", " "))
    assert words[:5] == ["--nproc-per-node", "8", "--nnodes", "32", "pretrain_gpt.py"]
    said: dict[str, str] = {}
    for word in words[5:]:
        if word.startswith("--"):
            name = word[2:]
            said[name] = "True"
        else:
            said[name] = word
    assert said == {name: str(value) for name, value in QWEN3_MEGATRON.items()}
    assert [(x.name, x.value) for x in made.left] == [
        ("cluster", {"chip": "h100-sxm", "nodes": 32}), ("training.routing.model", "even")
    ]  # fmt: skip
    assert made.same == ()


def test_maxtext_line_of_mixtral_on_a_v5p_slice_key_by_key() -> None:
    made = export_job(_mixtral(), "maxtext")
    line = made.text.partition("python3 -m ")[2].replace("\\\n", " ").split()
    assert line[:2] == ["maxtext.trainers.pre_train.train", "src/maxtext/configs/base.yml"]
    assert dict(word.split("=", 1) for word in line[2:]) == MIXTRAL_MAXTEXT
    # Only what the trainer of a job reads, beside the cluster.
    assert {x.name for x in made.left} == {
        "cluster", "training.learning.router.balance_scope", "training.learning.router.bias_update",
        "training.learning.learning_rate.schedule", "training.learning.learning_rate.warmup_steps",
        "training.learning.learning_rate.decay_steps",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["megatron", "maxtext", "torchtitan"])
@pytest.mark.parametrize("name", NAMES)
def test_an_example_comes_back_the_same_or_is_refused_with_a_reason(name: str, form: str) -> None:
    job = load_job(EXAMPLES / name)
    refused = "only decoders" if Path(name).stem in NO_DECODER and form != "torchtitan" else REFUSED[form].get(name)
    refused = "its models are" if Path(name).stem in NO_DECODER and form == "torchtitan" else refused
    if refused:
        with pytest.raises(QuestionError, match=refused):
            export_job(job, form)
        return
    made = export_job(job, form)
    back = import_text(made.text, "text", name=job.name)
    assert back.form == form and back.job.hash == job.hash and back.unknown == ()
    assert all(x.why for x in made.left)


def test_without_its_notes_the_text_says_all_but_what_is_listed() -> None:
    """The notes cannot hide a wrong flag: whatever differs without them is what the export lists."""
    for form, job in (("megatron", load_job(EXAMPLES / "qwen3-235b-a22b.yaml")), ("maxtext", _mixtral())):
        made = export_job(job, form)
        bare = re.sub(r"(?m)^#.*\n", "", made.text)
        back = import_text(bare, "text", form, cluster=job.cluster).job
        assert back.plan.tensor == job.plan.tensor and back.batch == job.batch and back.plan.expert == job.plan.expert
        assert back.model.decoder == job.model.decoder and back.training.capacity == job.training.capacity
        with pytest.raises(QuestionError, match="does not say on which chips"):
            import_text(bare, "text", form)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 4, 16]),
    st.sampled_from(["none", "optimizer", "parameters"]), st.booleans(), st.sampled_from([1, 2]),
    st.sampled_from(["none", "full", "selective", {"recompute": ["layernorm", "moe_act"]}]),
    st.sampled_from(["bf16", "fp8-tensorwise", "mxfp8"]), st.sampled_from(["megatron", "torchtitan", "maxtext"]),
)  # fmt: skip
def test_every_plan_comes_back(
    tensor: int, pipeline: int, context: int, expert: int, shard: str, sequence: bool, virtual: int, remat: Any,
    precision: str, form: str,
) -> None:  # fmt: skip
    virtual = virtual if pipeline > 1 else 1
    plan = {
        "tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert, "shard": shard,
        "sequence_parallel": sequence, "virtual_stages": virtual,
        "schedule": "interleaved" if virtual > 1 else "1f1b", "microbatch_sequences": 1,
    }  # fmt: skip
    job = load_job({
        "model": "qwen3-30b-a3b", "cluster": {"chip": "h100-sxm", "nodes": 16}, "plan": plan,
        "batch": {"sequences": 1024, "length": 4096}, "training": {"remat": remat, "precision": precision},
        "software": {"stack": form},
    })  # fmt: skip
    if form == "maxtext" and (128 // (tensor * pipeline * context)) % expert:
        with pytest.raises(QuestionError, match="expert axis"):
            export_job(job, form)
        return
    made = export_job(job, form)
    assert import_text(made.text, "text").job.hash == job.hash
    if form == "megatron":
        # Megatron can say every one of these but sequence parallelism on one rank.
        lost = {x.name for x in made.left} - {"cluster", "plan.sequence_parallel", "software.overlap.parameters"}
        assert not lost and ("plan.sequence_parallel" in {x.name for x in made.left}) == (sequence and tensor == 1)


def test_a_megatron_script_is_read_with_its_variables_and_what_it_lacks_is_told() -> None:
    found = import_text(SCRIPT, "run.sh", chip="h100-sxm")
    job = found.job
    assert found.form == "megatron" and job.cluster == {"chip": "h100-sxm", "nodes": 4}
    assert job.model.decoder == load_job(EXAMPLES / "mixtral-8x7b.yaml").model.decoder
    assert (job.plan.data, job.plan.expert, job.plan.expert_tensor, job.plan.virtual_stages) == (8, 8, 1, 2)
    assert (job.batch.sequences, job.plan.shard, job.training.learning.dropout) == (256, "optimizer", 0.1)
    assert [(x.name, x.value) for x in found.left] == [("log-throughput", True)]
    assert [x.name for x in found.unknown] == ["wibble", "moe-expert-capacty-factor"]
    assert "moe-expert-capacity-factor" in found.unknown[1].why
    default = next(d for d in found.defaults if d.name == "weight-decay")
    assert default.value == 0.01 and "arguments.py" in default.source


def test_maxtext_yaml_with_overrides_and_its_own_defaults() -> None:
    text = "model_name: mixtral-8x7b\nper_device_batch_size: 2\ndataset_type: synthetic\ncapacity_facto: 1\n"
    found = import_text(text, "m.yml", cluster="v5p-128", overrides=["ici_expert_parallelism=8", "steps=50"])
    job = found.job
    assert found.form == "maxtext" and job.plan.expert == 8 and job.plan.data == 64 and job.plan.shard == "parameters"
    assert job.batch.sequences == 128 and job.batch.length == 2048 and job.training.remat == "full"
    assert job.training.capacity == "dropless" and job.training.run.steps == 50
    assert [x.name for x in found.left] == ["dataset_type"]
    assert [x.name for x in found.unknown] == ["capacity_facto"] and "capacity_factor" in found.unknown[0].why


def test_torchtitan_layers_are_dealt_as_it_deals_them() -> None:
    # 27 layers on 4 stages with a layer less at both ends, worked out by hand: 29 = 8 + 7 + 7 + 7.
    assert split(27, 4, 1, 1) == [7, 7, 7, 6]
    assert split(32, 8, 1, 1) == [4, 5, 4, 4, 4, 4, 4, 3]
    toml = '[model]\nname = "llama3"\nflavor = "8B"\n[training]\nlocal_batch_size = 8\n[parallelism]\n'
    job = import_text(toml + "pipeline_parallel_degree = 4\n", "t.toml", cluster={"chip": "h100-sxm", "nodes": 1}).job
    # 34 with both ends: 9, 9, 8, 8, less the embedding in the first and the logits in the last.
    assert job.plan.stages == (8, 9, 8, 7)
    assert job.plan.data == 2 and job.plan.shard == "gradients" and job.plan.microbatch_sequences == 1
    assert tomllib.loads(export_job(job, "torchtitan").text)["parallelism"]["data_parallel_shard_degree"] == 2


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_a_pattern_of_layers_comes_back(marks: list[bool]) -> None:
    text = pattern_of(marks)
    again = [i % int(text) == 0 for i in range(len(marks))] if text.isdecimal() else expand_pattern(text)
    assert [bool(x) for x in again or ()] == marks
    rule = rule_of(marks)
    of = [
        i in rule["layers"] if "layers" in rule
        else i >= rule.get("first_dense", 0) and (i - rule.get("offset", 0)) % rule.get("every", 1) == 0
        for i in range(len(marks))
    ]  # fmt: skip
    assert of == marks


BASE = SCRIPT.replace("--wibble 3 --moe-expert-capacty-factor 1.5", "")
BAD = [
    (BASE + "\n--hidden-size 5120", r"--hidden-size = 5120: line \d+ has 4096"),
    (BASE.replace("--num-layers 32", "--num-layers many"), r"line 5: --num-layers = many: must be a whole number"),
    (BASE.replace("GPUS_PER_NODE=8", ""), r"nproc-per-node = \$GPUS_PER_NODE: must be a whole number; \$GPUS_PER_NODE"),
    (BASE.replace("--tensor-model-parallel-size 1", "--tensor-model-parallel-size 3"), r"must divide the 32 GPUs"),
    (BASE.replace("$((8*NODES*8))", "250"), r"--global-batch-size = 250: must be a multiple of"),
    (BASE.replace("--expert-model-parallel-size 8", "--expert-model-parallel-size 6"), r"plan.expert = 6"),
    (BASE.replace("alltoall", "alltoal"), r"did you mean 'alltoall'"),
    (BASE + "\n--num-virtual-stages-per-pipeline-rank 2", r"goes not together with"),
    (BASE + "\n--fp16", r"goes not together with --bf16"),
    (BASE + "\n--moe-layer-freq '[1]*31'", r"has 31 layers; --num-layers is 32"),
    (BASE + "\n--encoder-num-layers 4", r"is a model that does not convert"),
    (BASE.replace('alltoall"', "alltoall"), r"quotation mark is not closed"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_contradiction_is_one_line_that_names_it(text: str, said: str) -> None:
    with pytest.raises(QuestionError, match=said) as caught:
        import_text(text, "run.sh", "megatron", chip="h100-sxm")
    assert str(caught.value).startswith("run.sh") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model_name=mixtral-8x7 ici_fsdp_parallelism=-1", "did you mean 'mixtral-8x7b'"),
        ("model_name=mixtral-8x7b ici_fsdp_parallelism=48", "product 48 must make up the 64 devices"),
        ("model_name=mixtral-8x7b per_device_batch_size=a", "per_device_batch_size = a: must be a number"),
        ("model_name=mixtral-8x7b sparse_matmul=false", "every expert computes all tokens"),
        ("model_name=mixtral-8x7b ici_pipeline_parallelism=3", "must make up the 64 devices"),
        ("model_name=mixtral-8x7b remat_policy=minimal_contxt", "must be one of"),
    ],
)
def test_maxtext_errors_are_one_line(text: str, said: str) -> None:
    with pytest.raises(QuestionError, match=said):
        import_text(text, "line", "maxtext", cluster="v5p-128")


def test_what_a_text_is_is_told_from_it_or_asked_for() -> None:
    assert form_of(SCRIPT, "x") == "megatron"
    assert form_of("python3 -m MaxText.train base.yml model_name=mixtral-8x7b steps=5", "x") == "maxtext"
    assert form_of("model_args:\n  num-layers: 2\n  hidden-size: 8\n", "x") == "megatron"
    assert form_of((EXAMPLES / "mixtral-8x7b.yaml").read_text(), "x") == "job"
    with pytest.raises(QuestionError, match="say which with --from"):
        form_of("hello there", "x")


def test_a_yaml_of_arguments_is_the_same_as_their_command_line() -> None:
    flags = {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "vocab-size": 1000, "seq-length": 128,
             "max-position-embeddings": 128, "micro-batch-size": 2, "tensor-model-parallel-size": 2}  # fmt: skip
    line = "pretrain_gpt.py " + " ".join(f"--{n} {v}" for n, v in flags.items()) + " --swiglu --disable-bias-linear"
    rows = [f"  {n.replace('-', '_')}: {v}" for n, v in flags.items()]
    text = "\n".join(["args:", *rows, "  swiglu: true", "  add_bias_linear: false", ""])
    one = import_text(line, "x", "megatron", cluster={"chip": "h100-sxm", "nodes": 1})
    other = import_text(text, "x", "megatron", cluster={"chip": "h100-sxm", "nodes": 1})
    assert one.job.hash == other.job.hash
    # Megatron pads 1,000 words to a multiple of 128 x 2; a gated network has int(4 x 64 x 2 / 3 / 64) x 64.
    assert one.job.model.vocab == 1024 and one.job.model.decoder.ffn and one.job.model.decoder.ffn.hidden == 128
