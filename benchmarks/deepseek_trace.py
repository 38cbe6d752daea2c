"""The engine's DualPipe chunk pair on H800 beside the one that DeepSeek-AI profiled, class by class.

TRACE is the PyTorch profile of training that deepseek-ai/profile-data publishes (train.json, gzip or plain): a forward
and a backward chunk of four MoE layers each under DualPipe; H800, experts over 64 devices, no tensor parallelism, 4,096
tokens, FP8, balanced routing, no transfer between stages. Nothing is fitted to it.

Usage: python -m benchmarks.deepseek_trace TRACE [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from simulator.analysis.closed_form import closed_form
from simulator.analysis.forecast import forecast
from simulator.calibration.readers.found import Told
from simulator.calibration.readers.read import read_file
from simulator.costs.piece_times import PieceTime
from simulator.job.job import Job
from simulator.job.load import load_job
from simulator.job.rules import resolve
from simulator.kernels.roofline import Kernels
from simulator.results.timeline import KINDS, Timeline
from simulator.workload.habits import habits_of
from simulator.workload.stages import build_workload

LAYERS = 4
# The stages in the middle hold nothing but four MoE layers, so that a pair of theirs is the profile's. Recomputation
# and formats are those of the published run (examples/deepseek-v3.yaml).
JOB: dict[str, Any] = {
    "name": "deepseek-v3-chunk-pair",
    "model": {"preset": "deepseek-v3", "decoder": {"layers": 2 * LAYERS, "moe": {"first_dense": 0}}},
    "cluster": {"chip": "h800", "nodes": 32},
    "plan": {
        "pipeline": 4, "expert": 64, "shard": "optimizer", "schedule": "dualpipe", "stages": "E|tttt|tttt|L",
        "microbatch_sequences": 1,
    },
    "batch": {"sequences": 1024, "length": 4096},
    "training": {
        "precision": "fp8-blockwise", "optimizer": "adamw",
        "dtypes": {"first_moment": "bf16", "second_moment": "bf16", "saved_activations": "fp8"},
        "remat": {"recompute": ["norms", "mla_up_proj", "ffn_activation", "expert_activation"]},
        "dispatch": {"transport": "deepep"}, "routing": {"model": "even"},
    },
    "software": {"stack": "megatron", "overlap": {"all_to_all": True}},
}  # fmt: skip
MIDDLE = 1

_DENSE = ("q_down", "q_up", "kv_down", "kv_up", "output", "router", "shared.up", "shared.down")
# Line -> (classes and passes of the trace, ops of the forecast and which of their times).
# The profile's weight gradients of experts and of the shared expert are one kernel; attention's are dense products.
LINES: dict[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]] = {
    "attention, forward": ((("attention_forward", "forward"),), (("core", "forward"),)),
    "attention, backward": ((("attention_backward", "backward"),), (("core", "backward"),)),
    "grouped products, forward": (
        (("grouped_gemm", "forward"),), (("experts.up", "forward"), ("experts.down", "forward")),
    ),
    "grouped products, inputs' gradients": (
        (("grouped_gemm", "backward"),), (("experts.up", "input"), ("experts.down", "input")),
    ),
    "weight gradients of experts, shared too": (
        (("weight_gradient_gemm", "backward"),),
        tuple((op, "weight") for op in ("experts.up", "experts.down", "shared.up", "shared.down")),
    ),
    "dense products, forward": ((("dense_gemm", "forward"),), tuple((op, "forward") for op in _DENSE)),
    "dense products, backward and again": (
        (("dense_gemm", "backward"),),
        (*((op, "input") for op in _DENSE), *((op, "again") for op in _DENSE),
         *((op, "weight") for op in _DENSE if not op.startswith("shared"))),
    ),
    "casts": ((("cast", "forward"), ("cast", "backward")), (("casts", "all"),)),
    "permutes": ((("permute", "forward"), ("permute", "backward")), (("dispatch", "all"), ("combine", "all"))),
    "norms": ((("norm", "forward"), ("norm", "backward")), (("norm", "all"),)),
    "activations": (
        (("activation", "forward"), ("activation", "backward")),
        (("experts.activation", "all"), ("shared.activation", "all")),
    ),
    "elementwise": ((("elementwise", "forward"), ("elementwise", "backward")), (("residual", "all"),)),
    "transposes and copies": (
        (("layout", "forward"), ("layout", "backward"), ("memory_copy", "forward"), ("memory_copy", "backward")), (),
    ),
    "rotary embedding": ((("rotary", "forward"), ("rotary", "backward")), ()),
    "router but its product": ((("router", "forward"), ("router", "backward")), ()),
}  # fmt: skip
# Line -> (class and pass of the trace, scope and pass of the forecast).
EXCHANGES: dict[str, tuple[tuple[str, str], tuple[str, str] | None]] = {
    "dispatch, forward": (("dispatch", "forward"), ("dispatch_all_to_all", "forward")),
    "combine, forward": (("combine", "forward"), ("combine_all_to_all", "forward")),
    "combine's gradient (a dispatch)": (("dispatch", "backward"), ("combine_all_to_all", "backward")),
    "dispatch's gradient (a combine)": (("combine", "backward"), ("dispatch_all_to_all_backward", "backward")),
}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table, seconds of one pair; None where one side does not have it."""

    name: str
    trace_s: float | None
    forecast_s: float | None

    @property
    def error(self) -> float | None:
        """Forecast over trace, minus one."""
        return self.forecast_s / self.trace_s - 1 if self.trace_s and self.forecast_s is not None else None


def compare(path: Path) -> dict[str, list[Line]]:
    """The lines of compute, communication and the whole pair; QuestionError where `path` is no such profile."""
    found = read_file(path, Told(chip="h800"))
    if found.profile is None:
        raise QuestionError(f"{path}: not a profile")
    seconds: dict[tuple[str, str], float] = {}
    for c in found.profile["classes"]:
        key = (c["class"], c["phase"])
        seconds[key] = seconds.get(key, 0.0) + c["seconds"]
    job = load_job(JOB)
    piece = _layer(job)
    compute = [
        Line(name, sum(seconds.pop(key, 0.0) for key in keys), _forecast_ops(piece, ops) if ops else None)
        for name, (keys, ops) in LINES.items()
    ]
    exchanges = [
        Line(name, seconds.pop(key, 0.0), _forecast_exchange(piece, of) if of else None)
        for name, (key, of) in EXCHANGES.items()
    ]
    waiting = sum(seconds.pop(("exchange_notify", p), 0.0) for p in ("forward", "backward"))
    exchanges.append(Line("exchange of counts, and waiting", waiting, None))
    if left := sum(seconds.values()):
        compute.append(Line("other", left, None))
    [use] = found.profile["devices"]
    pair = forecast_pair(job)
    whole = [
        Line("compute kernels, together", use["compute_s"], pair["compute_s"]),
        Line("communication, together", use["communication_s"], pair["communication_s"]),
        Line("of it exposed", use["exposed_s"], pair["exposed_s"]),
        Line("neither", use["idle_s"], pair["idle_s"]),
        Line("pair, first kernel to last", use["span_s"], pair["pair_s"]),
        Line("pair, the host's profiler step", sum(found.profile["step_s"]), pair["pair_s"]),
    ]
    return {"compute": compute, "communication": exchanges, "pair": whole}


def _layer(job: Job) -> PieceTime:
    """The MoE layer of the job, timed op by op."""
    cluster = resolve_cluster(job.cluster)
    degrees = resolve(job, cluster)
    habits = habits_of(job, cluster.chip.kind, accumulates=degrees.microbatches > 1)
    result = closed_form(job, cluster, degrees, habits, build_workload(job, degrees, habits), Kernels(cluster.chip))
    [piece] = [t for t in result.piece_times if t.piece.is_layer]
    return piece


def _forecast_ops(piece: PieceTime, wanted: Sequence[tuple[str, str]]) -> float:
    """Seconds of ops in all layers; a product's backward is half input and half weight gradient, as in the engine."""
    out = 0.0
    for name, part in wanted:
        own = [o for o in piece.ops if o.scope.partition(".")[2].partition(".")[2] == name]
        if not own:
            raise QuestionError(f"the forecast has no op {name}")
        for o in own:
            out += {
                "forward": o.forward_s, "backward": o.backward_s, "input": o.backward_s / 2,
                "weight": o.backward_s / 2, "again": o.recompute_s,
                "all": o.forward_s + o.backward_s + o.recompute_s,
            }[part]  # fmt: skip
    return LAYERS * out


def _forecast_exchange(piece: PieceTime, wanted: tuple[str, str]) -> float:
    """Seconds of an all-to-all alone on the network, all layers and calls of a pass."""
    [own] = [c for c in piece.comms if c.scope.endswith(f".{wanted[0]}")]
    return LAYERS * float(own.seconds) * (own.forward if wanted[1] == "forward" else own.backward)


def forecast_pair(job: Job) -> dict[str, float]:
    """A forward and a backward pass together, read off the engine's timeline: the median of a middle stage's pairs."""
    timeline = forecast(job).timeline
    assert timeline is not None
    pairs = [_pair(timeline, i) for i in _rows(timeline, "forward and backward")]
    return {key: statistics.median(p[key] for p in pairs) for key in pairs[0]}


def _rows(timeline: Timeline, kind: str) -> list[int]:
    return [
        i for i in range(len(timeline)) if timeline.device[i] == MIDDLE and timeline.kind[i] == KINDS.index(kind)
    ]  # fmt: skip


def _pair(timeline: Timeline, row: int) -> dict[str, float]:
    """A pair's compute, and its all-to-alls: those that begin with it."""
    start, end = float(timeline.start_s[row]), float(timeline.end_s[row])
    own = [i for i in _rows(timeline, "all-to-all") if abs(float(timeline.start_s[i]) - start) < 1e-8]
    until = max(float(timeline.end_s[i]) for i in own)
    last = max(end, until)
    return {
        "compute_s": end - start, "communication_s": until - start, "exposed_s": max(0.0, until - end), "idle_s": 0.0,
        "pair_s": last - start,
    }  # fmt: skip


def text(parts: dict[str, list[Line]]) -> list[str]:
    """The lines as a table in Markdown, milliseconds."""
    out = ["| milliseconds of one pair | profile | forecast | error |", "| --- | ---: | ---: | ---: |"]
    for title, lines in parts.items():
        total = [Line(f"**{title}, added up**", *_totals(lines))] if title != "pair" else []
        for x in (*lines, *total):
            cells = ["" if v is None else f"{1e3 * v:.2f}" for v in (x.trace_s, x.forecast_s)]
            out.append(
                f"| {x.name} | {cells[0]} | {cells[1]} | {'' if x.error is None else f'{100 * x.error:+.0f} %'} |"
            )
    return out


def _totals(lines: Sequence[Line]) -> tuple[float, float]:
    return sum(x.trace_s or 0.0 for x in lines), sum(x.forecast_s or 0.0 for x in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help="the profile, JSON or gzip")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    try:
        parts = compare(args.trace)
    except QuestionError as error:
        print(f"deepseek_trace: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({k: [asdict(x) | {"error": x.error} for x in v] for k, v in parts.items()}, indent=1))
        return 0
    print(
        "DeepSeek-V3, four MoE layers forward and four backward under DualPipe, H800; nothing fitted to this profile\n"
    )
    print("\n".join(text(parts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
