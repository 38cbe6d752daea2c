"""The command that turns configurations of other trainers into jobs, and jobs into configurations of theirs."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hw_profiles.errors import QuestionError
from moecast.progress import NO

if TYPE_CHECKING:
    from simulator.job.convert.convert import Exported, Imported

EXAMPLE = "Example: moecast convert examples/qwen3-235b-a22b.yaml --to megatron -o qwen3.sh"
MOST_BYTES = 1_000_000


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="convert", epilog=EXAMPLE)(convert)


def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A job, or another trainer's configuration; - reads it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings in the trainer's own names.")
    ] = None,
    form: Annotated[str, typer.Option("--from", help="auto, job, megatron, maxtext or torchtitan.")] = "auto",
    to: Annotated[str, typer.Option("--to", help="job, megatron, maxtext or torchtitan.")] = "job",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there instead of printing.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="CLUSTER", help="As in a job: h800-2048, or {chip: h100-sxm, nodes: 32}.")
    ] = None,
    chip: Annotated[str, typer.Option(metavar="NAME", help="The GPU, where the file says how many.")] = "",
    strict: Annotated[bool, typer.Option(help="Exit with 3 where something could not be said.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the text in it.")] = False,
) -> None:
    """Turn a trainer's configuration into a job, or a job into a trainer's configuration; list what gets lost."""
    from hw_profiles.yaml_reader import parse_yaml
    from simulator.job.convert.convert import export_job, form_of, import_text

    text, where, name = _text(file)
    form = form_of(text, where) if form == "auto" else form
    found: Imported | None = None
    if form == "job":
        from simulator.job.load import job_from_mapping

        if overrides:
            raise QuestionError(
                f"{overrides[0]!r:.60}: overrides go with a trainer's configuration; use the job itself"
            )
        folder = Path(file).parent if file != "-" else Path()
        job = job_from_mapping(parse_yaml(text, where), folder=folder, where=where, name=name)
        if to == "job":
            raise QuestionError(f"{where}: is a job already; say what it becomes with --to")
    else:
        given = parse_yaml(cluster, "--cluster") if cluster is not None else None
        found = import_text(text, where, form, cluster=given, chip=chip, overrides=overrides or (), name=name)
        job = found.job
    made: Exported | None = None
    if to == "job":
        result = _job_text(job, where)
    else:
        made = _exported(export_job, job, to, where)
        result = made.text
    if output is not None:
        from hw_profiles.files import write_whole

        write_whole(output, result.encode())
    _show(found, made, result, output, as_json)
    lost = (len(found.left) + len(found.unknown) if found else 0) + (len(made.left) if made else 0)
    if strict and lost:
        raise typer.Exit(NO)


def _exported(export: Any, job: Any, to: str, where: str) -> Any:
    try:
        return export(job, to)
    except QuestionError as error:
        said = str(error)
        raise QuestionError(said if said.startswith(("--to", where)) else f"{where}: {said}") from None


def _text(file: str) -> tuple[str, str, str]:
    """The text, what to call it in errors, and the job's name."""
    from hw_profiles.files import read_bytes

    if file == "-":
        data, where, name = sys.stdin.buffer.read(MOST_BYTES + 1), "standard input", "job"
        if len(data) > MOST_BYTES:
            raise QuestionError(f"{where}: more than {MOST_BYTES:,} bytes")
    else:
        data, where, name = read_bytes(Path(file), MOST_BYTES, file), file, Path(file).stem
    try:
        return data.decode(), where, name
    except UnicodeDecodeError:
        raise QuestionError(f"{where}: not UTF-8 text") from None


def _job_text(job: Any, where: str) -> str:
    import yaml

    data = job.model_dump(mode="json", exclude_defaults=True)
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
    return f"# Converted from {Path(where).name} by moecast convert.\n{body}"


def _show(found: Imported | None, made: Exported | None, text: str, output: Path | None, as_json: bool) -> None:
    if as_json:
        said: dict[str, Any] = {"text": text, "output": str(output) if output is not None else None}
        said |= {"import": found.to_dict() if found else None, "export": made.to_dict() if made else None}
        print(json.dumps(said, indent=2, allow_nan=False))
        return
    from rich.console import Console

    # The converted text alone goes to standard output, unless it went to a file.
    if output is None:
        print(text, end="")
    console = Console(stderr=output is None)
    if found is not None:
        console.print(f"{len(found.read)} settings of {found.form} read", highlight=False)
        if found.kept:
            console.print(f"{len(found.kept)} fields from the notes of an earlier export", highlight=False)
        # Defaults that say "nothing" are left to --json.
        told = [(d.name, d.value, d.source) for d in found.defaults if d.value not in (None, False, "", 0, -1)]
        _group(f"taken from the trainer's defaults, {len(found.defaults)} in all (--json), of these", told, console)
        _group("without a place in a job", [(x.name, x.value, x.why) for x in found.left], console)
        _group("not understood", [(x.name, x.value, x.why) for x in found.unknown], console)
    if made is not None:
        _group(
            f"cannot be said to {made.form}; kept in its notes", [(x.name, x.value, x.why) for x in made.left], console
        )
        if made.same:
            names = ", ".join(x.name for x in made.same)
            console.print(f"said in another way: {names}", highlight=False, markup=False)
    if output is not None:
        console.print(f"written: {output}", style="dim", highlight=False, markup=False, soft_wrap=True)


def _group(title: str, rows: list[tuple[str, Any, str]], console: Any) -> None:
    """Rows of one reason under it."""
    if not rows:
        return
    console.print(f"{title} ({len(rows)}):", highlight=False, markup=False)
    by: dict[str, list[str]] = defaultdict(list)
    for name, value, why in rows:
        said = json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value)
        by[why].append(f"{name} = {said if len(said) <= 60 else said[:57] + '...'}")
    for why, names in by.items():
        console.print(f"  {why}:", highlight=False, markup=False)
        console.print(f"    {', '.join(names)}", highlight=False, markup=False)
