"""What is measured: topologies at link speeds, some to fit on and the others held out; jobs whose steps the links set.

Speeds are such that cables, not the cores that all hosts share, set the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.netlab.plan import HOSTS, Plan, one_switch, ring, two_leaves

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
SIZES = (2**16, 2**18, 2**20, 2**21)
# Pairs tell the start of a collective from its steps, and who is slow.
PAIR_SIZES = (2**16, 2**19)
PAIRS = (2, 1), (2, 2)
SAMPLES = 3
SAMPLE_S = 0.12
STEPS, TRACED = 5, 2
SLOW_HOST, SLOW_MBIT = 2, 50.0
# (hidden, ffn, experts) of the jobs; the last is never fitted on.
MODELS = ((128, 128, 8), (96, 192, 4), (160, 96, 8))


@dataclass(frozen=True)
class Case:
    """A topology with its speeds; whether the fit may see it, and which jobs run on it."""

    plan: Plan
    fitted: bool
    models: tuple[tuple[int, int, int], ...]
    slow: bool = False

    @property
    def name(self) -> str:
        """The plan's."""
        return self.plan.name


CASES = (
    Case(one_switch(100), True, MODELS[:2]),
    Case(one_switch(300), True, MODELS[:2]),
    Case(one_switch(60), False, MODELS[2:]),
    Case(one_switch(200), False, (MODELS[0], MODELS[2])),
    Case(two_leaves(150, 150), False, (MODELS[1], MODELS[2])),
    Case(two_leaves(200, 80), False, (MODELS[0], MODELS[2])),
    Case(ring(100), False, (MODELS[0], MODELS[2])),
    Case(ring(200), False, (MODELS[1], MODELS[2])),
    Case(one_switch(200, {SLOW_HOST: SLOW_MBIT}), False, (MODELS[0], MODELS[2]), slow=True),
)


def job(model: tuple[int, int, int], mbit: float) -> dict[str, Any]:
    """A small mixture over all hosts, one expert group, on cables of `mbit`: 1.3 to 1.6 MB a host in each exchange."""
    hidden, ffn, experts = model
    heads = {"heads": hidden // 32, "kv_heads": hidden // 32, "head_dim": 32}
    moe = {"experts": experts, "top_k": 2, "expert": {"hidden": ffn}}
    return {
        "name": f"h{hidden}-f{ffn}-e{experts}",
        "model": {"preset": "mixtral-8x7b", "vocab": 384, "hidden": hidden,
                  "decoder": {"layers": 2, "attention": heads, "moe": moe}},
        "cluster": {"chip": {"name": "cpu-host", "scale_out.nic_gb_per_s": mbit / 8000}, "devices": HOSTS,
                    "nodes": HOSTS},
        "plan": {"expert": HOSTS},
        "batch": {"sequences": 8 * HOSTS, "length": 128},
        "training": {"precision": "fp32", "capacity": {"factor": 1.25, "basis": "assignments"},
                     "dispatch": {"layout": "slots"}},
        "software": {"stack": "moecast", "overlap": {"gradients": False, "parameters": False}},
    }  # fmt: skip


def collectives(case: Case) -> list[tuple[str, int, int, int, int]]:
    """(kind, size, stride, bytes, repeats) of what is timed: all hosts, and pairs where the fit or the cause asks."""
    slowest = min(c.mbit for c in case.plan.cables) * 1e6 / 8
    out = []
    for kind in KINDS:
        asked = [(HOSTS, 1, size) for size in SIZES]
        if case.fitted:
            asked += [(2, 1, size) for size in PAIR_SIZES]
        for size, stride, bytes_ in asked:
            out.append((kind, size, stride, bytes_, _repeats(bytes_, slowest)))
    if not case.fitted:
        bytes_ = PAIR_SIZES[-1]
        out += [("all_to_all", *pair, bytes_, _repeats(bytes_, slowest)) for pair in PAIRS]
    return out


def _repeats(bytes_: int, slowest: float) -> int:
    return max(1, min(20, int(SAMPLE_S / (2 * bytes_ / slowest + 3e-3))))
