"""The command `compare`: where the difference between two steps comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hw_profiles.errors import QuestionError
from moecast.asked import Engine, Html, Profile, check_engine, check_page, job_of, naming, print_json
from moecast.programs import Changes, Json
from moecast.progress import busy

EXAMPLE = "Example: moecast compare examples/mixtral-8x7b.yaml --set-b training.remat=none --html difference.html"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EXAMPLE)(compare)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.yaml", help="The first job.")],
    b: Annotated[Path | None, typer.Argument(metavar="[B.yaml]", help="The second; default the first.")] = None,
    set_: Changes = None,
    set_a: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Change a field of the first; repeatable.")
    ] = None,
    set_b: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Change a field of the second; repeatable.")
    ] = None,
    profile: Profile = None,
    profile_b: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chip profile for the second; default that of the first.")
    ] = None,
    engine: Engine = "events",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show where the difference of two steps comes from, part by part and op class by op class, adding up."""
    from simulator.analysis.comparison import compare as compared

    check_engine(engine)
    check_page(html)
    if b is None and not (set_a or set_b or profile_b):
        raise QuestionError("compare: name a second job, or say what changes: --set-b FIELD=VALUE")
    other = b or a
    one = (*job_of(a, [*(set_ or ()), *(set_a or ())], profile), a.parent)
    two = (*job_of(other, [*(set_ or ()), *(set_b or ())], profile_b or profile), other.parent)
    with busy(f"forecasting {a.stem} and {other.stem}"), naming(other if b is not None else a):
        answer = compared(one, two, engine)
    if html is not None:
        from reports.comparison_page import write_comparison_page

        write_comparison_page(answer, html)
    if as_json:
        print_json(answer.to_dict())
        return
    from rich.console import Console

    from moecast.terminal_compare import print_comparison

    print_comparison(answer, Console())
    if html is not None:
        print(f"report: {html}")
