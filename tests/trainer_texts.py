"""Texts for the trainer's data tests: written to files, read as batches, and shown as letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from simulator.job.job import Job
from simulator.job.load import job_from_mapping
from trainer.data import load_tokenizer

HERE = Path()
BYTES = load_tokenizer("bytes", HERE)
TEXTS = st.lists(st.text("abcdefgh", min_size=1, max_size=40), min_size=1, max_size=12)


def make_job(*, encoder: bool = False, sequences: int = 4, length: Any = None, vocab: int = 320, **data: Any) -> Job:
    """A job of few and short sequences; `data` is its training.learning.data."""
    length = length or ({"encoder": 64, "decoder": 32} if encoder else 32)
    return job_from_mapping(
        {
            "model": {"preset": "t5-base" if encoder else "mixtral-8x7b", "vocab": vocab},
            "cluster": {"chip": "cpu-host", "devices": 1},
            "batch": {"sequences": sequences, "length": length},
            "training": {"learning": {"data": data}},
        }
    )


def write_jsonl(folder: Path, texts: list[str], name: str = "texts.jsonl") -> str:
    """A document a line in the file `name`, which is returned."""
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return name


def letters(ids: Any) -> str:
    """Ids as text: `.` padding, `$` eos, `^` start."""
    return "".join(".$^"[i] if i < 3 else chr(i - 3) for i in ids)


def write_texts(folder: Path) -> Path:
    """`texts.jsonl` with sixty documents of different lengths, in `folder`."""
    write_jsonl(folder, [f"document {i} says {'la' * (i % 9)} {i * i}" for i in range(60)])
    return folder


def rows_of(batches: Any, steps: int) -> list[dict[str, Any]]:
    """The next batches."""
    return [next(batches) for _ in range(steps)]
