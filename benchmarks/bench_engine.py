"""What a step of DeepSeek-V3 by events costs to simulate, folded and with every expert group apart, over device counts.

Prints what is simulated, seconds, events over closed form, and the closed form's own time of the same run as baseline;
`--plot FILE.html` draws cost against devices, logarithmic axes. Usage: python benchmarks/bench_engine.py [--plot FILE]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job

EXAMPLE = Path(__file__).parents[1] / "examples" / "deepseek-v3.yaml"
DEVICES = (2048, 4096, 8192, 16384)


def seconds(devices: int, fold: bool) -> tuple[float, float, float, int]:
    """(seconds by events, seconds by closed form, events over closed form, rows of the timeline)."""
    scale = devices // 2048
    job = load_job(EXAMPLE, [f"cluster={{chip: h800, nodes: {devices // 8}}}", f"batch.sequences={15360 * scale}"])
    begin = time.perf_counter()
    formula = forecast(job, engine="closed-form")
    middle = time.perf_counter()
    result = forecast(job, options=EventOptions(fold=fold))
    end = time.perf_counter()
    assert result.timeline is not None
    return end - middle, middle - begin, result.step_time_s / formula.step_time_s - 1, len(result.timeline)


def main() -> None:
    """Print the table, and draw the plot if asked."""
    seconds(2048, True)
    print("DeepSeek-V3, 16 stages, 64-way experts, DualPipe, 120 microbatches, chance routing, shared links")
    print(f"{'devices':>8} {'groups':>8} {'events':>9} {'closed form':>12} {'ratio':>7} {'difference':>11} {'rows':>8}")
    points: dict[str, list[tuple[int, float]]] = {"folded": [], "every group apart": []}
    for name, fold in (("folded", True), ("every group apart", False)):
        for devices in DEVICES:
            by_events, by_formula, difference, rows = seconds(devices, fold)
            points[name].append((devices, by_events))
            groups = 1 if fold else devices // 16 // 64
            print(
                f"{devices:8} {groups:8} {by_events:7.2f} s {by_formula * 1e3:9.1f} ms {by_events / by_formula:6.0f}x"
                f" {difference:+11.1%} {rows:8}"
            )
    if "--plot" in sys.argv:
        _draw(points, Path(sys.argv[sys.argv.index("--plot") + 1]))


def _draw(points: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values in points.items():
        figure.add_scatter(x=[x for x, _ in values], y=[y for _, y in values], name=name, mode="lines+markers")
    figure.update_layout(title="Cost of simulating a DeepSeek-V3 step", xaxis_title="devices", yaxis_title="seconds")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    figure.write_html(path)


if __name__ == "__main__":
    main()
