"""A profile, whoever wrote it: kernels on devices and streams, the steps they belong to, and sums over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from simulator.calibration.readers.intervals import Span, length, shared, union
from simulator.calibration.readers.kernel_classes import COMMUNICATION, OTHER


@dataclass(slots=True)
class Kernel:
    """One piece of work on a stream of a device, nanoseconds on the profile's clock.

    `matched` tells a collective apart from others of its name (its process group), where the profile says so: the n-th
    of one kind is then the same collective on every device. `bytes`, `group_size` and `dtype` are a collective's.
    """

    name: str
    device: int
    stream: str
    start: int
    end: int
    kind: str
    phase: str = ""
    region: str = ""
    step: int = 0
    matched: str = ""
    bytes: int | None = None
    group_size: int = 1
    dtype: str = ""

    @property
    def is_communication(self) -> bool:
        """Whether it moves data between devices, or waits for them."""
        return self.kind in COMMUNICATION


@dataclass(slots=True)
class Profile:
    """Kernels in order of their start; `steps` the steps' intervals (none: all of the profile is one step)."""

    kernels: list[Kernel]
    steps: list[Span] = field(default_factory=list)
    software: str = ""
    date: str = ""
    chips: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def step_count(self) -> int:
        """Steps that the sums of kernels are divided over."""
        return max(1, len(self.steps))

    @property
    def devices(self) -> list[int]:
        """The devices that have kernels, sorted."""
        return sorted({k.device for k in self.kernels})


@dataclass(frozen=True, slots=True)
class Use:
    """What a device did, nanoseconds: unions over its streams, so that kernels side by side count once.

    `hidden` is communication with compute beside it, `exposed` the rest of it; `span` runs from the first kernel's
    start to the last one's end, `idle` is what no kernel covers of it.
    """

    device: int
    span: int
    compute: int
    communication: int
    hidden: int
    exposed: int
    idle: int


def uses(kernels: Sequence[Kernel]) -> list[Use]:
    """How each device used its time."""
    out = []
    for device in sorted({k.device for k in kernels}):
        own = [k for k in kernels if k.device == device]
        compute = union((k.start, k.end) for k in own if not k.is_communication)
        moved = union((k.start, k.end) for k in own if k.is_communication)
        both = shared(compute, moved)
        span = max(k.end for k in own) - min(k.start for k in own)
        busy = length(compute) + length(moved) - both
        hidden, whole = both, length(moved)
        out.append(Use(device, span, length(compute), whole, hidden, whole - hidden, span - busy))
    return out


@dataclass(frozen=True, slots=True)
class ClassSum:
    """All kernels of one class and pass on one device: nanoseconds of each step, and how many kernels there were."""

    kind: str
    phase: str
    device: int
    per_step: tuple[int, ...]
    calls: int

    @property
    def total(self) -> int:
        """Nanoseconds of all steps."""
        return sum(self.per_step)


def sums(profile: Profile) -> list[ClassSum]:
    """Sums by class, pass and device, the dearest first."""
    found: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0] * profile.step_count)
    calls: dict[tuple[str, str, int], int] = defaultdict(int)
    for k in profile.kernels:
        key = (k.kind, k.phase, k.device)
        found[key][k.step] += k.end - k.start
        calls[key] += 1
    made = [ClassSum(*key, tuple(values), calls[key]) for key, values in found.items()]
    return sorted(made, key=lambda s: (-s.total, s.kind, s.phase, s.device))


def classed_share(kernels: Iterable[Kernel]) -> float:
    """The share of kernel time that has a class; 1 where no kernel takes any."""
    known = total = 0
    for k in kernels:
        total += k.end - k.start
        known += 0 if k.kind == OTHER else k.end - k.start
    return known / total if total else 1.0


def unclassed(kernels: Iterable[Kernel], most: int = 5) -> list[tuple[str, int]]:
    """Names of kernels without a class and their nanoseconds, the dearest first."""
    found: dict[str, int] = defaultdict(int)
    for k in kernels:
        if k.kind == OTHER:
            found[k.name] += k.end - k.start
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))[:most]
