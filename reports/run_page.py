"""What a training run wrote, as one HTML page: losses beside the text's entropies, balance and drops of the routers.

Reads a run's folder (metrics.jsonl, router.parquet, entropies.json); nothing of it is computed again.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw_profiles.errors import QuestionError
from hw_profiles.files import write_whole
from reports import draw, tables
from reports.page import POLICY, page

if TYPE_CHECKING:
    import pandas as pd

# Points of a line, and columns of a heat map: more than a screen has are averaged.
MOST_POINTS, MOST_COLUMNS = 400, 120
COLOURS = (draw.BLUE, draw.ORANGE, draw.TEAL, draw.PURPLE, draw.ROSE, draw.GREEN, draw.STEEL, draw.YELLOW)


def write_run_page(folder: Path, path: Path) -> None:
    """The page of the run in `folder`; QuestionError where there is no run, or its files cannot be read."""
    metrics = _metrics(folder)
    routers = _routers(folder)
    entropies = _entropies(folder)
    undo = draw.fixed_json()
    try:
        body = "\n".join(_sections(metrics, routers, entropies))
    finally:
        undo()
    # Heat maps are images that the page itself makes.
    text = page(body, f"moecast: run {folder.name}", policy=f"{POLICY}; img-src data:")
    write_whole(path, text.encode())


def _metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        steps = [(row["step"], float(row["nats"])) for row in found]
    except FileNotFoundError:
        raise QuestionError(f"{folder}: is no run's folder: it has no metrics.jsonl") from None
    except (KeyError, TypeError, ValueError) as error:
        raise QuestionError(f"{file}: not a run's metrics: {str(error)[:60]}") from None
    if not steps:
        raise QuestionError(f"{file}: has no steps yet")
    return found


def _routers(folder: Path) -> pd.DataFrame | None:
    """Rows of step and layer; None for a dense model."""
    import pandas as pd

    file = folder / "router.parquet"
    if not file.is_file():
        return None
    try:
        table = pd.read_parquet(file)
        table[["step", "layer", "wanted", "dropped", "load", "rank_load", "entropy_nats", "wanted_E"]]
    except (OSError, ValueError, KeyError) as error:
        raise QuestionError(f"{file}: not a run's telemetry: {' '.join(str(error).split()):.60}") from None
    return table if len(table) else None


def _entropies(folder: Path) -> dict[str, float]:
    file = folder / "entropies.json"
    return {k: float(v) for k, v in json.loads(file.read_text("utf-8")).items()} if file.is_file() else {}


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    every = max(1, -(-len(xs) // MOST_POINTS))
    means = [
        (sum(xs[i : i + every]) / len(xs[i : i + every]), sum(ys[i : i + every]) / len(ys[i : i + every]))
        for i in range(0, len(xs), every)
    ]
    return [x for x, _ in means], [y for _, y in means]


def _lines(name: str, y_title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], caption: str,
           limits: dict[str, float] | None = None) -> str:  # fmt: skip
    fig = draw.figure(10, "step")
    fig.update_layout(height=320, margin={"r": 36})
    fig.update_yaxes(title={"text": y_title})
    for (label, (xs, ys)), colour in zip(lines.items(), COLOURS * 4, strict=False):
        x, y = _thin(xs, ys)
        fig.add_scatter(
            x=[draw.rounded(v) for v in x], y=[draw.rounded(v) for v in y], mode="lines", name=html.escape(label),
            line={"color": colour}, marker={"color": colour},
        )  # fmt: skip
    for at in (limits or {}).values():
        draw.limit(fig, y=at)
    said = "; ".join(f"dashed: {k} {v:.3f}" for k, v in (limits or {}).items())
    return draw.figure_html(fig, name, caption + (f" ({said})" if said else ""))


def _sections(metrics: list[dict[str, Any]], routers: pd.DataFrame | None, entropies: dict[str, float]) -> list[str]:
    steps = [float(row["step"]) for row in metrics]
    lines = {"training text": (steps, [float(row["nats"]) for row in metrics])}
    held = [(float(r["step"]), float(r["held_out"]["nats"])) for r in metrics if isinstance(r.get("held_out"), dict)]
    if held:
        lines["held-out text"] = ([x for x, _ in held], [y for _, y in held])
    out = ["<h2>Loss</h2>", _lines("loss", "nats a target", lines, "Cross-entropy", entropies)]
    tail = metrics[-20:]
    rows = [("last 20 steps", f"{sum(float(r['nats']) for r in tail) / len(tail):.4f}")]
    rows += [(f"the text's {k}", f"{v:.4f}") for k, v in entropies.items()]
    out.append(tables.table(("cross-entropy", "nats"), rows, (1,)))
    if routers is None:
        return out
    out.append("<h2>Routers</h2>")
    layers: Any = routers.groupby("layer")
    by_layer: dict[int, pd.DataFrame] = {int(k): g for k, g in layers}
    for name, column, title, caption in (
        ("drops", "dropped", "share dropped", "Assignments dropped for want of a slot, by layer"),
        ("load", "load", "busiest / mean", "Load of the busiest expert over the mean, by layer (1 is even)"),
        ("ranks", "rank_load", "busiest / mean", "Load of the busiest expert rank over the mean, by layer"),
        ("entropy", "entropy_nats", "nats", "Entropy of the router's choice a token, by layer"),
    ):
        lines = {}
        for layer, group in by_layer.items():
            values = group["dropped"] / group["wanted"] if column == "dropped" else group[column]
            lines[f"layer {layer}"] = (group["step"].tolist(), values.tolist())
        out.append(_lines(name, title, lines, caption))
    for layer, group in list(by_layer.items())[:2]:
        out.append(_heat(layer, group))
    last = [(f"layer {k}", *_at_the_end(g)) for k, g in by_layer.items()]
    head = ("at the last step", "dropped", "busiest expert", "busiest rank", "entropy, nats")
    out.append(tables.table(head, last, (1, 2, 3, 4)))
    return out


def _at_the_end(group: pd.DataFrame) -> tuple[str, str, str, str]:
    row: Any = group.iloc[-1]
    dropped = row["dropped"] / row["wanted"]
    return f"{dropped:.2%}", f"{row['load']:.2f}", f"{row['rank_load']:.2f}", f"{row['entropy_nats']:.3f}"


def _heat(layer: int, group: pd.DataFrame) -> str:
    """Share of a layer's assignments that each expert gets, over the steps."""
    import numpy as np

    counts = np.array([list(row) for row in group["wanted_E"]], dtype=float)
    share = counts / counts.sum(axis=1, keepdims=True) * counts.shape[1]
    every = max(1, -(-len(share) // MOST_COLUMNS))
    cut = [share[i : i + every].mean(axis=0) for i in range(0, len(share), every)]
    steps = group["step"].to_numpy()[::every]
    fig = draw.figure(max(8, counts.shape[1]), "step")
    fig.add_heatmap(
        z=[[draw.rounded(float(v)) for v in row] for row in np.array(cut).T], x=[int(s) for s in steps],
        colorscale=[[0, "#ffffff"], [0.5, draw.BLUE], [1, draw.RED]], zmin=0, zmax=2,
        colorbar={"title": {"text": "of the mean"}},
    )  # fmt: skip
    fig.update_yaxes(title={"text": "expert"})
    return draw.figure_html(fig, f"heat{layer}", f"Load of each expert of layer {layer} over the mean (1 is even)")
