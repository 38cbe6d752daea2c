"""Everything a person can get wrong in a job or an option: one line naming field, value and rule, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from refusals import FORMULA, JARGON, JOB, Refused, real_command

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


def test_the_file_with_the_mistake_is_named_among_several(folder: Path, refused: Refused) -> None:
    (folder / "other.yaml").write_text(JOB.replace("expert: 8", "expert: 16"), encoding="utf-8")
    refused("moecast: other.yaml: plan.expert = 16: must divide", "forecast", "job.yaml", "other.yaml")


@pytest.mark.parametrize("command", ["link-load", "placement"])
def test_other_commands_name_the_job_file_too(command: str, folder: Path, refused: Refused) -> None:
    refused("moecast: none.yaml: no such file", command, "none.yaml")
    refused("moecast: job.yaml: plan.expert = 3: expert x", command, "job.yaml", "--set", "plan.expert=3")


# An option


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


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("forecast",), "Missing argument 'JOB.yaml...'."),
        (("forecast", "job.yaml", "--nope"), "No such option: --nope"),
        (("forcast",), "No such command 'forcast'. Did you mean 'forecast'?"),
        (("forecast", "--set"), "Option '--set' requires an argument."),
    ],
)
def test_a_wrong_option_is_refused_without_a_traceback(
    arguments: tuple[str, ...], expected: str, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, said = call(*arguments)
    assert (code, out) == (2, "") and f"Error: {expected}" in said and not JARGON.search(said)


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
    done = real_command(*arguments, cwd=folder, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"moecast: {said}\n")
