"""The network model on published collectives, by size and library: `python -m benchmarks.score_collectives TABLE`.

What `moecast validate TABLE` scores as a whole, cut as docs/collectives.md prints it; both hold out the same rows.
TABLE is collectives.csv. Printed, per chip, nodes, library and collective, on rows that no number was fitted on (NCCL
inside a node: sizes of odd powers of two; DeepEP with its SMs stated: even powers of tokens; sources that no profile
names): median and 90th percentile of |forecast/measured - 1| from 1 MiB up and below, the median of forecast/measured
- 1 (bias); then the median on the rows that were fitted on, and a baseline: one constant efficiency of the port without
latency, the median over the fitted half (where there is none: over the same rows, which flatters it). Rows that are no
question to the model are counted with the reason.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hw_profiles import QuestionError, load_chip
from hw_profiles.fitted_rows import rows_used
from simulator.calibration.collective_rows import CollectiveCase, collective_case
from simulator.calibration.published import KINDS
from simulator.calibration.scores import quantile
from simulator.results.measurement import row_hash

LARGE = 2**20


@dataclass(frozen=True, slots=True)
class Scored:
    """One row: its question, whether numbers of the profile were fitted on it, and the forecast."""

    case: CollectiveCase
    fitted: bool
    forecast_s: float

    @property
    def error(self) -> float:
        """forecast/measured - 1."""
        return self.forecast_s / self.case.seconds - 1


@dataclass(frozen=True, slots=True)
class Line:
    """Scores of one group; errors as fractions, NaN (null in JSON) where there are no rows."""

    chip: str
    nodes: int
    library: str
    collective: str
    held_rows: int
    fitted_rows: int
    median_large: float | None
    p90_large: float | None
    bias_large: float | None
    median_small: float | None
    p90_small: float | None
    fitted_median_large: float | None
    baseline_large: float | None


IDENTITY = next(kind.identity for kind in KINDS if kind.name == "collectives")


def is_fitted(row: Mapping[str, str], case: CollectiveCase) -> bool:
    """Whether a number of the profile may rest on the row (hw_profiles/fitted_rows.csv)."""
    return row_hash({name: row[name] for name in IDENTITY}) in rows_used(load_chip(case.chip))


def score(rows: Sequence[Mapping[str, str]]) -> tuple[list[Scored], Counter[str]]:
    """Every row that is a question, scored; the reasons of the others, counted."""
    scored, skipped = [], Counter[str]()
    for row in rows:
        try:
            case = collective_case(row)
            scored.append(Scored(case, is_fitted(row, case), case.forecast_s()))
        except QuestionError as error:
            skipped[str(error)] += 1
    return scored, skipped


def _quantile(values: Sequence[float], q: float) -> float | None:
    found = quantile(values, q)
    return None if found is None else round(found, 4)


def _baseline(group: Sequence[Scored], held: Sequence[Scored]) -> float | None:
    """Median error of bytes x one constant, the constant fitted on the other half (on all, where that is empty)."""
    learn = [s for s in group if s.fitted and s.case.bytes >= LARGE] or [s for s in group if s.case.bytes >= LARGE]
    test = [s for s in held if s.case.bytes >= LARGE]
    if not learn or not test:
        return None
    # The port carries (n-1)/n; the best a single number can do with the same bytes.
    wire = {id(s): s.case.bytes * (s.case.size - 1) / s.case.size for s in group}
    constant = statistics.median(s.case.seconds / wire[id(s)] for s in learn)
    return _quantile([abs(constant * wire[id(s)] / s.case.seconds - 1) for s in test], 0.5)


def summarise(scored: Sequence[Scored], by_library: bool = True) -> list[Line]:
    """One line for each chip, nodes, library (if asked for) and collective."""
    groups: dict[tuple[str, int, str, str], list[Scored]] = defaultdict(list)
    for s in scored:
        c = s.case
        moe = c.kind.startswith("moe_")
        groups[c.chip, c.nodes, c.library if by_library or moe else "NCCL", c.kind].append(s)
    lines = []
    for (chip, nodes, library, kind), group in sorted(groups.items()):
        held = [s for s in group if not s.fitted]
        large = [s.error for s in held if s.case.bytes >= LARGE]
        small = [abs(s.error) for s in held if s.case.bytes < LARGE]
        learnt = [abs(s.error) for s in group if s.fitted and s.case.bytes >= LARGE]
        line = Line(
            chip, nodes, library, kind, len(held), len(group) - len(held),
            _quantile([abs(e) for e in large], 0.5), _quantile([abs(e) for e in large], 0.9), _quantile(large, 0.5),
            _quantile(small, 0.5), _quantile(small, 0.9), _quantile(learnt, 0.5), _baseline(group, held),
        )  # fmt: skip
        lines.append(line)
    return lines


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def table(lines: Sequence[Line]) -> list[str]:
    """The lines as a table in Markdown, errors in percent."""
    out = [
        "| chip | nodes | library | collective | held | fitted | median ≥ 1 MiB | p90 | bias | median < 1 MiB | p90 "
        "| fitted half | baseline |",
        "| --- " * 4 + "| ---: " * 9 + "|",
    ]
    for x in lines:
        numbers = (x.median_large, x.p90_large, x.bias_large, x.median_small, x.p90_small, x.fitted_median_large)
        cells = [x.chip, str(x.nodes), x.library, x.collective, str(x.held_rows), str(x.fitted_rows)]
        out.append("| " + " | ".join([*cells, *map(_percent, numbers), _percent(x.baseline_large)]) + " |")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Read the table, print scores and what was skipped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, help="collectives.csv")
    parser.add_argument("--by-library", action="store_true", help="a line for each NCCL version and source")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    try:
        with args.table.open(newline="", encoding="utf-8") as file:
            scored, skipped = score(list(csv.DictReader(file)))
    except OSError as error:
        print(f"score_collectives: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"score_collectives: {args.table}: the table lacks the column {error}", file=sys.stderr)
        return 2
    lines = summarise(scored, args.by_library)
    if args.json:
        print(json.dumps({"lines": [asdict(x) for x in lines], "skipped": dict(skipped)}, indent=1))
        return 0
    print("Errors in percent, on rows that no number was fitted on (see --help).\n")
    print("\n".join(table(lines)))
    held = [s for s in scored if not s.fitted]
    for name, some in (("from 1 MiB", [s for s in held if s.case.bytes >= LARGE]),
                       ("below 1 MiB", [s for s in held if s.case.bytes < LARGE])):  # fmt: skip
        errors = [abs(s.error) for s in some]
        print(f"\nall {name}: {len(errors)} rows, median {_percent(_quantile(errors, 0.5))} %, p90 "
              f"{_percent(_quantile(errors, 0.9))} %")  # fmt: skip
    print(f"\n{sum(skipped.values())} rows are no question to the model:")
    for reason, count in skipped.most_common():
        print(f"  {count:5d}  {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
