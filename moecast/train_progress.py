"""A run on a terminal: a progress bar while it goes, and at the end a table of what came of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reports import units
from trainer.report import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.data import Entropies
    from trainer.report import Result


class TrainProgress(Progress):
    """Progress on standard error: a bar on a terminal, else a line every `log_every` steps."""

    def __init__(self, log_every: int) -> None:
        self._every = log_every
        self._total = 0
        self._step_s: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def begin(self, done: int, total: int, entropies: Entropies) -> None:
        """Show the marks against which the loss is read, and the bar."""
        self._total = total
        e = entropies
        self.say(f"entropies of the text: unigram {e.unigram_nats:.4f}, bigram {e.bigram_nats:.4f} nats per target")
        if done:
            self.say(f"goes on after step {done}")
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        said = TextColumn("{task.description}", markup=False)
        self._bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=12), said, TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step, with the speed of the last ones: single steps are looked at in pairs."""
        seconds = record["seconds"]
        self._step_s = seconds if self._step_s is None or record["step"] < 3 else 0.9 * self._step_s + 0.1 * seconds
        record = {**record, "tokens_per_s": record["tokens_per_s"] * seconds / self._step_s}
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=words(record, " "))
        elif record["step"] % self._every == 0 or record["step"] in (1, self._total) or "held_out_nats" in record:
            print(f"step {record['step']}/{self._total}  {words(record, '  ')}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        line = "".join(c if c.isprintable() else " " for c in text)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def words(record: Mapping[str, Any], space: str) -> str:
    """A step in a few words."""
    parts = [f"loss {record['nats']:.4f}"]
    if "held_out_nats" in record:
        parts.append(f"held out {record['held_out_nats']:.4f}")
    if "dropped" in record:
        parts += [f"drop {record['dropped']:.1%}", f"load {record['load']:.2f}"]
    parts.append(units.rate(record["tokens_per_s"], "tok"))
    return space.join(parts)


def result_table(result: Result) -> Table:
    """What came of a run: loss against the text's entropies, drops, balance, speed, where it was written."""
    from rich.table import Table
    from rich.text import Text

    r = result
    over = f" in {r.processes} processes" if r.processes > 1 else ""
    rows: list[tuple[str, str, str]] = [("loss", f"{r.nats:.4f} nats", _against(r.nats, r))]
    if r.held_out_nats is not None:
        rows.append(("held out", f"{r.held_out_nats:.4f} nats", _against(r.held_out_nats, r)))
    rows.append(("text", f"{r.unigram_nats:.4f} nats", f"unigram entropy; bigram {r.bigram_nats:.4f}"))
    if r.dropped is not None and r.load is not None and r.rank_load is not None:
        rows.append(("dropped", units.percent(r.dropped), "of the assignments"))
        balance = f"balance loss {r.balance:.3f} (1 is even)" if r.balance is not None else ""
        rows.append(("load", f"{r.load:.2f} x", f"busiest expert over the mean, rank {r.rank_load:.2f} x; {balance}"))
    if r.tokens_per_s is not None and r.step_s is not None:
        rows.append(("speed", units.rate(r.tokens_per_s, "tok"), f"{units.seconds(r.step_s)} a step (median)"))
    where = f"{r.devices} {r.platform} device{'s' if r.devices > 1 else ''}{over}"
    rows.append(("devices", where, f"compiled in {units.seconds(r.compile_s)}" if r.compile_s else ""))
    began = f", resumed after {r.resumed_from}" if r.resumed_from is not None else ""
    rows.append(("steps", f"{r.steps:,}", f"checkpoint of step {r.checkpoint}{began}"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text("run", "bold"), Text(_plain(r.job), "bold"), Text(""))
    for name, value, remark in rows:
        table.add_row(Text(name), Text(value, "bold"), Text(remark, "dim"))
    outer = Table.grid()
    outer.add_column(overflow="fold")
    outer.add_row(table)
    outer.add_row(Text(f"written to {_plain(r.out)}: metrics.jsonl, routing.parquet, router.parquet, tensorboard"))
    return outer


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _against(nats: float, r: Result) -> str:
    """Where a loss stands between the entropies."""
    below = [name for name, mark in (("unigram", r.unigram_nats), ("bigram", r.bigram_nats)) if nats < mark]
    return f"below the text's {' and '.join(below)} entropy" if below else "above the text's unigram entropy"
