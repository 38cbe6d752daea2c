"""One file of any of the known formats, told apart by what is in it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hw_profiles.errors import QuestionError, nearest
from simulator.calibration.readers import chrome, kineto, nccl_tests, training_logs
from simulator.calibration.readers.clocks import check_clocks
from simulator.calibration.readers.found import Found, Told
from simulator.calibration.readers.json_events import TraceText
from simulator.calibration.readers.plain_table import read_csv
from simulator.calibration.readers.profile_rows import found_in
from simulator.calibration.readers.texts import read_text
from simulator.calibration.tables import NAMES

# A line of a log may begin with a bracket too.
_JSON = re.compile(r"""\s*(?:\{\s*(?:["}]|\Z)|\[\s*(?:[{\]]|\Z))""")
_KINETO = re.compile(r'"deviceProperties"\s*:|"cat"\s*:\s*"(?:[Kk]ernel|gpu_memcpy|cpu_op|cuda_runtime)"')
FORMATS = ("auto", "kineto", "perfetto", "nccl-tests", "megatron", "maxtext", "csv")


def read_file(path: Path, told: Told, form: str = "auto") -> Found:
    """The rows of `path`; QuestionError naming file, event or line, and rule, for what is not in `form`."""
    if form not in FORMATS:
        raise QuestionError(f"--format {form!r:.40}: known: {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    text = read_text(path)
    # The day a file was written stands in where neither it nor anybody says when it was measured.
    date = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
    looks = _format_of(text, told)
    if form == "auto":
        if not looks:
            raise QuestionError(
                f"{path}: of none of the known formats; --format says which of {', '.join(FORMATS[1:])}"
            )
        form = looks
    if form in ("kineto", "perfetto"):
        if looks != "json":
            raise QuestionError(f"{path}: not JSON{f', but {looks}' if looks else ''}: not a trace ({form})")
        return _trace(text, path, told, form, date)
    if form == "json":
        return _trace(text, path, told, "", date)
    if looks == "json":
        raise QuestionError(f"{path}: JSON: not {form}")
    if form == "nccl-tests":
        return nccl_tests.read_nccl_tests(text, path, told, date)
    if form == "csv":
        return read_csv(text, path, told, date)
    return training_logs.READERS[form](text, path, told, date)


def _format_of(text: str, told: Told) -> str:
    """The format that a text looks like, `json` for both kinds of traces, or nothing."""
    if _JSON.match(text):
        return "json"
    if nccl_tests.MARK.search(text):
        return "nccl-tests"
    if training_logs.MEGATRON.search(text):
        return "megatron"
    if training_logs.MAXTEXT.search(text):
        return "maxtext"
    first = {c.strip().strip('"') for c in text.partition("\n")[0].split(",")}
    return "csv" if len(first) > 1 and (told.columns or first & set(NAMES)) else ""


def _trace(text: str, path: Path, told: Told, form: str, date: str) -> Found:
    """A trace: Kineto's if it says so, or has events of Kineto's categories."""
    trace = TraceText(text, str(path))
    if (form or ("kineto" if _KINETO.search(text) else "perfetto")) == "kineto":
        kept = kineto.Kept()
        for number, event in trace.events():
            kept.add(number, event, trace.start)
        form, profile = "kineto", kineto.profile_of(kept, trace)
    else:
        slices = chrome.Slices()
        for number, event in trace.events():
            slices.add(number, event, trace.start)
        form, profile = "perfetto", chrome.profile_of(slices, trace, told.process)
    if told.clocks_apart:
        profile.notes.append("clocks of devices not compared")
    else:
        check_clocks(profile, trace.start)
    return found_in(profile, path, form, told, date)


def merged(found: list[Found]) -> list[Found]:
    """Several files' rows with ids of their own where files share a name."""
    seen: set[str] = set()
    out = []
    for i, one in enumerate(found):
        rows = tuple(replace(r, id=f"{i}/{r.id}") if r.id in seen else r for r in one.rows)
        seen |= {r.id for r in rows}
        out.append(replace(one, rows=rows))
    return out
