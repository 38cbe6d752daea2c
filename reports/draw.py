"""The one place that touches Plotly: empty figures in the house style, bars, and figures as HTML.

Text from users is escaped by `label`, since Plotly reads labels as a kind of HTML. Values are rounded to six digits:
nobody sees more, and the page stays small.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from plotly import graph_objects, io, offline

from reports import units

# Plotly has no types.
Figure: TypeAlias = Any

# Readable on the light and on the dark ground of style.css; text on the ground itself is coloured there.
BLUE, ORANGE, YELLOW, PURPLE, ROSE = "#3f87cc", "#e07b39", "#d3a11f", "#8f73cf", "#c95f80"
TEAL, GREEN, STEEL, GREY, RED = "#3fa596", "#759f3d", "#6f8fb8", "#8b919a", "#d64545"
INK = "#6b7280"
_GRID = "rgba(128,128,128,0.25)"
_ROW_PX = 24
# Dragging is off so that a finger on a figure scrolls the page; the tool bar would lie on the figure on touch screens.
_CONFIG = {"displayModeBar": False, "displaylogo": False, "responsive": True}


def figure(rows: int, x_title: str, **x_axis: object) -> Figure:
    """An empty figure of `rows` horizontal bars with its value axis below."""
    return graph_objects.Figure(
        layout={
            # An empty template: Plotly's own would add 7 kB to every figure.
            "template": graph_objects.layout.Template(),
            "height": rows * _ROW_PX + 60,
            "margin": {"l": 8, "r": 20, "t": 8, "b": 52},
            "barmode": "stack",
            "bargap": 0.25,
            "dragmode": False,
            "showlegend": False,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "xaxis": {
                "title": {"text": x_title, "standoff": 10},
                "ticklabelstandoff": 4,
                "gridcolor": _GRID,
                "zerolinecolor": _GRID,
                "rangemode": "tozero",
                **x_axis,
            },
            "yaxis": {"gridcolor": _GRID, "automargin": True, "ticklabelstandoff": 6},
        }
    )


def name_rows(fig: Figure, labels: Sequence[str]) -> None:
    """Names the rows from the top; by number, so that equal names and names like `1e3` stay what they are."""
    at = list(range(len(labels)))
    fig.update_yaxes(
        tickvals=at, ticktext=list(labels), range=[len(labels) - 0.5, -0.5], showgrid=False, zeroline=False
    )


def bar(
    fig: Figure, values: Sequence[float], name: str, colour: str | list[str], hover: Sequence[str], **more: object
) -> None:
    """Adds one horizontal bar per row; `name` and `hover` must be escaped."""
    fig.add_bar(
        x=[rounded(v) for v in values],
        y=list(range(len(values))),
        orientation="h",
        name=name,
        marker={"color": colour},
        hovertext=list(hover),
        hoverinfo="text",
        **more,
    )


def limit(fig: Figure, **at: float) -> None:
    """A dashed line at `x=` or `y=`."""
    line = {"dash": "dash", "color": INK, "width": 1.5}
    if "x" in at:
        fig.add_vline(x=rounded(at["x"]), line=line)
    else:
        fig.add_hline(y=rounded(at["y"]), line=line)


def decades(values: Sequence[float]) -> dict[str, object]:
    """A logarithmic axis of whole powers of ten around `values` (> 0)."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return {
        "type": "log",
        "range": [low, max(high, low + 1)],
        "dtick": 1,
        "exponentformat": "power",
        "rangemode": "normal",
        # Else the lowest labels of both axes touch.
        "ticklabelstandoff": 10,
    }


def rounded(value: float) -> float:
    """To the six digits that a figure keeps."""
    return units.rounded(value, 6)


def label(text: str, width: int = 36) -> str:
    """Escaped, and shortened in its middle: scopes differ at both ends."""
    if len(text) > width:
        text = f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"
    return html.escape(text, quote=False)


def figure_html(fig: Figure, div_id: str, caption: str) -> str:
    """A figure under a fixed id, its legend before it and its caption after it.

    The legend is HTML: Plotly's own covers the axis where it wraps, as it does on a phone.
    """
    drawn = io.to_html(fig, full_html=False, include_plotlyjs=False, div_id=div_id, config=_CONFIG, validate=False)
    named = [t for t in fig.data if t.name and isinstance(t.marker.color, str)]
    keys = "".join(f'<li><i style="background:{t.marker.color}"></i>{t.name}</li>' for t in named)
    legend = f'<ul class="legend">{keys}</ul>' if len(named) > 1 else ""
    said = html.escape(caption)
    return (
        f'<figure>{legend}<div class="wide" role="img" aria-label="{said}">{drawn}</div>'
        f"<figcaption>{said}</figcaption></figure>"
    )


def fixed_json() -> Callable[[], None]:
    """Pins Plotly's JSON writer and returns a function that undoes it: orjson, where installed, writes other bytes."""
    before = io.json.config.default_engine
    io.json.config.default_engine = "json"

    def undo() -> None:
        io.json.config.default_engine = before

    return undo


def plotly_js() -> str:
    """Plotly's JavaScript, 4.8 MB."""
    text: str = offline.get_plotlyjs()
    return text
