"""The ground floor: every number has a source, slices follow one rule, clusters come out as computed by hand."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hw_profiles import (
    QuestionError,
    chip_names,
    cluster_names,
    load_chip,
    load_chip_file,
    load_preset,
    resolve_cluster,
)
from hw_profiles.loader import cluster_mapping
from hw_profiles.overrides import quantities
from hw_profiles.schema import GIB, Curve, Price, Quantity
from hw_profiles.slices import all_slices
from hw_profiles.topology_rules import wrap_flags

ROOT = Path(__file__).parents[1]
ALL_CHIPS = (
    *("tpu-v2", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x"),
    *("k40", "v100", "a100-40", "a100-80", "h100-sxm", "h200", "h800", "b200", "b300", "gb200", "gb300"),
    *("mi300x", "mi355x", "cpu-host"),
)


def test_the_shipped_chips_are_the_promised_ones() -> None:
    """No chip is missing, and a name or alias means one chip only."""
    assert sorted(ALL_CHIPS) == list(chip_names())
    names = [n for chip in map(load_chip, chip_names()) for n in (chip.name, *chip.aliases)]
    assert len(names) == len(set(names))
    assert load_chip("H100").name == "h100-sxm" and load_chip("ironwood").name == "tpu7x"


@pytest.mark.parametrize("name", ALL_CHIPS)
def test_every_number_of_a_chip_has_source_date_and_curve(name: str) -> None:
    """Sources and dates are words and dates; every peak has an efficiency curve; every efficiency is a fraction."""
    chip = load_chip(name)
    numbers = dict(quantities(chip))
    dated: list[Quantity | Curve | Price] = [*numbers.values(), *chip.efficiency.matmul.values(), *chip.prices]
    for item in dated:
        assert len(item.source) > 5 and "provisional" not in item.source
        assert re.fullmatch(r"20\d\d-\d\d", item.date)
    assert set(chip.peak_tflops) <= set(chip.efficiency.matmul)
    for path, number in numbers.items():
        if path.endswith(("_efficiency", "attention_forward", "attention_backward", "efficiency.memory")):
            assert 0 < number.value <= 1, path
        if number.confidence == "disputed" and not number.disputed:
            assert number.note, f"{path} is disputed by nobody"
    for curve in chip.efficiency.matmul.values():
        fractions = [y for _, y in curve.points]
        assert fractions == sorted(fractions)
        assert (curve.residuals is not None) <= (curve.basis == "measured")


def test_a_core_of_tpu_v3_has_half_of_the_chip() -> None:
    """61.5 TFLOP/s, 16 GiB and 450 GB/s: the numbers the Switch Transformer's cores had."""
    chip = load_chip("tpu-v3")
    assert chip.device_peak_flops_per_s("bf16") == 61.5e12
    assert chip.device_memory_bytes == 16 * GIB
    assert chip.device_memory_bytes_per_s == 450e9
    assert [alternative.value for alternative in chip.peak_tflops["bf16"].disputed] == [140]


def test_usable_memory_is_the_compilers_limit() -> None:
    """XLA's own out-of-memory limits: 95.74 GiB on v5p, 31.25 GiB on v6e."""
    for name, gib in (("tpu-v5p", 95.74), ("tpu-v6e", 31.25)):
        chip = load_chip(name)
        assert chip.device_memory_bytes / GIB - chip.framework_reserve_gib.value == pytest.approx(gib)


def test_wrap_rule_gives_every_row_of_the_shipped_table() -> None:
    """Shape, chips and closed axes of all slices agree with the rule, and a name means one slice."""
    assert len({s.name for s in all_slices()}) == len(all_slices()) == 237
    for s in all_slices():
        assert s.wrap == wrap_flags(s.chip, s.dims), s.name
        cluster = resolve_cluster(s.name)
        assert cluster.chips == math.prod(s.dims) and cluster.devices == s.chips * load_chip(s.chip).devices_per_chip


def test_shipped_slices_are_maxtexts(shared: Path) -> None:
    """All 223 rows of the source table: shape, devices and closed axes."""
    path = shared / "facts" / "tpu_slices_maxtext.csv"
    shipped = {s.name: s for s in all_slices()}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 223
    for row in rows:
        dims = tuple(int(n) for n in row["topology"].split("x"))
        wrap = tuple(flag == "True" for flag in row["wrap_xyz"].split(","))[: len(dims)]
        s = shipped[row["name"]]
        assert (s.dims, s.wrap) == (dims, wrap) == (dims, wrap_flags(s.chip, dims))
        assert resolve_cluster(row["name"]).devices == int(row["jax_devices"])


def test_levels_of_deepseeks_cluster() -> None:
    """256 nodes of 8 H800: 200 GB/s of NVLink, one 50 GB/s card a device."""
    cluster = resolve_cluster("h800-2048")
    inside, across = cluster.levels
    assert (cluster.devices, cluster.chips, cluster.torus, cluster.slices) == (2048, 2048, None, 1)
    assert (inside.name, inside.devices, inside.bytes_per_s) == ("NVLink", 8, 200e9)
    assert (across.name, across.devices, across.bytes_per_s) == ("InfiniBand", 2048, 50e9)
    assert inside.in_switch_efficiency == 0.6 and across.in_switch_efficiency == 0


def test_torus_of_a_v5p_slice_in_any_order() -> None:
    """4x4x8 chips, closed on every axis, 90 GB/s a link; three of them meet over 6.25 GB/s a chip."""
    cluster = resolve_cluster({"chip": "tpu-v5p", "slice": "8x4x4", "slices": 3})
    assert cluster.torus is not None
    assert (cluster.torus.dims, cluster.torus.wrap) == ((4, 4, 8), (True, True, True))
    assert cluster.torus.link_bytes_per_s == 90e9
    assert (cluster.devices, cluster.devices_per_slice) == (384, 128)
    assert [(level.devices, level.bytes_per_s) for level in cluster.levels] == [(384, 6.25e9)]
    # A core of tpu7x has half of the chip's card.
    assert resolve_cluster({"chip": "tpu7x", "slice": "4x4x4", "slices": 2}).levels[0].bytes_per_s == 6.25e9


def test_racks_nodes_and_hosts() -> None:
    """NVL72 with 64 of 72 used, an oversubscribed cluster, one node, and a CPU host."""
    racks = resolve_cluster({"chip": "gb200", "racks": 4, "devices_per_domain": 64})
    assert [(x.devices, x.bytes_per_s) for x in racks.levels] == [(64, 900e9), (256, 50e9)]
    thin = resolve_cluster({"chip": "h100", "nodes": 128, "oversubscription": 2})
    assert [(x.devices, x.bytes_per_s) for x in thin.levels] == [(8, 450e9), (1024, 50e9)]
    assert [x.oversubscription for x in thin.levels] == [1, 2]
    assert len(resolve_cluster({"chip": "b200", "nodes": 1}).levels) == 1
    assert [x.name for x in resolve_cluster("cpu-8").levels] == ["host memory"]


@pytest.mark.parametrize("name", cluster_names())
def test_every_preset_resolves_and_names_its_source(name: str) -> None:
    """A preset is called as its file is, says where it is from, and can be written out as keys."""
    preset, cluster = load_preset(name), resolve_cluster(name)
    assert preset.name == name and preset.source and cluster.description == preset.description
    assert resolve_cluster(cluster_mapping(name)).levels == cluster.levels
    if not cluster.torus:
        assert cluster.levels[-1].devices == cluster.devices


def test_slice_names_count_cores_chips_or_devices() -> None:
    """v3 and v5p count TensorCores, v6e chips, tpu7x JAX devices."""
    sizes = {name: resolve_cluster(name).chips for name in ("tpu-v3-32", "TPU-v5p-128", "v6e-256", "tpu7x-256")}
    assert sizes == {"tpu-v3-32": 16, "TPU-v5p-128": 64, "v6e-256": 256, "tpu7x-256": 128}
    assert resolve_cluster("tpu-v3-32").torus.wrap == (False, False)  # type: ignore[union-attr]
    assert resolve_cluster("tpu-v3-2048").torus.wrap == (True, True)  # type: ignore[union-attr]


BAD = {
    "unknown preset": ("h800-2049", "did you mean 'h800-2048'"),
    "missing slice name": ("v5p-100", "v5p-128"),
    "empty": ({}, "chip: required"),
    "unknown chip": ({"chip": "h10O", "nodes": 1}, "did you mean 'h100'"),
    "chip is a number": ({"chip": 5, "nodes": 1}, "neither the name"),
    "unknown key": ({"chip": "h100", "node": 4}, "did you mean 'nodes'"),
    "negative": ({"chip": "h100", "nodes": -1}, "nodes = -1: must be greater than 0"),
    "text for a number": ({"chip": "h100", "nodes": "4"}, "nodes = '4'"),
    "true for a number": ({"chip": "h100", "nodes": True}, "nodes = True"),
    "no size": ({"chip": "h100"}, "nodes: required"),
    "key of another kind": ({"chip": "h100", "nodes": 1, "slice": "4x4"}, "slice = 4x4"),
    "key of another kind, cpu": ({"chip": "cpu-host", "slices": 1}, "its keys are devices, nodes"),
    "uneven hosts": ({"chip": "cpu-host", "devices": 4, "nodes": 3}, "nodes = 3: must divide the 4 devices"),
    "slice that does not exist": ({"chip": "tpu-v5p", "slice": "4x4x5"}, "4x4x4 (v5p-128)"),
    "slice of another chip": ({"chip": "tpu-v5p", "slice": "v6e-256"}, "a slice of tpu-v6e"),
    "slice in words": ({"chip": "tpu-v5p", "slice": "big\nslice"}, "write chips per axis"),
    "huge slice": ({"chip": "tpu-v5p", "slice": "9" * 5000}, "write chips per axis"),
    "slice of zero": ({"chip": "tpu-v5p", "slice": "0x4x4"}, "no such slice"),
    "too wide": ({"chip": "gb200", "racks": 1, "devices_per_domain": 73}, "at most 72"),
    "oversubscription below one": ({"chip": "h100", "nodes": 2, "oversubscription": 0.5}, "oversubscription = 0.5"),
    "unknown number": (
        {"chip": {"name": "h100", "memory_bandwith_gb_per_s": 2}, "nodes": 1},
        "memory_bandwidth_gb_per_s",
    ),
    "zero rate": ({"chip": {"name": "h100", "peak_tflops.bf16": 0}, "nodes": 1}, "above zero"),
    "not a factor": ({"chip": {"name": "h100", "peak_tflops.bf16": "*"}, "nodes": 1}, "a number, or a factor"),
    "not finite": ({"chip": {"name": "h100", "peak_tflops.bf16": "*1e999"}, "nodes": 1}, "finite"),
    "share above one": ({"chip": {"name": "h100", "scale_up": {"ring_efficiency": 1.5}}, "nodes": 1}, "at most 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_cluster_is_one_line(case: str) -> None:
    """Each mistake is a QuestionError of one line, which begins with `cluster` and says what would be right."""
    spec, hint = BAD[case]
    with pytest.raises(QuestionError) as caught:
        resolve_cluster(spec)  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith("cluster") and "\n" not in text and len(text) < 400
    assert hint in text


def test_changed_numbers_say_that_they_were_changed() -> None:
    """A factor scales and a number replaces; the rest, and the shared profile, stay as they are."""
    changes = {"memory_bandwidth_gb_per_s": "*2", "scale_out.nic_gb_per_s": "100", "peak_tflops.bf16": "x0.5"}
    cluster = resolve_cluster("h100-64", changes)
    assert cluster.chip.memory_bandwidth_gb_per_s.value == 6700
    assert cluster.chip.memory_bandwidth_gb_per_s.source == "override"
    assert cluster.chip.peak_tflops["bf16"].value == 494.5
    assert cluster.levels[1].bytes_per_s == 100e9
    assert load_chip("h100-sxm").memory_bandwidth_gb_per_s.value == 3350
    nested = {"chip": {"name": "h100", "scale_up": {"link_gb_per_s": "x2"}}, "nodes": 1}
    assert resolve_cluster(nested).levels[0].bytes_per_s == 900e9


def test_own_profile_replaces_the_chip(tmp_path: Path) -> None:
    """A user's file is read like a shipped one, and a mistake in it names file, field and rule."""
    shipped = (ROOT / "hw_profiles" / "chips" / "h100-sxm.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(shipped.replace("name: h100-sxm", "name: mine"), encoding="utf-8")
    chip = load_chip_file(path)
    assert resolve_cluster("h100-64", chip=chip).chip.name == "mine"
    path.write_text(shipped.replace("links_per_chip", "links_per_chips"), encoding="utf-8")
    with pytest.raises(QuestionError, match=r"mine.yaml: scale_up.links_per_chips: unknown key; did you mean"):
        load_chip_file(path)


def test_an_unknown_price_is_empty_and_a_missing_peak_is_absent() -> None:
    """Nothing unknown is written as zero."""
    assert load_chip("tpu7x").prices == () and load_chip("h800").prices == ()
    assert "fp8" not in load_chip("a100-80").peak_tflops and "bf16" not in load_chip("k40").peak_tflops
    assert all(number.value > 0 for name in chip_names() for number in load_chip(name).peak_tflops.values())


def test_loading_imports_nothing_heavy() -> None:
    """The ground floor needs no numpy, scipy or pandas, and `import hw_profiles` not even pydantic."""
    code = (
        "import sys, hw_profiles; assert 'pydantic' not in sys.modules; hw_profiles.resolve_cluster('h800-2048');"
        "assert not {'numpy', 'scipy', 'pandas', 'jax', 'networkx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_chip_files_hold_what_the_fit_finds(shared: Path) -> None:
    """The measured curves of H100 are those that the published table gives, and they explain it."""
    chip = load_chip("h100-sxm")
    command = [sys.executable, "-m", "benchmarks.fit_profiles", str(shared / "measured"), "--chip", chip.name, "--json"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    curves = json.loads(done.stdout)[chip.name]["matmul"]
    for fmt, shipped in chip.efficiency.matmul.items():
        if shipped.basis != "measured":
            continue
        found = curves[fmt]
        assert [list(p) for p in shipped.points][-len(found["points"]) :] == found["points"]
        assert found["residuals"]["p10"] > 0.9 and found["residuals"]["p90"] < 1.15
