"""The commands that make a job runnable here: `scale`, its small sibling, and `compile`, its program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hw_profiles.errors import QuestionError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as plan.expert=16; repeatable."),
]
LONGEST_VALUE = 60


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: moecast scale examples/deepseek-v3.yaml --devices 8 > small.yaml")(scale)


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
        _write_aside(output, text)
    if as_json:
        listed = [{"field": f, "from": a, "to": b} for f, a, b in changes(big, small)]
        print(json.dumps({"job": small.model_dump(mode="json", exclude_defaults=True), "changes": listed}, indent=2))
    elif output is None:
        print(text, end="")
    else:
        print(f"{len(changes(big, small))} fields changed (--json lists them): {output}", file=sys.stderr)


def _as_yaml(small: Any, name: str, devices: int) -> str:
    """The job file, with a first line that says where it comes from."""
    import yaml

    data = small.model_dump(mode="json", exclude_defaults=True)
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
    return f"# The small sibling of {name} for {devices} CPU devices, by the recipe of `moecast scale`.\n{body}"


def _write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    import os

    if path.is_dir():
        raise QuestionError(f"--output {path}: is a folder")
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
