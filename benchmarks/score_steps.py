"""The interval of an uncalibrated step forecast: `python -m benchmarks.score_steps [TABLE.csv]`.

Quantiles of measured over forecast step time, by kind of chip and of model, over the fully specified published steps,
the first of each repeated configuration, by closed form: what `simulator.analysis.evidence` states. The scores
themselves are `moecast validate TABLE --where spec_level=full --first-per dup_group`.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

from simulator.calibration.published import ChosenRows, read_rows
from simulator.calibration.scores import quantile
from simulator.calibration.validate import validate
from simulator.results.validation import ScoredRow


def chosen_rows(path: Path) -> ChosenRows:
    """Fully specified rows, one of each configuration."""
    return read_rows(path, [("spec_level", "full")], "dup_group")


def groups(rows: tuple[ScoredRow, ...]) -> dict[str, list[float]]:
    """Measured over forecast, by TPU or GPU and kind of model."""
    out: dict[str, list[float]] = collections.defaultdict(list)
    for r in rows:
        chip = "TPU" if r.chip.startswith("tpu") else "GPU"
        for name in ("all", f"{chip} {r.kind}"):
            out[name].append(r.measured / r.forecast)
    return out


def main(path: Path) -> None:
    """Print the quantiles."""
    found = validate([chosen_rows(path)])
    print(f"{'steps':12}{'rows':>5}   measured / forecast p10, p50, p90")
    for name, ratios in sorted(groups(found.scored).items()):
        print(f"{name:12}{len(ratios):5}   {', '.join(f'{quantile(ratios, q):.2f}' for q in (0.1, 0.5, 0.9))}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/measured/train_steps.csv"))
