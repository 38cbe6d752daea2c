"""Switch-Base over T5-Base in examples per second, beside the paper (arXiv:2101.03961, table 1).

Frozen choices: the jobs of examples/, capacity factors 1.0, 1.25 and 2.0, groups of 8,192 tokens as in the authors' T5X
configuration; Mesh-TensorFlow's own default of 1,024 stands beside it, since the paper does not print its group size
and one-hot dispatch costs 2 E C D FLOPs a token, proportional to it. Nothing is fitted. Usage: python benchmarks/...
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from simulator.analysis.forecast import forecast
from simulator.job.load import load_job

EXAMPLES = Path(__file__).parents[1] / "examples"
PAPER = {1.0: 0.625, 1.25: 0.569, 2.0: 0.537}


def ratio(factor: float, group: int) -> float:
    """Forecast of Switch-Base's examples per second over T5-Base's."""
    change = [f"training.capacity.factor={factor}", f"training.capacity.group_tokens={group}"]
    sparse = forecast(load_job(EXAMPLES / "switch-base-128.yaml", change), engine="closed-form")
    dense = forecast(load_job(EXAMPLES / "t5-base.yaml"), engine="closed-form")
    return sparse.sequences_per_s / dense.sequences_per_s


def main() -> None:
    """Print the table."""
    table = Table(title="Switch-Base / T5-Base, examples per second, 32 TPU v3 cores")
    for name in ("capacity factor", "paper", "forecast, groups of 8192", "error", "forecast, groups of 1024", "error"):
        table.add_column(name, justify="right")
    for factor, paper in PAPER.items():
        cells = [f"{factor:g}", f"{paper:.3f}"]
        for group in (8192, 1024):
            ours = ratio(factor, group)
            cells += [f"{ours:.3f}", f"{ours / paper - 1:+.1%}"]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
