"""The `cluster:` part of a job, as it may be written, and the rules that join its keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hw_profiles.errors import QuestionError
from hw_profiles.schema import Chip, Record

Count = Annotated[int, Field(gt=0, le=1_000_000, strict=True)]


def _flat(mapping: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"scale_up": {"latency_us": 2}} as {"scale_up.latency_us": 2}."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        out.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return out


def _chip_text_or_mapping(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{value!r:.60} is neither the name of a chip nor a mapping with `name` and changed numbers")
    flat = _flat(value)
    for key, number in flat.items():
        if isinstance(number, bool) or not isinstance(number, (str, int, float)):
            raise ValueError(f"{key:.60} = {number!r:.60}: a number, or a factor such as x2")
    return flat


class ClusterSpec(Record):
    """A cluster in the user's words; which keys go together depends on the kind of chip (see `check_keys`)."""

    chip: Annotated[str | dict[str, str | float], BeforeValidator(_chip_text_or_mapping)]
    slice: str | None = Field(None, description="TPU: chips per axis (4x4x8) or a slice name (v5p-256)")
    slices: Count | None = Field(None, description="TPU: slices joined by the data-centre network; default 1")
    curves: Literal["shipped", "compiler"] | None = Field(
        None, description="TPU: efficiencies of the chip's file, or what the TPU compiler expects; default shipped"
    )
    nodes: Count | None = Field(None, description="GPU: number of nodes; cpu-host: hosts on Ethernet, default 1")
    chips_per_node: Count | None = Field(None, description="GPU: devices used in each node; default all")
    racks: Count | None = Field(None, description="NVL72: number of racks")
    devices_per_domain: Count | None = Field(None, description="NVL72: devices used in each rack; default all")
    oversubscription: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] | None = Field(
        None, description="GPU: cards below a leaf switch over what leads up from it; default 1"
    )
    devices: Count | None = Field(None, description="cpu-host: JAX devices of all hosts")

    @property
    def chip_name(self) -> str:
        """The chip's name or alias, without changed numbers."""
        return self.chip if isinstance(self.chip, str) else str(self.chip["name"])

    @property
    def chip_changes(self) -> dict[str, str | float]:
        """Dotted names and new values of numbers that the user changed."""
        return {} if isinstance(self.chip, str) else {k: v for k, v in self.chip.items() if k != "name"}


def is_rack_scale(chip: Chip) -> bool:
    """Whether one fast domain spans several hosts (NVL72)."""
    domain = chip.scale_up.chips_per_domain
    return chip.kind == "gpu" and domain is not None and domain > chip.chips_per_host


def check_keys(spec: ClusterSpec, chip: Chip) -> None:
    """QuestionError where a key does not belong to this kind of chip, or the one that gives the size is missing."""
    if chip.kind == "tpu":
        what, needed, allowed = "a TPU", "slice", {"slice", "slices", "curves"}
    elif chip.kind == "cpu":
        what, needed, allowed = "a CPU host", "devices", {"devices", "nodes"}
    elif is_rack_scale(chip):
        what, needed, allowed = "a rack-scale GPU", "racks", {"racks", "devices_per_domain", "oversubscription"}
    else:
        what, needed, allowed = "a GPU in nodes", "nodes", {"nodes", "chips_per_node", "oversubscription"}
    given = {name for name, value in spec if name != "chip" and value is not None}
    for name in sorted(given - allowed):
        keys = ", ".join(sorted(allowed))
        value = getattr(spec, name)
        raise QuestionError(f"cluster.{name} = {value}: {chip.name} is {what}; its keys are {keys}")
    if needed not in given:
        raise QuestionError(f"cluster.{needed}: required for {chip.name}, and missing")


def plain_spec(chip: Chip, devices: int, nodes: int = 1) -> dict[str, Any]:
    """The `cluster:` that has so many devices of one chip on `nodes` hosts, or on as few as hold them.

    QuestionError where they are no whole nodes, and for TPUs, whose slice a number of devices does not tell.
    """
    if chip.kind == "cpu":
        return {"chip": chip.name, "devices": devices, **({"nodes": nodes} if nodes > 1 else {})}
    if chip.kind == "tpu":
        raise QuestionError("TPU: the shape of the slice is not stated")
    chips = devices // chip.devices_per_chip
    if is_rack_scale(chip):
        domain = chip.scale_up.chips_per_domain or chips
        return {"chip": chip.name, "racks": -(-chips // domain), "devices_per_domain": min(chips, domain)}
    per_node = min(chips, chip.chips_per_host) if nodes == 1 else chips // nodes
    if chips % per_node:
        raise QuestionError(f"devices = {devices}: no whole nodes of {per_node}")
    return {"chip": chip.name, "nodes": chips // per_node, "chips_per_node": per_node}
