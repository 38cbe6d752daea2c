"""All tokens of a split in one array, for random access: documents after one another, each ended by eos.

Letters: T tokens of the stream, M documents.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.job.learning import Data
from trainer.data.corpus import FIELD, Source, find_sources, read_documents
from trainer.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

Split = Literal["train", "held_out"]
DOCUMENTS_AT_A_TIME = 256


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokens of one split: document m is `token_T[offset_M[m]:offset_M[m + 1]]`, its last token eos.

    `text_bytes` is the size of the documents as UTF-8, `digest` the SHA-256 of tokens and offsets.
    """

    token_T: NDArray[Any]
    offset_M: NDArray[np.int64]
    text_bytes: int
    digest: str

    @property
    def documents(self) -> int:
        """How many documents."""
        return len(self.offset_M) - 1

    @property
    def tokens(self) -> int:
        """How many tokens, the eos of each document included."""
        return len(self.token_T)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokenized text of a run, split by document."""

    tokenizer: Tokenizer
    train: Stream
    held_out: Stream

    def describe(self) -> str:
        """Documents, bytes of text and tokens of either split, in a line."""
        parts = []
        for words, stream in (("for training", self.train), ("held out", self.held_out)):
            size = f"{stream.text_bytes / 1e6:.1f} MB, {stream.tokens:,} tokens"
            parts.append(f"{stream.documents:,} documents {words} ({size})")
        return ", ".join(parts)

    def split(self, name: Split) -> Stream:
        """The stream of `train` or `held_out`; QuestionError where there are too few documents to hold one out."""
        stream = self.train if name == "train" else self.held_out
        if not stream.documents:
            raise QuestionError(
                f"{FIELD}.held_out: no document is left for evaluation; it is every held_out-th, and there are "
                f"{self.train.documents} (a text file is one, so is a line of JSONL)"
            )
        return stream


def load_corpus(data: Data, folder: Path) -> Corpus:
    """The tokenized text of `data`, with files looked for in the job's `folder`; kept in memory for the next call.

    Document m (from 0) is held out where m % held_out == held_out - 1, so that the first is always for training.
    Raises QuestionError for bad files, a bad tokenizer, or no text at all.
    """
    sources = find_sources(data, folder)
    path = find_tokenizer(data.tokenizer, folder)
    if path is None:
        return _tokenize(sources, data.field, data.held_out, "bytes", Path(), None)
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    return _tokenize(sources, data.field, data.held_out, data.tokenizer, folder.resolve(), stamp)


# Training, evaluation and entropies of one run read the same text; a second run in the same process may read another.
# The stamps are there so that a changed file is read again.
@functools.lru_cache(maxsize=2)
def _tokenize(
    sources: tuple[Source, ...], field: str, held_out: int, name: str, folder: Path, stamp: tuple[int, int] | None
) -> Corpus:
    tokenizer = load_tokenizer(name, folder)
    parts: tuple[list[str], list[str]] = ([], [])
    for number, document in enumerate(read_documents(sources, field)):
        parts[number % held_out == held_out - 1].append(document.text)
    if not parts[0]:
        raise QuestionError(f"{FIELD}.files: hold no text; all documents are empty")
    return Corpus(tokenizer, build_stream(parts[0], tokenizer), build_stream(parts[1], tokenizer))


def build_stream(texts: Sequence[str], tokenizer: Tokenizer) -> Stream:
    """The stream of documents `texts`, in the smallest unsigned format that holds the tokenizer's ids.

    Raises QuestionError where the tokenizer gives an id beyond its own vocabulary.
    """
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    pieces: list[NDArray[Any]] = []
    end = np.array([tokenizer.eos], dtype)
    for first in range(0, len(texts), DOCUMENTS_AT_A_TIME):
        for ids in tokenizer.encode(texts[first : first + DOCUMENTS_AT_A_TIME]):
            if ids.max(initial=0) >= tokenizer.size:
                raise QuestionError(
                    f"{FIELD}.tokenizer = {tokenizer.name!r:.80}: gives id {ids.max()}; its vocabulary ends before "
                    f"{tokenizer.size}"
                )
            pieces.append(np.concatenate([ids.astype(dtype), end]))
    token_T = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    offset_M = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    digest = hashlib.sha256(token_T.astype("<u4").tobytes() + offset_M.astype("<i8").tobytes()).hexdigest()
    token_T.flags.writeable = False
    return Stream(token_T, offset_M, sum(len(text.encode("utf-8")) for text in texts), digest)
