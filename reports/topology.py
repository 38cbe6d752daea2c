"""The network as a figure: nodes where they are, links coloured by the share of the step that they are busy."""

from __future__ import annotations

from reports import units
from reports.draw import BLUE, GREY, INK, ORANGE, RED, STEEL, YELLOW, Figure, figure, label, rounded
from simulator.results.links import Drawing, DrawnLink

# From idle to the busiest link, in equal steps of what that one is busy; the idle ones thin.
SHADES = (GREY, STEEL, BLUE, YELLOW, ORANGE, RED)
IDLE = 1e-6
SYMBOLS = {"device": "square", "chip": "square", "leaf": "diamond", "spine": "diamond", "core": "diamond"}
ROW_PX = 46
TALLEST = 640


def network(drawing: Drawing) -> Figure:
    """Lines for links, one colour for each fifth of the busiest link's load, and what a pointer finds on them."""
    most = max((link.utilisation for link in drawing.links), default=0.0)
    heights = [n.y for n in drawing.nodes]
    fig = figure(2, "")
    span = max(heights, default=0.0) - min(heights, default=0.0) + 2
    fig.update_layout(height=int(min(max(span * ROW_PX, 200), TALLEST)), hovermode="closest", margin={"b": 8})
    for axis in (fig.update_xaxes, fig.update_yaxes):
        axis(visible=False, showgrid=False, zeroline=False, rangemode="normal")
    for shade, colour in enumerate(SHADES):
        own = [link for link in drawing.links if _shade(link, most) == shade]
        if own:
            _lines(fig, own, colour, _range(shade, most), 1.0 if shade == 0 else 2.5)
    kinds = list(dict.fromkeys(n.kind for n in drawing.nodes))
    for kind in kinds:
        mine = [n for n in drawing.nodes if n.kind == kind]
        if len(kinds) > 1 and len({n.y for n in mine}) == 1:
            at = {"x": 0, "y": mine[0].y, "xref": "paper", "xanchor": "right"}
            fig.add_annotation(text=label(kind), showarrow=False, **at)
            fig.update_layout(margin={"l": 84})
        fig.add_scatter(
            x=[rounded(n.x) for n in mine],
            y=[rounded(n.y) for n in mine],
            mode="markers",
            marker={"size": 7, "color": [INK] * len(mine), "symbol": SYMBOLS.get(kind, "circle")},
            hovertext=[label(n.name, 60) for n in mine],
            hoverinfo="text",
        )
    return fig


def _shade(link: DrawnLink, most: float) -> int:
    if link.utilisation <= IDLE:
        return 0
    return min(int(link.utilisation / most * (len(SHADES) - 1)) + 1, len(SHADES) - 1)


def _range(shade: int, most: float) -> str:
    """`12 to 18 % busy`."""
    if shade == 0:
        return "idle"
    fifth = 100 * most / (len(SHADES) - 1)
    return f"{fifth * (shade - 1):.3g} to {fifth * shade:.3g} % busy"


def _lines(fig: Figure, links: list[DrawnLink], colour: str, name: str, width: float) -> None:
    x: list[float | None] = []
    y: list[float | None] = []
    for link in links:
        x += [*(rounded(v) for v in link.x), None]
        y += [*(rounded(v) for v in link.y), None]
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines",
        name=name,
        line={"color": colour, "width": width},
        marker={"color": colour},
        hoverinfo="skip",
    )
    # A line has no hover of its own between its ends: an unseen point in its middle has.
    fig.add_scatter(
        x=[rounded(sum(link.x) / len(link.x)) for link in links],
        y=[rounded(sum(link.y) / len(link.y)) for link in links],
        mode="markers",
        marker={"size": 9, "color": [colour] * len(links), "opacity": 0},
        hovertext=[f"{label(link.name, 60)}: busy {units.percent(link.utilisation)}" for link in links],
        hoverinfo="text",
    )
