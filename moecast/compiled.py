"""A forecast beside what the compiler made of the same job: bytes, FLOPs, collectives; and which op differs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.results.forecast import Forecast
    from trainer.hlo import CompiledProgram

# The simulator's name of a collective -> XLA's.
KINDS = {
    "all_to_all": "all-to-all",
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "permute": "collective-permute",
    "hop": "collective-permute",
}
# A kind that carries less of the program's bytes is bookkeeping (sums of losses, counts): listed, not scored.
SMALL = 0.01
# How the trainer's reader of programs names loops whose count depends on the tokens (trainer/hlo.py).
LOOP_BY_TOKENS = "loop by tokens"
# An op is named where it differs by more than this of the whole program's FLOPs or bytes.
TELLING = 0.002


@dataclass(frozen=True, slots=True)
class Row:
    """One number of both; `error` is forecast / compiled - 1, None where the compiler's is too small to score."""

    what: str
    forecast: float
    compiled: float
    unit: str
    tolerance: float | None

    @property
    def error(self) -> float | None:
        """Forecast over compiled, less 1."""
        return self.forecast / self.compiled - 1 if self.compiled and self.tolerance is not None else None

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        error, most = self.error, self.tolerance
        return error is None or most is None or abs(error) <= most


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, and the ops that explain the differences."""

    rows: tuple[Row, ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rows": [{**asdict(r), "error": r.error, "holds": r.holds} for r in self.rows],
            "differences": list(self.differences),
        }


def compare(forecast: Forecast, program: CompiledProgram) -> Comparison:
    """The forecast of our own trainer's program beside the compiled one: tolerances are those the docs promise.

    FLOPs within 1 %, bytes of each kind of collective within 5 %, peak memory within 10 %. FLOPs are not scored where
    the program has loops that run as often as tokens ask for.
    """
    told = None if any(name.startswith(LOOP_BY_TOKENS) for name in program.flops.uncounted) else 0.01
    rows = [
        Row("executed FLOPs", forecast.flops.executed_per_device, program.flops.total, "FLOPs", told),
        *_collective_rows(forecast, program),
        *_memory_rows(forecast, program),
    ]
    differences = [] if told else ["FLOPs: of products in loops that run as often as tokens ask for, no program tells"]
    return Comparison(tuple(rows), (*differences, *_by_op(forecast, program)))


def _collective_rows(forecast: Forecast, program: CompiledProgram) -> list[Row]:
    asked = program.bytes_by_kind(asked=True)
    expected: dict[str, float] = defaultdict(float)
    for c in forecast.collectives:
        expected[KINDS[c.kind]] += c.bytes
    # XLA:CPU widens what is not fp32 before it sends it: bytes are compared as values of the job's own format.
    whole = sum(asked.values()) or 1
    out = []
    # XLA:TPU runs wide gathers as all-reduces over zeros (docs/compile.md), and does not always leave a trace of what
    # was asked for: there the two kinds are scored by their sum.
    joined = ("all-gather", "all-reduce") if program.platform == "tpu" else ()
    for kind in sorted(set(asked) | set(expected)):
        there = float(asked.get(kind, 0))
        scored = max(there, expected[kind]) >= SMALL * whole and kind not in joined
        out.append(Row(f"{kind} bytes", expected[kind], there, "bytes", 0.05 if scored else None))
    both = sum(expected[k] for k in joined), float(sum(asked.get(k, 0) for k in joined))
    if max(both) >= SMALL * whole:
        out.append(Row("gathers and all-reduces", *both, "bytes", 0.05))
    return out


def _memory_rows(forecast: Forecast, program: CompiledProgram) -> list[Row]:
    memory = program.memory
    if memory is None:
        return []
    held = memory.allocated_bytes
    arguments = forecast.memory.argument_bytes
    planned = forecast.memory.peak_bytes - forecast.memory.worst.reserve_bytes
    rows = [Row("arguments", arguments, memory.argument_bytes, "bytes", 0.05)]
    if program.platform == "cpu":
        # XLA:CPU's own peak leaves temporaries out (docs/compile.md); what it allocates is listed, not scored: its
        # buffers are not those of a device, reductions have a second one and little is fused.
        rows.append(Row("peak memory (XLA:CPU's)", arguments, memory.peak_bytes, "bytes", 0.10))
        return [*rows, Row("all that is allocated", planned, held, "bytes", None)]
    rows.append(Row("temporaries", planned - arguments, held - memory.argument_bytes, "bytes", None))
    return [*rows, Row("peak memory", planned, held, "bytes", 0.10)]


def _by_op(forecast: Forecast, program: CompiledProgram) -> list[str]:
    """Scopes whose FLOPs or bytes differ by a telling share of the whole, largest first."""
    found: list[tuple[float, str]] = []
    ours: dict[str, float] = defaultdict(float)
    for op in forecast.ops:
        ours[_plain(op.scope)] += op.flops
    theirs = {_plain(k): sum(v.values()) for k, v in program.flops.by_scope.items()}
    unnamed = theirs.pop("", 0)
    total = program.flops.total or 1
    for scope in sorted(set(ours) | set(theirs)):
        gap = ours.get(scope, 0.0) - theirs.get(scope, 0)
        # What XLA:CPU left without a name is somebody's: a scope that only the forecast has may be there.
        if abs(gap) > TELLING * total and not (gap > 0 and gap <= unnamed * 1.001):
            text = f"{scope}: {ours.get(scope, 0.0):.4g} FLOPs forecast, {theirs.get(scope, 0):.4g} compiled"
            found.append((abs(gap) / total, text))
    sent: dict[tuple[str, str], float] = defaultdict(float)
    for c in forecast.collectives:
        sent[KINDS[c.kind], _plain(c.scope)] += c.bytes
    got: dict[tuple[str, str], float] = defaultdict(float)
    for one in program.collectives:
        if len(one.scopes) == 1:
            got[one.asked, _plain(one.scopes[0])] += one.total_bytes
    whole = sum(program.bytes_by_kind(asked=True).values()) or 1
    named = {kind: sum(v for (k, _), v in got.items() if k == kind) for kind, _ in got}
    totals: dict[str, float] = defaultdict(float)
    for (kind, _), size in sent.items():
        totals[kind] += size
    for kind, scope in sorted(set(sent) | set(got)):
        # Names of one collective may differ (a gather's gradient is a reduce-scatter): scopes tell where kinds differ.
        there = program.bytes_by_kind(asked=True).get(kind, 0)
        if abs(totals[kind] - there) <= 0.01 * there:
            continue
        complete = named.get(kind, 0.0) >= 0.999 * program.bytes_by_kind(asked=True).get(kind, 0)
        gap = sent[kind, scope] - got[kind, scope]
        if complete and abs(gap) > TELLING * whole:
            text = f"{scope} ({kind}): {sent[kind, scope]:.4g} bytes forecast, {got[kind, scope]:.4g} compiled"
            found.append((abs(gap) / whole, text))
    return [text for _, text in sorted(found, reverse=True)[:10]]


def _plain(scope: str) -> str:
    """A scope without what tells kinds of layers, or directions, of one name apart."""
    name = scope.partition("[")[0] + scope.partition("]")[2] if "[" in scope else scope
    return name.removesuffix("_backward")
