"""Bytes and tokenizers files as ids, the vocabulary they need, and files that are none."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from hw_profiles.errors import QuestionError
from trainer.data import load_tokenizer, make_batches
from trainer.data.span_corruption import Noise, fit_shape
from trainer.data.stream import build_stream
from trainer_texts import BYTES, HERE, make_job


def write_tokenizer(folder: Path, *, special: tuple[str, ...] = ("<pad>", "</s>", "<unk>"), extra: int = 0) -> str:
    import tokenizers

    words = {word: i for i, word in enumerate([*special, "a", "b", "c"])}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.add_special_tokens([f"<extra_id_{i}>" for i in range(extra)])
    found.enable_truncation(2)
    found.enable_padding(length=9)
    found.save(str(folder / "words.json"))
    return "words.json"


def test_the_ids_of_bytes_begin_after_three_special_ones() -> None:
    assert (BYTES.size, BYTES.pad, BYTES.eos, BYTES.bos) == (259, 0, 1, 2)
    assert [ids.tolist() for ids in BYTES.encode(["a\0", "é"])] == [[100, 3], [198, 172]]


def test_a_tokenizers_file_gives_ids_and_special_tokens_but_cuts_and_fills_nothing(tmp_path: Path) -> None:
    found = load_tokenizer(write_tokenizer(tmp_path, extra=4), tmp_path)
    # Cutting and filling that the file asks for are left out, and its own sentinels do not count.
    assert [ids.tolist() for ids in found.encode(["a b c a", "x"])] == [[3, 4, 5, 3], [2]]
    assert (found.size, found.pad, found.eos, found.bos) == (6, 0, 1, 1)
    # What looks like a special token in a text is text.
    assert set(found.encode(["</s> a <extra_id_0>"])[0].tolist()) == {2, 3}
    wrong = dataclasses.replace(found, size=4)
    with pytest.raises(QuestionError, match=r"tokenizer = 'words.json': gives id 5; its vocabulary ends before 4"):
        build_stream(["a c"], wrong)
    (tmp_path / "one.txt").write_text("a b c")
    job = make_job(files=["one.txt"], tokenizer="words.json", vocab=6, sequences=1)
    assert next(make_batches(job, tmp_path, seed=0))["targets_BS"][0, :5].tolist() == [3, 4, 5, 1, 0]
    write_tokenizer(tmp_path, special=("</s>", "<unk>", "<s>"))
    assert next(make_batches(job, tmp_path, seed=0))["tokens_BS"][0, :4].tolist() == [2, 3, 4, 5]


def test_a_vocabulary_smaller_than_the_ids_is_refused() -> None:
    with pytest.raises(QuestionError, match=r"^model.vocab = 258: must be at least 259, for the 259 ids of .*'bytes'$"):
        make_batches(make_job(vocab=258), HERE, seed=0)
    shape = fit_shape(Noise(0.15, 3.0), 64, 32)
    rule = f"model.vocab = 260: must be at least {259 + shape.spans}, .* and {shape.spans} sentinels of span corruption"
    with pytest.raises(QuestionError, match=rule):
        make_batches(make_job(encoder=True, vocab=260), HERE, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("byte", None, "must be 'bytes' or a tokenizers file (.json) in the job's folder"),
        ("absent.json", None, "no such file in the folder of the job"),
        ("../x.json", None, "must lie in the job's folder, without '..'"),
        ("x.json", b"{", "not JSON"),
        ("x.json", b"[]", "not a tokenizers file (no JSON object)"),
        ("x.json", b"\xff", "not a text file (UTF-8)"),
        ("x.json", b'{"version": "1.0"}', "not a tokenizers file: "),
    ],
)
def test_a_bad_tokenizers_file_is_refused_by_name_and_rule(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(QuestionError) as caught:
        load_tokenizer(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"training.learning.data.tokenizer = {name!r}") and words in message
    assert "\n" not in message


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match="has no token that ends a document; one of </s>, "):
        load_tokenizer(write_tokenizer(tmp_path, special=("<pad>", "<unk>")), tmp_path)


def test_a_tokenizer_that_cannot_read_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a strange word")
    job = make_job(files=["one.txt"], tokenizer=write_tokenizer(tmp_path, special=("<pad>", "</s>")))
    with pytest.raises(QuestionError, match=r"tokenizer = 'words.json': cannot read a text: WordLevel error"):
        make_batches(job, tmp_path, seed=0)


def test_a_missing_tokenizers_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(QuestionError, match=r"needs the package tokenizers \(pip install tokenizers\); or use 'bytes'"):
        load_tokenizer(name, tmp_path)
