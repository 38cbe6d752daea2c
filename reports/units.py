"""Numbers as people read them: three significant digits and a unit, from SI values.

Every function takes seconds, bytes, FLOPs or dollars and returns text. Memory is binary (GiB), as allocators report
it; traffic is decimal (GB), as link rates are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_COUNT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1.0, ""))
_BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_TIME = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
# Steps of some minutes are compared with steps of seconds, so minutes, hours and days begin late.
_TIME_FROM = {"days": 3 * 86400.0, "h": 3 * 3600.0, "min": 600.0}

UNKNOWN = "n/a"


def rounded(value: float, digits: int = 3) -> float:
    """`value` to `digits` significant digits; NaN and infinity pass."""
    if not math.isfinite(value):
        return value
    return float(f"{value:.{digits - 1}e}")


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, thousands grouped, never an exponent: 0.0123, 12.3, 1,234."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded(value, digits))))
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _pick(value: float, scales: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest scale that leaves the rounded value at 1 or more, else the smallest."""
    size = abs(rounded(value))
    return next(((factor, unit) for factor, unit in scales if size >= factor), scales[-1])


def _scaled(value: float, scales: Sequence[tuple[float, str]], suffix: str = "") -> str:
    if not math.isfinite(value):
        return UNKNOWN
    factor, unit = _pick(value, scales) if value else (1.0, "")
    return f"{significant(value / factor)} {unit}{suffix}".rstrip()


def time_scale(largest_s: float) -> tuple[float, str]:
    """Seconds per unit and the unit in which `largest_s` reads well; zero reads in seconds."""
    if not math.isfinite(largest_s) or largest_s == 0:
        return 1.0, "s"
    return _pick(largest_s, [(f, u) for f, u in _TIME if abs(largest_s) >= _TIME_FROM.get(u, 0.0)])


def seconds(value_s: float) -> str:
    """A duration: 1.23 s, 45.6 ms, 7.89 µs."""
    if not math.isfinite(value_s):
        return UNKNOWN
    factor, unit = time_scale(value_s)
    return f"{significant(value_s / factor)} {unit}"


def seconds_range(low_s: float, high_s: float) -> str:
    """An interval in one unit: 1.10 to 1.40 s; one number where both ends read the same."""
    if not (math.isfinite(low_s) and math.isfinite(high_s)):
        return UNKNOWN
    factor, unit = time_scale(high_s)
    low, high = significant(low_s / factor), significant(high_s / factor)
    return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"


def memory_scale(largest_bytes: float) -> tuple[float, str]:
    """Bytes per unit and the binary unit in which `largest_bytes` reads well."""
    return _pick(largest_bytes, _BINARY) if math.isfinite(largest_bytes) else (2.0**30, "GiB")


def memory(value_bytes: float) -> str:
    """Memory in binary units: 14.1 GiB."""
    return _scaled(value_bytes, _BINARY) if value_bytes else "0 B"


def memory_of(used_bytes: float, capacity_bytes: float) -> str:
    """Use against capacity, in the capacity's unit unless tiny: 14.1 of 16.0 GiB."""
    factor, unit = memory_scale(capacity_bytes)
    if used_bytes < 0.01 * capacity_bytes:
        return f"{memory(used_bytes)} of {memory(capacity_bytes)}"
    return f"{significant(used_bytes / factor)} of {significant(capacity_bytes / factor)} {unit}"


def traffic(value_bytes: float) -> str:
    """Bytes on a link in decimal units: 12.3 GB."""
    return _scaled(value_bytes, _SI, "B") if value_bytes else "0 B"


def flops(value_flops: float) -> str:
    """Work: 1.23 PFLOP."""
    return _scaled(value_flops, _SI, "FLOP") if value_flops else "0 FLOP"


def flops_rate(value_flops_per_s: float) -> str:
    """Speed of work: 989 TFLOP/s."""
    return f"{flops(value_flops_per_s)}/s"


def count(value: float) -> str:
    """Parameters, tokens, repetitions: 512, 98,304, 26.3 M, 1.57 T; thousands are written out."""
    if math.isfinite(value) and abs(value) < 1e6:
        return significant(value) if value != int(value) else f"{int(value):,}"
    return _scaled(value, _COUNT)


def rate(value_per_s: float, unit: str) -> str:
    """So many per second: 1,664 sequences/s, 1.04 M tokens/s."""
    if not math.isfinite(value_per_s):
        return UNKNOWN
    text = significant(value_per_s) if abs(value_per_s) < 1e6 else _scaled(value_per_s, _COUNT)
    return f"{text} {unit}/s"


def percent(fraction: float) -> str:
    """A share: 41.2 %, 0.05 %; what is there but tiny is `< 0.01 %`."""
    if not math.isfinite(fraction):
        return UNKNOWN
    if fraction == 0:
        return "0 %"
    if abs(fraction) < 1e-4:
        return "< 0.01 %"
    return f"{100 * fraction:,.2f} %" if abs(fraction) < 0.00095 else f"{100 * fraction:,.1f} %"


def dollars(value_usd: float) -> str:
    """Money: $0.0123, $4.56, $78.90, $1,235, $2.35 M."""
    if not math.isfinite(value_usd):
        return UNKNOWN
    if abs(value_usd) >= 1e6:
        return f"${_scaled(value_usd, _COUNT)}"
    if abs(value_usd) >= 999.5:
        return f"${value_usd:,.0f}"
    return f"${value_usd:,.2f}" if abs(value_usd) >= 1 or value_usd == 0 else f"${significant(value_usd)}"


def share(part: float, whole: float) -> float:
    """`part / whole`, 0 where there is no whole."""
    return part / whole if whole else 0.0
