"""Which rows of the published tables the shipped profiles rest on: `python -m benchmarks.fitted_rows DIRECTORY`.

Writes hw_profiles/fitted_rows.csv (or FILE with -o) from the very selections of `fit_profiles` and `fit_links`, and the
pages that profiles quote. `moecast validate` refuses these rows unless told. A number may rest on a row where
- a fit used it: kernels; NCCL inside a node, sizes of even powers of two; DeepEP with its SMs stated, odd powers of
  tokens; large all-reduces in the switch; one sweep between nodes;
- a profile quotes the page: H800's DeepEP rows, sweeps over nodes, kernels of TPU and AMD chips, host links, V100 and
  TPU v5e collectives;
- it is one of the steps from which the interval of uncalibrated steps was read.
The latency of a ring step was fitted on all sizes, but protocols count in it and were fitted after: it cancels.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.fit_efficiencies import switch_rows
from benchmarks.fit_links import CHIPS_FITTED, PROTOCOLS, between_rows, protocol_rows, transport_rows
from benchmarks.fit_profiles import ChipFit
from benchmarks.fit_tables import CHIPS, Row, read_rows
from benchmarks.score_steps import chosen_rows
from hw_profiles import QuestionError, chip_names, load_chip
from hw_profiles.files import write_whole
from hw_profiles.fitted_rows import FILE, INTERVAL
from simulator.calibration import published
from simulator.calibration.collective_rows import CollectiveCase, collective_case
from simulator.calibration.kernel_rows import CHIPS as KERNEL_CHIPS
from simulator.calibration.questions import Question
from simulator.results.measurement import row_hash

LARGE = 2**20
# What the profiles' numbers were read from, beyond the fits: (chip, begin of the source's key).
READ = {("h800", "deepep_v1"), ("b200", "stas_b200"), ("h200", "stas_p5en"), ("h200", "aws_p5en"), ("a100-80", "iss_")}
# Whose kernels and collectives were read by eye, so that every row of theirs counts as read.
READ_KERNELS = ("mi300x", "mi355x", "tpu-v6e", "tpu7x")
READ_COLLECTIVES = ("v100", "tpu-v5e")

Uses = dict[tuple[str, str], str]


def is_read(row: Mapping[str, str], case: CollectiveCase) -> bool:
    """Whether a page that a profile quotes holds the row."""
    if case.kind.startswith("moe_"):
        return (case.chip, row["source_key"]) in READ
    if case.nodes == 1 and case.chip in CHIPS_FITTED:
        return False
    if case.chip == "b200" and case.nodes > 1:
        return (case.bytes >= LARGE and math.floor(math.log2(case.bytes)) % 2 == 0) or case.bytes > 2**32
    return case.chip in READ_COLLECTIVES or any(
        case.chip == chip and row["source_key"].startswith(words) for chip, words in READ
    )


def kernel_uses(rows: Sequence[Row]) -> Uses:
    """(chip, row's hash) of every kernel row behind a number, and for what."""
    out: Uses = {}
    for name in sorted(set(CHIPS.values())):
        fit = ChipFit(load_chip(name), rows)
        fit.grouped()
        for use, used in fit.used.items():
            _add(out, name, "kernels", used, use)
    for r in rows:
        chip = KERNEL_CHIPS.get(r["chip"])
        if chip in READ_KERNELS or (chip is not None and r["kind"].startswith("nvbandwidth_") and "host" in r["kind"]):
            _add(out, chip, "kernels", [r], "quoted")
    return out


def collective_uses(rows: Sequence[Row]) -> Uses:
    """(chip, row's hash) of every collective row behind a number, and for what."""
    out: Uses = {}
    for name in CHIPS_FITTED:
        chip = load_chip(name)
        for protocol in PROTOCOLS:
            used = protocol_rows(chip, rows, protocol)
            if len(used) >= 8:
                _add(out, name, "collectives", used, f"protocols of {protocol.replace('_', ' ')}")
        _add(out, name, "collectives", between_rows(chip, rows), "step between nodes")
        _add(out, name, "collectives", [r for r, _ in transport_rows(chip, rows)], "DeepEP")
        _add(out, name, "collectives", switch_rows(chip, rows), "reduction in the switch")
    for r in rows:
        try:
            case = collective_case(r)
        except QuestionError:
            continue
        if is_read(r, case):
            _add(out, case.chip, "collectives", [r], "quoted")
    return out


def step_uses(path: Path) -> Uses:
    """(chip, row's hash) of the steps that the interval of uncalibrated forecasts was read from."""
    return {
        (found.chip, entry.hash): INTERVAL
        for entry in chosen_rows(path).entries
        for found in entry.found
        if isinstance(found, Question)
    }


def _add(out: Uses, chip: str, table: str, rows: Sequence[Row], use: str) -> None:
    identity = next(kind.identity for kind in published.KINDS if kind.name == table)
    for r in rows:
        out.setdefault((chip, row_hash({c: r[c] for c in identity})), use)


def text(directory: Path) -> str:
    """The list as CSV, sorted."""
    uses = {
        **kernel_uses(read_rows(directory / "kernels.csv")),
        **collective_uses(read_rows(directory / "collectives.csv")),
        **step_uses(directory / "train_steps.csv"),
    }
    assert {chip for chip, _ in uses} <= set(chip_names())
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("chip", "row_sha256", "used_for"))
    writer.writerows(sorted((chip, row, use) for (chip, row), use in uses.items()))
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder with kernels.csv, collectives.csv and train_steps.csv")
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="the file to write")
    args = parser.parse_args(argv)
    try:
        write_whole(args.output, text(args.directory).encode())
    except (OSError, QuestionError) as error:
        print(f"fitted_rows: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
