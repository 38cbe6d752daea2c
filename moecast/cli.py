"""The command line. Exit codes: 0 done; 2 the question is wrong; 3 with --strict, the answer is no; 4 the work failed.

Heavy packages are imported by the command that needs them: an answer has half a second, start-up included.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hw_profiles.errors import QuestionError, WorkFailed
from moecast import (
    bench,
    calibrate,
    compare,
    convert,
    importing,
    measure,
    plan,
    programs,
    size,
    train,
    validate,
    whatif,
)
from moecast.progress import FAILED, INTERRUPTED, NO, busy

if TYPE_CHECKING:
    from hw_profiles.schema import Chip
    from simulator.analysis.event_options import EventOptions
    from simulator.results.forecast import Forecast

LONGEST_LINE = 600


class _Commands(TyperGroup):
    """All commands, and one answer to an interruption, which typer's versions disagree about."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interruption exits with 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="moecast",
    cls=_Commands,
    help="Forecast what a mixture-of-experts training run costs, before the cluster is rented.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"moecast {version('moecast')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Forecast what a mixture-of-experts training run costs, before the cluster is rented."""


def _print_json(data: Any) -> None:
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except ValueError:
        rule = "a number in the job or in the chip's profile is too large or too small"
        raise QuestionError(f"the forecast is not finite: {rule}") from None
    print(text)


@app.command(
    epilog="Example: moecast forecast examples/mixtral-8x7b.yaml --set plan.expert=4 --html mixtral.html",
)
def forecast(
    jobs: Annotated[list[Path], typer.Argument(metavar="JOB.yaml...", help="One job file, or several to compare.")],
    engine: Annotated[str, typer.Option(help="How the step is timed: events, or closed-form.")] = "events",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=16; repeatable."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chip profile to use instead of the shipped one.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report page that works offline.")
    ] = None,
    perfetto: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the timeline as a trace for ui.perfetto.dev.")
    ] = None,
    straggler: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE=FACTOR", help="A device whose compute takes longer, such as 17=1.3; repeatable."),
    ] = None,
    slow_link: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FACTOR", help="Links with NAME in theirs run at FACTOR of their rate; repeatable."),
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A fabric of your own (GraphML or JSON), for events.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the routing draws.")] = 0,
    fold: Annotated[bool, typer.Option(help="Let one group stand for all equal ones.")] = True,
    strict: Annotated[bool, typer.Option(help="Exit with 3 where a job does not fit in memory.")] = False,
    as_json: Json = False,
) -> None:
    """Forecast a training step of each job: time, FLOPs, memory, all-to-all, tokens/s, MFU, dollars."""
    chip = None
    if profile is not None:
        from hw_profiles.loader import load_chip_file

        chip = load_chip_file(profile)
    if html is not None:
        _check_page(html)
    if perfetto is not None:
        if len(jobs) > 1 or engine != "events":
            raise QuestionError("--perfetto: needs one job, and --engine events")
        _check_page(perfetto)
    if (straggler or slow_link or topology) and engine != "events":
        raise QuestionError("--straggler, --slow-link and --topology: need --engine events")
    options = _options(straggler, slow_link, seed, fold, topology)
    answers = []
    for i, path in enumerate(jobs):
        with busy(f"forecasting {path.stem}" + (f", {i + 1} of {len(jobs)}" if len(jobs) > 1 else "")):
            answers.append(_answer(path, set_ or (), engine, chip, profile, options))
    if html is not None:
        _write_page(answers, html)
    if perfetto is not None:
        from simulator.analysis.perfetto import write_perfetto

        assert answers[0].timeline is not None
        write_perfetto(answers[0].timeline, perfetto, answers[0].job.name)
    if as_json:
        _print_json(answers[0].to_dict() if len(answers) == 1 else [a.to_dict() for a in answers])
    else:
        _print_tables(answers, html)
    if strict and not all(a.memory.fits for a in answers):
        raise typer.Exit(NO)


def _factors(texts: list[str] | None, name: str) -> dict[str, float]:
    """`17=1.3` as {"17": 1.3}; QuestionError for anything else."""
    out = {}
    for text in texts or ():
        what, _, number = text.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            what = ""
        if not what:
            raise QuestionError(f"{name} {text}: write it as {'DEVICE' if name == '--straggler' else 'NAME'}=FACTOR")
        if not 1e-3 <= factor <= 1e3:
            raise QuestionError(f"{name} {what} = {factor:g}: a factor is from 0.001 to 1000")
        out[what] = factor
    return out


def _options(
    straggler: list[str] | None, slow_link: list[str] | None, seed: int, fold: bool, graph: Path | None = None
) -> EventOptions:
    """The choices of a run by events."""
    from simulator.analysis.event_options import EventOptions

    slow = {}
    for device, factor in _factors(straggler, "--straggler").items():
        if not device.isdecimal():
            raise QuestionError(f"--straggler {device}: a device is a number from 0")
        slow[int(device)] = factor
    return EventOptions(
        seed=seed, fold=fold, stragglers=slow, slow_links=_factors(slow_link, "--slow-link"), graph=graph
    )


def _answer(
    path: Path,
    changes: Sequence[str],
    engine: str,
    chip: Chip | None,
    profile: Path | None,
    options: EventOptions | None = None,
) -> Forecast:
    """The forecast of one job file; an error says which file it is in."""
    from simulator.analysis.forecast import forecast
    from simulator.job.load import load_job

    with _naming(path):
        job = load_job(path, changes)
        name = str(profile) if profile else None
        return forecast(job, engine=engine, chip=chip, profile=name, options=options, folder=path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error within says that it is about the job in `path`, unless it is about an option."""
    try:
        yield
    except QuestionError as error:
        said = str(error)
        raise QuestionError(said if said.startswith((str(path), "--set", "engine")) else f"{path}: {said}") from None


def _check_page(path: Path) -> None:
    """OSError where no page can be written; a page replaces a file, never a folder or a device such as /dev/full."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is there and is not a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))


def _write_page(answers: list[Forecast], path: Path) -> None:
    from reports.page import write_html

    title = answers[0].job.name if len(answers) == 1 else "Comparison of " + ", ".join(a.job.name for a in answers)
    write_html(answers, path, f"moecast: {title}")


def _print_tables(answers: list[Forecast], html: Path | None) -> None:
    from rich.console import Console

    from moecast.terminal import print_comparison, print_forecast

    console = Console()
    if len(answers) == 1:
        print_forecast(answers[0], console)
    else:
        print_comparison(answers, console)
    if html is not None:
        console.print(f"report: {html}", style="dim", highlight=False, markup=False)


@app.command(name="link-load", epilog="Example: moecast link-load examples/deepseek-v3.yaml --top 5")
def link_load(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=16; repeatable."),
    ] = None,
    slow_link: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FACTOR", help="Links with NAME in theirs run at FACTOR of their rate; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=20, help="How many links to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Show the links that carry most for their bandwidth in a step; links that are loaded alike count as one."""
    answer = _answer(job, set_ or (), "events", None, None, _options(None, slow_link, 0, True))
    assert answer.events is not None
    from moecast.catalogue import show_links

    show_links(answer, top, as_json)


@app.command(epilog="Example: moecast placement examples/qwen3-235b-a22b.yaml")
def placement(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=16; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try every order of the mesh axes over the devices, by closed form, fastest first."""
    from moecast.catalogue import show_placements
    from simulator.analysis.placements import placements
    from simulator.job.load import load_job

    with _naming(job):
        found = placements(load_job(job, set_ or ()))
    show_placements(found, as_json)


@app.command(epilog="Example: moecast models deepseek-v3")
def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one preset whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the model presets with their parameter counts, or show one."""
    from moecast.catalogue import show_model, show_models

    show_model(name, as_json) if name else show_models(as_json)


@app.command(epilog="Example: moecast chips h100-sxm --json")
def chips(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one chip with every source.")] = None,
    as_json: Json = False,
) -> None:
    """List the chips, or show one with the source, date and confidence of every number."""
    from moecast.catalogue import show_chip, show_chips

    show_chip(name, as_json) if name else show_chips(as_json)


@app.command(epilog="Example: moecast clusters tpu-v3-32")
def clusters(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one cluster or TPU slice.")] = None,
    as_json: Json = False,
) -> None:
    """List the named clusters, or show one with its networks. Any TPU slice has a name, such as v5p-128."""
    from moecast.catalogue import show_cluster, show_clusters

    show_cluster(name, as_json) if name else show_clusters(as_json)


@app.command(epilog="Example: moecast schema > job.schema.json")
def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of a job file (--json is implied: a schema is JSON)."""
    from simulator.job.load import job_schema

    _print_json(job_schema())


convert.register(app)
importing.register(app)
programs.register(app)
plan.register(app)
compare.register(app)
whatif.register(app)
size.register(app)
train.register(app)
measure.register(app)
bench.register(app)
calibrate.register(app)
validate.register(app)


def _complain(text: str) -> None:
    """`text` as one printable line on standard error."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    print(f"moecast: {line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 3] + '...'}", file=sys.stderr)


def _flush() -> None:
    """Write out what is left, now, while a full disk still changes the exit code."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _let_go() -> None:
    """Forget output that cannot be written: Python would try, and complain, once more at exit."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line; every error of the user's is one line on standard error and a stable exit code."""
    try:
        try:
            app(standalone_mode=True)
        finally:
            _flush()
    except SystemExit as leaving:
        # Only rich and typer leave with 1: when the reader has gone (`| head`), which is no failure.
        raise SystemExit(0 if leaving.code == 1 else leaving.code) from None
    except QuestionError as error:
        _complain(str(error))
        raise SystemExit(2) from None
    except WorkFailed as error:
        _let_go()
        _complain(str(error))
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        _let_go()
        raise SystemExit(0) from None
    except OSError as error:
        _let_go()
        _complain(f"{error.filename or 'standard output'}: {error.strerror or error}")
        raise SystemExit(FAILED) from None
