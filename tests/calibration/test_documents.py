"""Calibration texts: what is read from each kind of file, and what is refused, by byte or line."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepass.calibration import documents
from edgepass.calibration.documents import read_documents
from edgepass.ops.errors import CalibrationError
from tests.models.tiny_models import tiny_tokenizer


def write(tmp_path, content, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, tokenizer=None):
    return [each.text for each in read_documents(path, tokenizer)]


def jsonl(tmp_path, *rows):
    return write(tmp_path, "\n".join(json.dumps(row) for row in rows), "text.jsonl")


@given(st.text(st.sampled_from("ab \n\téß漢😀"), max_size=80), st.integers(1, 9))
def test_pieces_add_up_to_the_text_wherever_a_block_ends(tmp_path_factory, text, block) -> None:
    path = write(tmp_path_factory.mktemp("text"), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BLOCK", block)
        pieces = texts(path)
    assert "".join(pieces) == text
    # A word is cut only where the text offers nothing better.
    for piece, following in pairwise(pieces):
        assert piece[-1] == "\n" or following[0] == " " or " " not in piece[1:]


def test_pieces_are_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "_BLOCK", 8)
    for text in ("word " * 100, "x" * 500, "line\n" * 100, "\n\n  " * 100):
        pieces = texts(write(tmp_path, text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 5 * 8


def test_a_byte_order_mark_is_no_text(tmp_path) -> None:
    assert texts(write(tmp_path, b"\xef\xbb\xbfhello")) == ["hello"]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("für".encode("latin-1"), "with the byte 0xfc at byte 1, accepted is UTF-8"),
        (b"abc\xe6\xbc", "with the byte 0xe6 at byte 3,"),
        (b"ab\xc3\xa9\xff", "with the byte 0xff at byte 4,"),
        ("hello".encode("utf-16"), "with the byte 0xff at byte 0,"),
        ("é hello".encode("utf-16-le"), "with the byte 0xe9 at byte 0,"),
        ("hello".encode("utf-16-le"), "with a zero byte at byte 1,"),
        (b"\xef\xbb\xbfhe\0", "with a zero byte at byte 5,"),
    ],
)
def test_a_foreign_encoding_is_refused_with_its_byte(
    tmp_path, monkeypatch, content, message, block
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    with pytest.raises(CalibrationError) as caught:
        texts(write(tmp_path, content))
    assert message in str(caught.value) and "text.txt" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", ""])
def test_what_cannot_be_read_is_refused(tmp_path, name) -> None:
    with pytest.raises(CalibrationError, match=r"unreadable calibration text: got .* \("):
        texts(tmp_path / name)


def test_json_lines_with_texts(tmp_path) -> None:
    rows = [{"text": "one\u2028two\n", "id": 3}, {"text": "three"}]
    path = write(tmp_path, "\n\n".join(map(json.dumps, rows)) + "\n", "text.JSONL")
    found = list(read_documents(path))
    assert found == [("one\u2028two\n", True), ("three", True)]


def test_chats_are_spelt_by_the_template(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    found = list(read_documents(jsonl(tmp_path, {"messages": chat}), tokenizer))
    assert found == [("[user]Hi[assistant]Yes?", False)]


def test_the_smallest_refusal_of_a_template_is_one_line(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = jsonl(tmp_path, {"text": "a"}, {"messages": [{"role": "user", "content": "b"}]})
    with pytest.raises(CalibrationError, match=r"line 2: .*refuses \(roles must alternate\)"):
        texts(path, tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ('"text"', "got str, accepted are objects with either text or messages"),
        ("{}", "got no keys, accepted are"),
        ('{"prompt": "a", "id": 1}', "got prompt, id, accepted are"),
        ('{"text": "a", "messages": []}', "got text, messages, accepted are"),
        ('{"text": 5}', "got text=5, accepted are strings"),
        ('{"text": "\\ud800"}', "got text with half a character"),
        ('{"messages": []}', r"got messages=\[\], accepted are lists of objects"),
        ('{"messages": [{"content": "a"}]}', "accepted are lists of objects with role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "without a chat template"),
    ],
)
def test_a_line_that_is_no_document_is_refused(tmp_path, line, message) -> None:
    path = write(tmp_path, f'{{"text": "fine"}}\n{line}\n', "text.jsonl")
    with pytest.raises(CalibrationError, match=rf"text\.jsonl, line 2: .*{message}") as caught:
        texts(path, tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "_BLOCK", 8)
    monkeypatch.setattr(documents, "_LONGEST", 64)
    with pytest.raises(
        CalibrationError, match=r"line 1: got 7\d characters, accepted are up to 64"
    ):
        texts(jsonl(tmp_path, {"text": "x" * 1000}))
