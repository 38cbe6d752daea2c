"""The result on a terminal: errors by case and kind, before and after, and who is named as slow."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.netlab.forecasts import Score
from reports import units


def show(
    notes: Sequence[str], scored: Sequence[Score], causes: Sequence[tuple[str, int | None, float, str, float]], s: float
) -> None:
    """Print all tables, at most 80 columns wide."""
    console = Console(width=min(100, Console().width))
    for note in notes:
        console.print(note, highlight=False)
    console.print(_rows(scored), _by_kind(scored), _causes(causes))
    console.print(f"{s:.0f} s in all", highlight=False)


def summary(scored: Sequence[Score]) -> dict[str, tuple[int, float, float]]:
    """Rows and median absolute error before and after, by kind of row."""
    groups: dict[str, list[Score]] = {}
    for x in scored:
        groups.setdefault(x.what.partition(" ")[0], []).append(x)
    return {
        kind: (len(own), median(abs(x.error_before) for x in own), median(abs(x.error_after) for x in own))
        for kind, own in groups.items()
    }


def _table(title: str, *columns: str, text: int = 2) -> Table:
    out = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i < text else "right", no_wrap=True)
    return out


def _rows(scored: Sequence[Score]) -> Table:
    """A line for each case and kind: the rows' median error with its sign, and of a step its times."""
    out = _table("Held out: median error", "case", "what", "rows", "measured", "forecast", "before", "after")
    groups: dict[tuple[str, str], list[Score]] = {}
    for x in scored:
        groups.setdefault((x.case, x.what), []).append(x)
    last = ""
    for (case, what), own in groups.items():
        one = own[0] if len(own) == 1 else None
        out.add_row(
            case if case != last else "", what, str(len(own)),
            units.seconds(one.measured_s) if one else "", units.seconds(one.after_s) if one else "",
            f"{median(x.error_before for x in own):+.0%}", f"{median(x.error_after for x in own):+.0%}",
        )  # fmt: skip
        last = case
    return out


def _by_kind(scored: Sequence[Score]) -> Table:
    out = _table("Median absolute error, held out", "kind", "rows", "before", "after", text=1)
    for kind, (count, before, after) in summary(scored).items():
        out.add_row(kind, str(count), f"{before:.1%}", f"{after:.1%}")
    return out


def _causes(causes: Sequence[tuple[str, int | None, float, str, float]]) -> Table:
    out = _table("Who is slow", "case", "slow host", "times median", "busiest link (forecast)", "busy", text=2)
    for case, named, ratio, link, busy in causes:
        out.add_row(case, "none" if named is None else f"h{named}", f"{ratio:.2f}", link, f"{busy:.0%}")
    return out
