"""Forecast beside published training steps: how wrong uncalibrated forecasts are, and the interval that follows.

Scores the fully specified rows, the first of each repeated configuration, by closed form. The quantiles of measured
over forecast are what `simulator.analysis.evidence` prints as the interval of an uncalibrated forecast; no forecast is
fitted to any of these rows. Usage: python benchmarks/score_steps.py [TABLE.csv] [--rows]
"""

from __future__ import annotations

import collections
import csv
import statistics
import sys
from pathlib import Path

from hw_profiles.errors import QuestionError
from simulator.analysis.forecast import forecast
from simulator.calibration.step_rows import step_job
from simulator.job.load import load_job


def rows_to_score(path: Path) -> list[dict[str, str]]:
    """Fully specified rows with a step time, one of each configuration."""
    seen: set[str] = set()
    out = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["spec_level"] == "full" and row["step_time_s"] and row["dup_group"] not in seen:
                seen.add(row["dup_group"])
                out.append(row)
    return out


def quantile(values: list[float], q: float) -> float:
    """The q-quantile of sorted values, by linear interpolation."""
    at = q * (len(values) - 1)
    low = int(at)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (at - low)


def main(path: Path, show_rows: bool) -> None:
    """Print the scores by kind of chip and model."""
    groups: dict[str, list[float]] = collections.defaultdict(list)
    reasons: collections.Counter[str] = collections.Counter()
    for row in rows_to_score(path):
        try:
            answer = forecast(load_job(step_job(row)), engine="closed-form")
        except QuestionError as error:
            reasons[str(error).partition(": ")[2]] += 1
            continue
        measured = float(row["step_time_s"])
        ratio = measured / answer.step_time_s
        kind = "TPU" if row["hardware"].startswith("TPU") else "GPU"
        for name in ("all", f"{kind} {row['kind']}", row["hardware"]):
            groups[name].append(ratio)
        if show_rows:
            print(
                f"{row['id']:9} {row['model'][:24]:25}{row['hardware'][:12]:13}{measured:9.3f} s"
                f" {answer.step_time_s:9.3f} s {1 / ratio - 1:+.0%}"
            )
    print(f"{'rows':26}{'n':>5}{'median |error|':>16}{'bias':>8}   measured/forecast p10, p50, p90")
    for name, ratios in sorted(groups.items()):
        ratios.sort()
        errors = [1 / r - 1 for r in ratios]
        spread = ", ".join(f"{quantile(ratios, q):.2f}" for q in (0.1, 0.5, 0.9))
        error, bias = statistics.median(map(abs, errors)), statistics.median(errors)
        print(f"{name:26}{len(ratios):5}{error:16.1%}{bias:+8.1%}   {spread}")
    for reason, n in reasons.most_common():
        print(f"not scored, {n}: {reason}")


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    main(Path(words[0] if words else "../shared/measured/train_steps.csv"), "--rows" in sys.argv)
