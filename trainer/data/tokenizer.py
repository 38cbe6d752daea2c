"""Text to token ids: bytes, or a Hugging Face `tokenizers` file of the job's folder."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from hw_profiles.files import inside, read_bytes
from trainer.data.corpus import FIELD

MAX_FILE_BYTES = 10**8
FIRST_BYTE = 3  # ids 0, 1, 2 are padding, end and start of a document

# What published tokenizers call these. GPT-2 has one token for both ends of a document.
EOS_NAMES = (
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "[CLS]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class Tokenizer:
    """Ids of text: `encode` turns texts into arrays of ids below `size`, without `pad`, `eos` or `bos`.

    `pad` fills an array, `eos` ends a document, `bos` is what a decoder-only model reads before its first token.
    """

    name: str
    size: int
    pad: int
    eos: int
    bos: int
    encode: Callable[[Sequence[str]], list[NDArray[np.int64]]]


def load_tokenizer(name: str, folder: Path) -> Tokenizer:
    """The tokenizer `bytes`, or the one in the JSON file `name` of the job's `folder`.

    Ids of `bytes`: 0 padding, 1 end of document, 2 start, 3 to 258 the bytes of UTF-8. Raises QuestionError for a file
    that is missing, outside the folder, no tokenizer, or without a token that ends a document.
    """
    path = find_tokenizer(name, folder)
    if path is None:
        return Tokenizer("bytes", FIRST_BYTE + 256, 0, 1, 2, _encode_bytes)
    start = f"{FIELD}.tokenizer = {name!r:.80}"
    return _load_file(_read(path, start), name, start)


def find_tokenizer(name: str, folder: Path) -> Path | None:
    """The file of tokenizer `name`, or None for `bytes`; QuestionError where there is no such file in `folder`."""
    if name == "bytes":
        return None
    start = f"{FIELD}.tokenizer = {name!r:.80}"
    if not name.endswith(".json"):
        raise QuestionError(f"{start}: must be 'bytes' or a tokenizers file (.json) in the job's folder")
    path = inside(name, folder, start)
    if not path.is_file():
        raise QuestionError(f"{start}: {'not a file' if path.exists() else 'no such file in the folder of the job'}")
    return path


def check_vocabulary(tokenizer: Tokenizer, sentinels: int, vocab: int) -> None:
    """QuestionError where the model's `vocab` ids do not hold the tokenizer's and `sentinels` above them."""
    needed = tokenizer.size + sentinels
    if vocab < needed:
        spans = f" and {sentinels} sentinels of span corruption" if sentinels else ""
        raise QuestionError(
            f"model.vocab = {vocab}: must be at least {needed}, for the {tokenizer.size} ids of tokenizer "
            f"{tokenizer.name!r:.60}{spans}"
        )


def _encode_bytes(texts: Sequence[str]) -> list[NDArray[np.int64]]:
    return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) + FIRST_BYTE for text in texts]


def _read(path: Path, start: str) -> str:
    content = read_bytes(path, MAX_FILE_BYTES, start)
    try:
        text = content.decode("utf-8")
        if not isinstance(json.loads(text), dict):
            raise QuestionError(f"{start}: not a tokenizers file (no JSON object)")
    except UnicodeDecodeError:
        raise QuestionError(f"{start}: not a text file (UTF-8)") from None
    except QuestionError:
        raise
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise QuestionError(f"{start}{line}: not JSON") from None
    return text


def _load_file(text: str, name: str, start: str) -> Tokenizer:
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise QuestionError(f"{start}: needs the package tokenizers (pip install tokenizers); or use 'bytes'") from None
    try:
        loaded = tokenizers.Tokenizer.from_str(text)
        # A file may ask for every text to be cut or filled to one length; packing does both itself.
        loaded.no_truncation()
        loaded.no_padding()
        # A text about tokenizers may spell `</s>`; it must not end there.
        loaded.encode_special_tokens = True
    except Exception as error:  # the package raises bare Exception
        raise QuestionError(f"{start}: not a tokenizers file: {' '.join(str(error).split()):.80}") from None
    ids: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
    eos = next((ids[n] for n in EOS_NAMES if n in ids), None)
    if eos is None:
        raise QuestionError(f"{start}: has no token that ends a document; one of {', '.join(EOS_NAMES)} is needed")
    bos = next((ids[n] for n in BOS_NAMES if n in ids), eos)
    pad = next((ids[n] for n in PAD_NAMES if n in ids), 0)
    # T5's files bring their own sentinels; ours are the highest ids of the model's vocabulary, and may cover these.
    size = 1 + max(i for token, i in ids.items() if not token.startswith("<extra_id_"))

    def encode(texts: Sequence[str]) -> list[NDArray[np.int64]]:
        try:
            found = loaded.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # for one, a character it has no token for, without a token for such
            raise QuestionError(f"{start}: cannot read a text: {' '.join(str(error).split()):.80}") from None
        return [np.asarray(one.ids, np.int64) for one in found]

    return Tokenizer(name, size, pad, eos, bos, encode)
