"""Files beside the job that are wrong, missing, too large or no files, and places where none can be written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from refusals import FORMULA, JOB, ROOT, Refused, real_command

# Any file


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


# A model

CONFIG = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000,
    "num_key_value_heads": 8, "num_hidden_layers": 4, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
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
    text = json.dumps(content) if isinstance(content, dict) else content
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
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


# A chip's profile

CHIP: dict[str, Any] = yaml.safe_load((ROOT / "hw_profiles" / "chips" / "h100-sxm.yaml").read_text(encoding="utf-8"))


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
    said = "cluster.nodes = 8: tpu-v3 is a TPU; its keys are curves, slice, slices"
    refused(said, "forecast", "job.yaml", "--profile", tpu)


# A fabric

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
    refused(f"moecast: job.yaml: {name}", "forecast", "job.yaml", "--topology", name)


# What is written


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


def test_a_full_disk_exits_with_4_and_leaves_nothing(folder: Path) -> None:
    """Standard output on a full device; and a page larger than the files that this process may write."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = real_command("forecast", "job.yaml", *FORMULA, "--json", cwd=folder, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (4, "moecast: standard output: No space left on device\n")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = real_command(
        "forecast", "job.yaml", "--html", "page.html", cwd=folder, capture_output=True, preexec_fn=small_files
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "", "moecast: page.html: File too large\n")
    assert [path.name for path in folder.iterdir()] == ["job.yaml"]
