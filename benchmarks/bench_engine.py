"""What a step of DeepSeek-V3 by events costs to simulate, over device counts, and the log-log plot of it.

Three ways: folded; every expert group apart, with four vectors of loads a stage and group; and every group apart with
loads of its own in every microbatch, so that no two all-to-alls are equal (the layers of one pass share theirs). Prints
processor seconds, best of several, events over closed form, and the target; writes the plot (HTML).
Usage: python benchmarks/bench_engine.py [--plot FILE, default engine_cost.html] [--most DEVICES, default 16384]
"""

from __future__ import annotations

import sys
import time
from math import log
from pathlib import Path

from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.job.load import load_job

EXAMPLE = Path(__file__).parents[1] / "examples" / "deepseek-v3.yaml"
DEVICES = (2048, 4096, 8192, 16384)
WAYS = {
    "folded": EventOptions(),
    "groups apart": EventOptions(fold=False),
    "every all-to-all different": EventOptions(fold=False, load_vectors=None),
}
TARGETS_S = {
    ("folded", 2048): 0.5,
    ("every all-to-all different", 2048): 2.0,
    ("folded", 16384): 5.0,
    ("every all-to-all different", 16384): 15.0,
}
# Runs are repeated until they have taken so much time together, or so often: a shared core is slow now and then.
ENOUGH_S, MOST = 10.0, 10


def seconds(devices: int, options: EventOptions) -> tuple[float, float, int]:
    """(best processor seconds, events over closed form, rows of the timeline)."""
    scale = devices // 2048
    job = load_job(EXAMPLE, [f"cluster={{chip: h800, nodes: {devices // 8}}}", f"batch.sequences={15360 * scale}"])
    formula = forecast(job, engine="closed-form")
    taken: list[float] = []
    while len(taken) < MOST and sum(taken) < ENOUGH_S:
        begin = time.process_time()
        result = forecast(job, options=options)
        taken.append(time.process_time() - begin)
    assert result.timeline is not None
    return min(taken), result.step_time_s / formula.step_time_s - 1, len(result.timeline)


def main() -> None:
    """Print the table and draw the plot."""
    most = int(sys.argv[sys.argv.index("--most") + 1]) if "--most" in sys.argv else DEVICES[-1]
    seconds(2048, EventOptions())
    print("DeepSeek-V3, 16 stages, 64-way experts, DualPipe, 120 microbatches, chance routing, shared links")
    print(f"{'':27} {'devices':>8} {'groups':>6} {'processor':>10} {'target':>7} {'over formula':>13} {'rows':>8}")
    points: dict[str, list[tuple[int, float]]] = {}
    for name, options in WAYS.items():
        for devices in (d for d in DEVICES if d <= most):
            cost, difference, rows = seconds(devices, options)
            points.setdefault(name, []).append((devices, cost))
            groups = 1 if options.fold else devices // 16 // 64
            target = TARGETS_S.get((name, devices))
            wanted = "" if target is None else f"{target:.1f} s"
            print(
                f"{name:27} {devices:8} {groups:6} {cost:8.2f} s {wanted:>7} {difference:+13.1%} {rows:8}", flush=True
            )
        (d0, c0), (d1, c1) = points[name][0], points[name][-1]
        if d1 > d0:
            print(f"{name:27} grows with devices to the power of {log(c1 / c0) / log(d1 / d0):.2f}")
    path = Path(sys.argv[sys.argv.index("--plot") + 1] if "--plot" in sys.argv else "engine_cost.html")
    _draw(points, path)
    print(f"plot: {path}")


def _draw(points: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values in points.items():
        figure.add_scatter(x=[x for x, _ in values], y=[y for _, y in values], name=name, mode="lines+markers")
    for (name, devices), target in TARGETS_S.items():
        figure.add_scatter(x=[devices], y=[target], name=f"target, {name}", mode="markers", marker_symbol="x-thin-open")
    figure.update_layout(title="Cost of simulating a DeepSeek-V3 step", template="plotly_white")
    figure.update_xaxes(type="log", title="devices", tickvals=list(DEVICES))
    figure.update_yaxes(type="log", title="processor seconds")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    main()
