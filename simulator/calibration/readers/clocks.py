"""Whether the devices of one trace tell the same time: what they did together must overlap."""

from __future__ import annotations

from collections import defaultdict

from hw_profiles.errors import QuestionError
from simulator.calibration.readers.profile import Kernel, Profile


def check_clocks(profile: Profile, start: str) -> None:
    """QuestionError, naming devices, kernel and gap, where the clocks of two devices are apart.

    Two rules: the devices of a trace were at work at the same time; and the n-th collective of a process group, being
    one and the same on each of its devices, ends nowhere before it has begun everywhere.
    """
    by_device: dict[int, list[Kernel]] = defaultdict(list)
    for k in profile.kernels:
        by_device[k.device].append(k)
    if len(by_device) < 2:
        return
    spans = {d: (min(k.start for k in ks), max(k.end for k in ks)) for d, ks in by_device.items()}
    first = min(spans, key=lambda d: (spans[d][1], d))
    last = max(spans, key=lambda d: (spans[d][0], -d))
    gap = spans[last][0] - spans[first][1]
    if gap > 0:
        rule = f"device {first} ends {gap / 1e3:,.0f} us before device {last} begins: their clocks are apart"
        raise QuestionError(f"{start}: {rule} (--clocks-apart takes each device for itself)")
    for name, devices in _matched(by_device).items():
        if len({len(own) for own in devices.values()}) != 1:
            # Some were not recorded: the n-th of one device need not be that of another.
            continue
        _check_collective(name, devices, start)


def _matched(by_device: dict[int, list[Kernel]]) -> dict[str, dict[int, list[Kernel]]]:
    out: dict[str, dict[int, list[Kernel]]] = defaultdict(lambda: defaultdict(list))
    for device, kernels in by_device.items():
        for k in kernels:
            if k.matched:
                out[k.matched][device].append(k)
    return out


def _check_collective(name: str, devices: dict[int, list[Kernel]], start: str) -> None:
    numbers = sorted(devices)
    for i, calls in enumerate(zip(*(devices[d] for d in numbers), strict=True)):
        ended = min(range(len(calls)), key=lambda j: calls[j].end)
        began = max(range(len(calls)), key=lambda j: calls[j].start)
        gap = calls[began].start - calls[ended].end
        if gap > 0:
            rule = (
                f"{name}, call {i}, ends on device {numbers[ended]} {gap / 1e3:,.0f} us before it starts on device"
                f" {numbers[began]}: their clocks are apart"
            )
            raise QuestionError(f"{start}: {rule} (--clocks-apart takes each device for itself)")
