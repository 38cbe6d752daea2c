"""The text of a file that somebody names, gzip or plain, bounded before and after it is unpacked."""

from __future__ import annotations

import zlib
from pathlib import Path

from hw_profiles.errors import QuestionError
from hw_profiles.files import read_bytes

# Events are read one by one and only what is timed is kept: a profile of 200 MB took 0.74 GB and 14 s (November 2026).
MAX_BYTES = 500_000_000
_GZIP = b"\x1f\x8b"
_AT_ONCE = 1 << 20


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """The text in `path`, unpacked if it is gzip; QuestionError for what is larger than `most` bytes, cut or binary."""
    start = str(path)
    data = read_bytes(path, most, start)
    if data.startswith(_GZIP):
        data = _unpacked(data, most, start)
    if not data.strip():
        raise QuestionError(f"{start}: is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule = "not text (UTF-8); Perfetto's binary traces and Parquet files are not read here"
        raise QuestionError(f"{start}: byte {error.start}: {rule}") from None


def _unpacked(data: bytes, most: int, start: str) -> bytes:
    """All members of a gzip file. Unpacked piece by piece: a small file may stand for any number of bytes."""
    out, size = [], 0
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            try:
                piece = member.decompress(data, _AT_ONCE)
            except zlib.error as error:
                raise QuestionError(f"{start}: damaged gzip: {str(error).partition(': ')[2] or error}") from None
            data = member.unconsumed_tail
            out.append(piece)
            size += len(piece)
            if size > most:
                raise QuestionError(f"{start}: more than {most:,} bytes when unpacked; at most that many are read")
            if not member.eof and not data and len(piece) < _AT_ONCE:
                raise QuestionError(f"{start}: truncated gzip: it ends after {size:,} bytes of its text")
        # Some tools pad the last member with zeros.
        data = member.unused_data.lstrip(b"\0")
    return b"".join(out)
