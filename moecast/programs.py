"""The commands that make a job runnable here: `scale`, its small sibling, and `compile`, its program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hw_profiles.files import write_whole
from moecast.progress import FAILED, NO, busy

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=16; repeatable."),
]
COMPILE_EXAMPLE = "Example: moecast compile examples/small/switch-base-128.yaml --target cpu:8"
# Set in the child process, whose host devices are those of the target.
CHILD = "MOECAST_COMPILE_CHILD"
LONGEST_COMPILE_S = 1800.0


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(name="compile", epilog=COMPILE_EXAMPLE)(compile_)
    app.command(epilog="Example: moecast report runs/tiny-moe -o run.html")(report)
    app.command(epilog="Example: moecast scale examples/deepseek-v3.yaml --devices 8 > small.yaml")(scale)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `moecast train` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "run.html"
    ),
    as_json: Json = False,
) -> None:
    """Draw a training run as one HTML page: losses beside the text's entropies, drops and balance of the routers."""
    from reports.run_page import write_run_page

    write_run_page(folder, output)
    print(json.dumps({"page": str(output)}) if as_json else f"report: {output}")


def scale(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The big job.")],
    devices: Annotated[int, typer.Option(min=1, max=64, help="CPU devices the small job is for.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the job there instead of printing it.")
    ] = None,
    set_: Changes = None,
    as_json: Json = False,
) -> None:
    """Make the small sibling of a big job: same family, routers and kind of plan, sized for a few CPU devices."""
    from simulator.job.load import load_job
    from simulator.job.scale import changes, scale_job

    big = load_job(job, set_ or ())
    small = scale_job(big, devices)
    text = _as_yaml(small, big.name, devices)
    if output is not None:
        write_whole(output, text.encode())
    if as_json:
        listed = [{"field": f, "from": a, "to": b} for f, a, b in changes(big, small)]
        print(json.dumps({"job": small.model_dump(mode="json", exclude_defaults=True), "changes": listed}, indent=2))
    elif output is None:
        print(text, end="")
    else:
        print(f"{len(changes(big, small))} fields changed (--json lists them): {output}", file=sys.stderr)


def compile_(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="Devices to compile for: cpu:8, or a slice such as tpu:v5p:4x4x4.")
    ],
    set_: Changes = None,
    hlo: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the text of the compiled program.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 3 where forecast and compiler differ too much.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the job's real train step, with no such devices needed, and print it beside the forecast.

    The job's cluster is replaced by the target's; degrees that the target lacks are an error.
    """
    from trainer.targets import TargetError, parse_target, run_child

    found = parse_target(target)
    try:
        if os.environ.get(CHILD) != found.name:
            with busy(f"compiling {job.stem} for {found.name}"):
                os.environ[CHILD] = found.name
                code = run_child(found, ["-m", "moecast", *sys.argv[1:]], LONGEST_COMPILE_S)
            raise typer.Exit(code)
        _compile_here(job, found, set_ or (), hlo, strict, as_json)
    except TargetError as error:
        print(f"moecast: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None


def _compile_here(
    path: Path, target: Any, changes: Sequence[str], hlo: Path | None, strict: bool, as_json: bool
) -> None:
    from hw_profiles.loader import resolve_cluster
    from moecast.compiled import compare
    from moecast.terminal_compiled import print_comparison
    from simulator.analysis.forecast import forecast
    from simulator.job.load import load_job
    from simulator.job.rules import resolve
    from trainer.compile import compile_step

    given = load_job(path, changes)
    job = given.model_copy(update={"cluster": target.cluster})
    program, text = compile_step(job, resolve(job, resolve_cluster(job.cluster)), target, path.parent)
    if hlo is not None:
        write_whole(hlo, text.encode())
    # Recorded loads are the engine's; FLOPs, bytes and memory are the same in both.
    engine = "events" if job.training.routing.model == "replay" else "closed-form"
    answer = forecast(as_our_program(job, target.platform), engine=engine, folder=path.parent)
    found = compare(answer, program)
    if as_json:
        whole = {"job": job.name, "target": target.name, "comparison": found.to_dict(), "program": program.to_dict()}
        print(json.dumps(whole, indent=2, allow_nan=False))
    else:
        print_comparison(job, target, found, program)
    if strict and not all(r.holds for r in found.rows):
        raise typer.Exit(NO)


def as_our_program(job: Any, platform: str) -> Any:
    """The job as our trainer's program runs it there: its stack, and on CPU the float32 that XLA widens all to."""
    stack = job.software.model_copy(update={"stack": "moecast"})
    training = job.training.model_copy(update={"precision": "fp32"}) if platform == "cpu" else job.training
    return job.model_copy(update={"software": stack, "training": training})


def _as_yaml(small: Any, name: str, devices: int) -> str:
    """The job file, with a first line that says where it comes from."""
    import yaml

    data = small.model_dump(mode="json", exclude_defaults=True)
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
    return f"# The small sibling of {name} for {devices} CPU devices, by the recipe of `moecast scale`.\n{body}"
