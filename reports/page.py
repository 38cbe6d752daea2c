"""Forecasts as one HTML file that needs nothing else: no network, no second file, the same bytes every time."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from hw_profiles.files import write_whole
from reports import draw, sections
from reports.parts import unique_names
from simulator.results.forecast import Forecast

# The browser itself refuses every request, whatever a label or a later Plotly tries.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
# Figures are drawn while the page loads; a scroll bar that comes later makes their columns narrower.
FIT = (
    "addEventListener('load', () => document.querySelectorAll('.js-plotly-plot').forEach(f => Plotly.Plots.resize(f)))"
)


def write_html(forecasts: Sequence[Forecast], path: str | Path, title: str) -> None:
    """Writes the page to `path`, whole or not at all; raises ValueError without forecasts."""
    write_whole(Path(path), render(forecasts, title).encode())


def render(forecasts: Sequence[Forecast], title: str) -> str:
    """The page as text."""
    if not forecasts:
        raise ValueError("a page needs at least one forecast")
    undo = draw.fixed_json()
    try:
        body = "\n".join(_body(forecasts))
    finally:
        undo()
    return page(body, title)


def page(body: str, title: str, policy: str = POLICY) -> str:
    """A whole page round `body`, Plotly's JavaScript (4.8 MB) included."""
    style = resources.files("reports").joinpath("style.css").read_text(encoding="utf-8")
    said = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{said}</title>\n<style>\n{style}</style>\n<script>{draw.plotly_js()}</script>\n</head>\n"
        f"<body>\n<main>\n<h1>{said}</h1>\n{body}\n</main>\n<script>{FIT}</script>\n</body>\n</html>\n"
    )


def _body(forecasts: Sequence[Forecast]) -> list[str]:
    out = []
    names = unique_names(forecasts)
    if len(forecasts) > 1:
        links = "".join(f'<li><a href="#job{i}">{html.escape(n)}</a></li>' for i, n in enumerate(names, 1))
        out.append(f'<nav><ul><li><a href="#compare">Comparison</a></li>{links}</ul></nav>')
        out.append('<article id="compare"><h2>Comparison</h2>')
        out += [section(forecasts, "compare") for section in sections.COMPARISON]
        out.append("</article>")
    for i, (name, forecast) in enumerate(zip(names, forecasts, strict=True), 1):
        anchor = f"job{i}"
        out.append(f'<article id="{anchor}"><h2>{html.escape(name)}</h2>')
        out.append(f'<p class="sub">{html.escape(sections.subtitle(forecast))}</p>')
        out += [section(forecast, anchor) for section in sections.FORECAST]
        out.append("</article>")
    return [part for part in out if part]
