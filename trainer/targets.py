"""What a program is compiled for: `cpu:8`, or a TPU slice that need not be there, `tpu:v5p:4x4x4`.

A target gives JAX devices to compile for, and the job's `cluster:` mapping to forecast the same. JAX is imported only
when devices are asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.loader import load_chip
from hw_profiles.slices import Slice, all_slices, find_slice

# libtpu's name of a generation -> our profile. On v4 libtpu splits a chip in two unless told `megacore`, as on a real
# v4 host one device is a chip (tried: 4x4x4 gives 128 devices without, 64 with it; libtpu 0.0.42.1, November 2026).
_GENERATIONS = {"v2": "tpu-v2", "v3": "tpu-v3", "v4": "tpu-v4", "v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e",
                "7x": "tpu7x"}  # fmt: skip
_ALIASES = {"v7x": "7x", "tpu7x": "7x", "v5litepod": "v5e"}
_CHIP_CONFIG = {"v4": "megacore"}
_MOST_CPU_DEVICES = 1024
_DEVICES_FLAG = "--xla_force_host_platform_device_count"
# Without these libtpu asks a metadata server that is not there, and lets one process at a time in, as if there were a
# TPU to own: two compilations at once would fail at its lock file.
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_EXAMPLES = "write cpu:8, or tpu:v5p:4x4x4"


class TargetError(RuntimeError):
    """The target is a good one, but this Python cannot compile for it; one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to compile for. `devices` counts JAX devices: two per chip on TPU v2, v3 and 7x."""

    name: str
    platform: str
    devices: int
    generation: str = ""
    slice: Slice | None = None

    @property
    def cluster(self) -> dict[str, Any]:
        """The job's `cluster:` mapping for the same machine."""
        if self.slice is None:
            return {"chip": "cpu-host", "devices": self.devices}
        return {"chip": self.slice.chip, "slice": self.slice.shape}

    def jax_devices(self) -> list[Any]:
        """JAX devices to build a mesh of, deviceless for TPU; TargetError where this process has none such.

        For TPU this sets two variables of the environment for libtpu.
        """
        return self._host_devices() if self.slice is None else self._slice_devices(self.slice)

    def _host_devices(self) -> list[Any]:
        import jax

        devices = list(jax.devices("cpu"))
        if len(devices) < self.devices:
            raise TargetError(
                f"{self.name}: this process has {len(devices)} CPU devices; start it with "
                f"XLA_FLAGS={_DEVICES_FLAG}={self.devices}"
            )
        return devices[: self.devices]

    def _slice_devices(self, shape: Slice) -> list[Any]:
        check_libtpu()
        for name, value in _LIBTPU.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if shape.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.generation in _CHIP_CONFIG:
            options["chip_config_name"] = _CHIP_CONFIG[self.generation]
        generation = "tpu7x" if self.generation == "7x" else self.generation
        topology = f"{generation}:{shape.shape}"
        try:
            devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
        except Exception as error:  # libtpu raises what its RPC layer raises
            raise TargetError(f"{self.name}: libtpu makes no such slice: {str(error).splitlines()[0]:.160}") from None
        if len(devices) != self.devices:
            raise TargetError(f"{self.name}: libtpu makes {len(devices)} devices of it, where {self.devices} were due")
        return devices


def parse_target(text: str) -> Target:
    """Read a target; QuestionError with the nearest valid one for a platform, generation or slice that is not known."""
    platform, _, rest = text.strip().lower().partition(":")
    if platform == "cpu":
        if not re.fullmatch(r"[1-9]\d{0,3}", rest) or int(rest) > _MOST_CPU_DEVICES:
            raise QuestionError(
                f"target = {text!r:.60}: cpu: needs the number of devices, 1 to {_MOST_CPU_DEVICES}; such as cpu:8"
            )
        return Target(f"cpu:{rest}", "cpu", int(rest))
    if platform != "tpu":
        if _ALIASES.get(platform, platform) in _GENERATIONS:
            raise QuestionError(f"target = {text!r:.60}: no platform named; did you mean 'tpu:{text.strip():.60}'?")
        hint = "" if platform == "gpu" else nearest(platform, ["cpu", "tpu"])
        raise QuestionError(f"target = {text!r:.60}: unknown platform {platform!r:.20}{hint or f'; {_EXAMPLES}'}")
    generation, _, shape = rest.partition(":")
    generation = _ALIASES.get(generation, generation)
    if generation not in _GENERATIONS:
        hint = nearest(generation, _GENERATIONS) or f"; known: {', '.join(_GENERATIONS)}"
        raise QuestionError(f"target = {text!r:.60}: unknown TPU generation {generation!r:.20}{hint}")
    chip = _GENERATIONS[generation]
    if not shape:
        largest_small = next(s for s in all_slices() if s.chip == chip and s.chips >= 4)
        raise QuestionError(f"target = {text!r:.60}: no slice named; such as tpu:{generation}:{largest_small.shape}")
    try:
        found = find_slice(chip, shape)
    except QuestionError as error:
        raise QuestionError(f"target = {text!r:.60}: {str(error).partition(': ')[2]}") from None
    devices = found.chips * load_chip(chip).devices_per_chip
    return Target(f"tpu:{generation}:{found.shape}", "tpu", devices, generation, found)


def check_libtpu() -> None:
    """TargetError if libtpu, or JAX, is absent or libtpu is not of the version that this JAX was built with."""
    remedy = "install it with: pip install 'moecast[tpu]'"
    if importlib.util.find_spec("jax") is None:
        raise TargetError(f"compiling needs JAX; {remedy}")
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise TargetError(f"compiling for a TPU needs libtpu, the TPU compiler; {remedy}") from None
    required = " ".join(importlib.metadata.requires("jax") or ())
    wanted = re.search(r"libtpu==([\d.]+?)(\.\*)?;", required)
    if wanted and version != wanted[1] and not (wanted[2] and version.startswith(f"{wanted[1]}.")):
        raise TargetError(f"libtpu {version} is not the {wanted[1]}{wanted[2] or ''} that this JAX needs; {remedy}")


def child_environment(target: Target, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that compiles for `target`: as many host devices, no search for accelerators."""
    kept = [flag for flag in environment.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES_FLAG)]
    count = target.devices if target.platform == "cpu" else 1
    return {
        **environment,
        "XLA_FLAGS": " ".join([*kept, f"{_DEVICES_FLAG}={count}"]),
        "JAX_PLATFORMS": "cpu",
        **_LIBTPU,
    }


def run_child(target: Target, arguments: Sequence[str], timeout_s: float) -> int:
    """Run this Python with `arguments` where the target's devices are there; its exit code, its output passed on.

    The number of host devices is fixed when JAX starts, so a process that has started cannot get more. TargetError if
    it takes longer than `timeout_s` seconds; it is then ended.
    """
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(
            command, env=child_environment(target, os.environ), timeout=timeout_s, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        raise TargetError(f"{target.name}: compiling took longer than {timeout_s:g} s, and was ended") from None
