"""From a name or a few keys to a chip's profile and a cluster: the ground floor's public functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hw_profiles.cluster import Cluster, Level, Protocols, Torus
from hw_profiles.cluster_spec import ClusterSpec, check_keys, is_rack_scale
from hw_profiles.errors import QuestionError, nearest
from hw_profiles.estimates import with_estimates
from hw_profiles.overrides import apply_overrides, quantities
from hw_profiles.schema import Chip, Record, ScaleOut, ScaleUp
from hw_profiles.sharing import at_work
from hw_profiles.slices import Slice, all_slices, find_slice, missing_slice, slice_by_name
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import read_yaml

_FOLDER = Path(__file__).parent
_ALIASES = re.compile(r"^aliases: \[([^\]]*)\]", re.MULTILINE)
# In the units of the profiles; beyond these limits a forecast would not be a finite number.
_LEAST, _MOST = 1e-6, 1e9
_SCALE_UP_NAMES = {"nvswitch": "NVLink", "cube_mesh": "NVLink", "full_mesh": "xGMI", "pcie": "PCIe"}
SCALE_OUT_NAMES = {"infiniband": "InfiniBand", "ethernet": "Ethernet", "dcn": "data-centre network"}


class Preset(Record):
    """A named cluster of the shipped catalogue."""

    name: str
    description: str
    source: str
    cluster: ClusterSpec


@cache
def chip_names() -> tuple[str, ...]:
    """Names of all shipped chips, sorted."""
    return tuple(sorted(path.stem for path in (_FOLDER / "chips").glob("*.yaml")))


@cache
def cluster_names() -> tuple[str, ...]:
    """Names of all cluster presets, sorted; TPU slice names (`v5p-128`) work beside them."""
    return tuple(sorted(path.stem for path in (_FOLDER / "clusters").glob("*.yaml")))


@cache
def _alias_table() -> dict[str, str]:
    # The alias line is read as text: validating every profile to find one name would cost 100 ms.
    table = {}
    for name in chip_names():
        found = _ALIASES.search((_FOLDER / "chips" / f"{name}.yaml").read_text(encoding="utf-8"))
        table.update({alias.strip(): name for alias in (found.group(1) if found else "").split(",") if alias.strip()})
    return table


def canonical_chip_name(name: str) -> str:
    """The name of the profile that `name` (a name or alias, any case) means; QuestionError with the nearest one."""
    key = name.strip().lower()
    if key in chip_names():
        return key
    if key not in _alias_table():
        hint = nearest(key, [*chip_names(), *_alias_table()]) or f"; known: {', '.join(chip_names())}"
        raise QuestionError(f"cluster.chip = {name!r:.60}: unknown chip{hint}")
    return _alias_table()[key]


@cache
def _load(name: str) -> Chip:
    return load_chip_file(_FOLDER / "chips" / f"{name}.yaml")


def load_chip(name: str) -> Chip:
    """The shipped profile called `name` (or an alias of it); QuestionError if there is none."""
    return _load(canonical_chip_name(name))


def load_chip_file(path: str | Path) -> Chip:
    """A profile from a file, shipped or the user's own; QuestionError if it is missing, too large or not valid."""
    chip = validate(Chip, read_yaml(Path(path)), where=str(path))
    _check_numbers(chip, str(path))
    return chip


def _check_numbers(chip: Chip, where: str) -> None:
    """QuestionError for a number that the schema allows and a forecast would divide by, or a share above one."""
    up, tile = chip.scale_up, chip.efficiency.tile
    for name, count in (
        ("devices_per_chip", chip.devices_per_chip),
        ("chips_per_host", chip.chips_per_host),
        ("scale_up.links_per_chip", up.links_per_chip),
        ("scale_up.chips_per_domain", 1 if up.chips_per_domain is None else up.chips_per_domain),
        ("efficiency.tile.rows", tile.rows),
        ("efficiency.tile.columns", tile.columns),
        ("efficiency.tile.depth", tile.depth),
    ):
        if count < 1:
            raise QuestionError(f"{where}: {name} = {count}: must be greater than 0")
    for name, entries in (("peak_tflops", chip.peak_tflops), ("efficiency.matmul", chip.efficiency.matmul)):
        if not entries:
            raise QuestionError(f"{where}: {name} = {{}}: must have at least one number format")
    try:
        # The rules for a number that is changed hold for one that is written.
        _changed(chip, {path: number.value for path, number in quantities(chip)})
    except QuestionError as error:
        raise QuestionError(str(error).replace("cluster.chip.", f"{where}: ", 1)) from None


def _changed(chip: Chip, changes: Mapping[str, str | float]) -> Chip:
    """`chip` with `changes`; QuestionError for an unknown name, an impossible value or one beyond the limits."""
    new = apply_overrides(chip, changes)
    for path, number in quantities(new):
        if path in changes and number.value and not _LEAST <= number.value <= _MOST:
            rule = f"must be from {_LEAST:g} to {_MOST:g}"
            raise QuestionError(f"cluster.chip.{path} = {number.value:g}: {rule}")
    if new.overlap_slowdown.value < 1:
        rule = "must be at least 1: compute beside communication is never faster"
        raise QuestionError(f"cluster.chip.overlap_slowdown = {new.overlap_slowdown.value:g}: {rule}")
    return new


@cache
def load_preset(name: str) -> Preset:
    """The cluster preset called `name`; QuestionError if there is none."""
    if name not in cluster_names():
        raise QuestionError(f"cluster = {name!r:.60}: no such preset{nearest(name, cluster_names())}")
    path = _FOLDER / "clusters" / f"{name}.yaml"
    return validate(Preset, read_yaml(path), where=str(path))


def resolve_cluster(
    spec: str | Mapping[str, Any],
    chip_overrides: Mapping[str, str | float] | None = None,
    chip: Chip | None = None,
) -> Cluster:
    """The cluster that `spec` means: a preset or slice name (h800-2048, v5p-128), or a mapping of `ClusterSpec`'s keys.

    `chip` replaces the profile of the spec's chip (a user's own file); `chip_overrides` changes single numbers after
    that. QuestionError, one line beginning with `cluster`, for anything that cannot be built.
    """
    if isinstance(spec, str):
        name, description, parsed = _named(spec)
    else:
        name, description, parsed = "", "", validate(ClusterSpec, _plain(spec), "", "cluster")
    profile_name = canonical_chip_name(parsed.chip_name)
    chip = chip or load_chip(profile_name)
    if parsed.curves == "compiler" and chip.kind == "tpu":
        chip = with_estimates(chip)
    changes = {**parsed.chip_changes, **(chip_overrides or {})}
    chip = _changed(chip, changes)
    check_keys(parsed, chip)
    if chip.kind == "tpu":
        return _tpu(parsed, chip, find_slice(profile_name, parsed.slice or ""), name, description)
    if chip.kind == "cpu":
        return _cpu(parsed, chip, name, description)
    return _gpu(parsed, chip, name, description)


def cluster_mapping(name: str) -> dict[str, Any]:
    """The keys that the preset or slice called `name` stands for; QuestionError if there is none."""
    return _named(name)[2].model_dump(exclude_none=True)


def _plain(spec: Mapping[str, Any]) -> Any:
    return dict(spec) if isinstance(spec, Mapping) else spec


def _named(text: str) -> tuple[str, str, ClusterSpec]:
    key = text.strip().lower()
    if key in cluster_names():
        preset = load_preset(key)
        return preset.name, preset.description, preset.cluster
    found = slice_by_name(key)
    if found is not None:
        return found.name, "", ClusterSpec.model_validate({"chip": found.chip, "slice": found.shape})
    rule = missing_slice(key)
    if not rule:
        rule = "no such cluster" + nearest(key, [*cluster_names(), *(s.name for s in all_slices())])
    raise QuestionError(f"cluster = {text!r:.60}: {rule}")


def _protocols(network: ScaleUp | ScaleOut) -> dict[str, Any]:
    """What was measured of each collective, its latencies in seconds."""
    unit = network.latency_us.value * 1e-6
    return {
        name: Protocols(
            tuple((p.start * unit, p.step * unit, p.share) for p in fit.protocols), fit.own, fit.passes, fit.array
        )
        for name, fit in network.collectives.items()
    }


def _scale_up(chip: Chip, name: str, devices: int) -> Level:
    up = chip.scale_up
    return Level(
        name=name,
        devices=devices,
        bytes_per_s=chip.scale_up_bytes_per_s / chip.devices_per_chip,
        latency_s=up.latency_us.value * 1e-6,
        ring_efficiency=up.ring_efficiency.value,
        all_to_all_efficiency=up.all_to_all_efficiency.value,
        in_switch_efficiency=up.in_switch_efficiency.value if up.in_switch_efficiency else 0.0,
        **_protocols(up),
    )


def _scale_out(chip: Chip, devices: int, oversubscription: float, unit: str) -> Level:
    out = chip.scale_out
    if out is None:
        raise QuestionError(f"cluster.{unit}: {chip.name} has no scale_out network, so there can be only one")
    return Level(
        name=SCALE_OUT_NAMES[out.kind],
        devices=devices,
        bytes_per_s=out.nic_gb_per_s.value * 1e9 / chip.devices_per_chip,
        latency_s=out.latency_us.value * 1e-6,
        ring_efficiency=out.ring_efficiency.value,
        all_to_all_efficiency=out.all_to_all_efficiency.value,
        oversubscription=oversubscription,
        **_protocols(out),
    )


def _tpu(spec: ClusterSpec, chip: Chip, shape: Slice, name: str, description: str) -> Cluster:
    slices = spec.slices or 1
    up = chip.scale_up
    torus = Torus(
        dims=shape.dims,
        wrap=shape.wrap,
        link_bytes_per_s=chip.scale_up_bytes_per_s / up.links_per_chip,
        latency_s=up.latency_us.value * 1e-6,
        ring_efficiency=up.ring_efficiency.value,
        all_to_all_efficiency=up.all_to_all_efficiency.value,
    )
    chips = shape.chips * slices
    devices = chips * chip.devices_per_chip
    levels = () if slices == 1 else (_scale_out(chip, devices, 1.0, "slices"),)
    rings = "".join("T" if w else "F" for w in shape.wrap)
    text = (
        f"{slices} x " * (slices > 1) + f"{chip.name} slice {shape.shape}, closed axes {rings}, {devices} JAX devices"
    )
    default_name = shape.name if slices == 1 else f"{slices}x{shape.name}"
    return Cluster(name or default_name, description or text, chip, devices, chips, torus, slices, levels)


def _cpu(spec: ClusterSpec, chip: Chip, name: str, description: str) -> Cluster:
    """Devices in the memory of one host, or of several that an Ethernet joins, with one card a host."""
    devices, hosts = spec.devices, spec.nodes or 1
    assert devices is not None
    if devices % hosts:
        raise QuestionError(f"cluster.nodes = {hosts}: must divide the {devices} devices")
    local = devices // hosts
    chip = at_work(chip, local)
    levels = []
    if local > 1 or hosts == 1:
        levels.append(_scale_up(chip, "host memory", local))
    if hosts > 1:
        chip = _sharing_card(chip, local)
        levels.append(_scale_out(chip, devices, 1.0, "nodes"))
    text = f"{devices} devices in the memory of one host"
    if hosts > 1:
        text = f"{hosts} hosts of {local} {chip.name}, joined by Ethernet"
    full_name = name or f"{chip.name}-{devices}"
    return Cluster(full_name, description or text, chip, devices, devices, None, 1, tuple(levels))


def _sharing_card(chip: Chip, devices: int) -> Chip:
    """`chip` as one of `devices` on a host's network card, each with its part of the card's rate."""
    out = chip.scale_out
    if out is None:
        return chip
    nic = out.nic_gb_per_s.model_copy(update={"value": out.nic_gb_per_s.value / devices})
    return chip.model_copy(update={"scale_out": out.model_copy(update={"nic_gb_per_s": nic})})


def _gpu(spec: ClusterSpec, chip: Chip, name: str, description: str) -> Cluster:
    if is_rack_scale(chip):
        unit, groups, key, size = "racks", spec.racks, "devices_per_domain", spec.devices_per_domain
        largest = chip.scale_up.chips_per_domain or chip.chips_per_host
    else:
        unit, groups, key, size = "nodes", spec.nodes, "chips_per_node", spec.chips_per_node
        largest = chip.chips_per_host
    assert groups is not None
    size = size or largest
    if size > largest:
        raise QuestionError(f"cluster.{key} = {size}: {chip.name} has at most {largest} in one")
    thin = spec.oversubscription or 1.0
    chips = groups * size
    levels = []
    if size > 1:
        levels.append(_scale_up(chip, _SCALE_UP_NAMES[chip.scale_up.kind], size * chip.devices_per_chip))
    if groups > 1 or not levels:
        levels.append(_scale_out(chip, chips * chip.devices_per_chip, thin, unit))
    text = f"{groups} {unit if groups > 1 else unit[:-1]} of {size} {chip.name}"
    if groups > 1:
        # One card a device, card r of every node on the same leaf: traffic between equal ranks meets no spine.
        text += f", joined by a rail-optimised fat tree of {levels[-1].name}"
        text += ", full bisection" if thin == 1 else f", {thin:g}:1 oversubscribed above the leaves"
    devices = chips * chip.devices_per_chip
    return Cluster(name or f"{chip.name}-{devices}", description or text, chip, devices, chips, None, 1, tuple(levels))
