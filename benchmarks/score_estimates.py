"""The compiler's estimates beside published TPU measurements: `python -m benchmarks.score_estimates [DIR] [--rows]`.

DIR (../shared/measured) holds `kernels.csv` and `train_steps.csv`. Three profiles of each chip are scored, as `moecast
validate` does: its data sheet (all of the peaks reached), the shipped one, and that of `cluster: {curves: compiler}`.
No profile was fitted to a step; the shipped curves and memory shares of v6e and 7x were fitted to these kernels.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.score_steps import chosen_rows
from hw_profiles import Chip, QuestionError, load_chip
from hw_profiles.estimates import estimate_names, with_estimates
from simulator.calibration.published import ChosenRows, read_rows
from simulator.calibration.validate import Options, validate
from simulator.results.validation import ScoredRow

PROFILES = ("data sheet", "shipped", "compiler")


def as_profile(chip: Chip, profile: str) -> Chip:
    """`chip` by its data sheet, as shipped, or as its compiler expects it."""
    if profile == "compiler":
        return with_estimates(chip)
    if profile == "shipped":
        return chip
    e = chip.efficiency
    whole = {name: curve.model_copy(update={"points": ((1.0, 1.0),)}) for name, curve in e.matmul.items()}
    full = e.memory.model_copy(update={"value": 1.0})
    return chip.model_copy(update={"efficiency": e.model_copy(update={"matmul": whole, "memory": full})})


def scored(tables: list[ChosenRows], chip: Chip) -> list[tuple[ScoredRow, ...]]:
    """Each row of `chip` by every profile; empty where no row is of it."""
    try:
        each = [
            validate(tables, Options(chip=as_profile(chip, name), profile=name, allow_fitted=True)).scored
            for name in PROFILES
        ]
    except QuestionError:
        return []
    return list(zip(*each, strict=True))


def group(row: ScoredRow) -> str:
    return "steps" if row.table == "train_steps" else f"kernels: {row.op_class}"


def main(folder: Path, show: bool) -> None:
    """Print median absolute error and bias of every group and profile."""
    tables = [read_rows(folder / "kernels.csv", [], None), chosen_rows(folder / "train_steps.csv")]
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for name in estimate_names():
        rows = scored(tables, load_chip(name))
        if not rows:
            print(f"{name}: no row")
        for row in rows:
            errors = tuple(r.error for r in row)
            found[group(row[0])].append(errors)
            found[f"{group(row[0])}, {name}"].append(errors)
            if show:
                what = f"{name:8} {row[0].id:10} {row[0].op_class or row[0].model}"
                print(f"{what:40.40}" + "".join(f"{e:+11.0%}" for e in errors))
    print(f"{'median |error|, bias':36}{'rows':>4}" + "".join(f"{n:>17}" for n in PROFILES))
    for name in sorted(found):
        columns = list(zip(*found[name], strict=True))
        cells = "".join(f"{median(map(abs, c)):9.1%},{median(c):+7.1%}" for c in columns)
        print(f"{name:36}{len(found[name]):4}{cells}")


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    main(Path(words[0] if words else "../shared/measured"), "--rows" in sys.argv)
