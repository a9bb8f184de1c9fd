"""Texts to calibrate on, read as a stream: plain text, and JSONL with texts or chats."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edgepass.ops.errors import CalibrationError

_BLOCK = 1 << 20
_LONGEST = 64 * _BLOCK
_JSON_LINES = (".jsonl", ".ndjson")


class Document(NamedTuple):
    """A text, and whether the tokenizer's end token belongs behind it."""

    text: str
    wants_end: bool = False


def read_documents(path: str | Path, tokenizer: Any = None) -> Iterator[Document]:
    """Yield the documents of a file in their order; no more than one is held in memory.

    A ``.jsonl`` or ``.ndjson`` file has one JSON object a line (of up to 64 MiB), with either
    ``text`` (a string) or ``messages`` (a chat, spelt out by the tokenizer's chat template); other
    keys are ignored. Any other file is one text, given in pieces of a MiB or more that end where a
    line begins with a word.

    Raises CalibrationError for a file that cannot be read, is not UTF-8 (with the byte), or has a
    line that is no such object (with its number).
    """
    pieces = _decoded(Path(path))
    if Path(path).suffix.lower() in _JSON_LINES:
        yield from _json_documents(pieces, path, tokenizer)
    else:
        yield from map(Document, _whole_lines(pieces))


def _decoded(path: Path) -> Iterator[str]:
    """The text of the file, block by block."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(_BLOCK)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    place = start - pending + error.start
                    raise _foreign(
                        path, f"the byte {error.object[error.start]:#04x}", place
                    ) from error
                if "\0" in text:  # UTF-16 of English text is valid UTF-8, but for this
                    before = len(text[: text.index("\0")].encode())
                    raise _foreign(path, "a zero byte", start - pending + before)
                if start == 0:
                    text = text.removeprefix("\ufeff")
                if not block:
                    return
                start += len(block)
                yield text
    except OSError as error:
        raise CalibrationError(
            f"unreadable calibration text: got {path} ({error.strerror}), accepted are files of "
            "text or JSONL"
        ) from error


def _foreign(path: Path, what: str, place: int) -> CalibrationError:
    return CalibrationError(
        f"foreign encoding: got {path} with {what} at byte {place}, accepted is UTF-8"
    )


def _whole_lines(pieces: Iterator[str]) -> Iterator[str]:
    """Cut so that a tokenizer sees the same words: where a line begins with none of its space."""
    rest = ""
    for piece in pieces:
        rest += piece
        cut = _last_line_start(rest)
        if not cut and len(rest) > 4 * _BLOCK:  # no lines: between words, or anywhere
            cut = max(rest.rfind(" "), 0) or len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_line_start(text: str) -> int:
    """Where the last line that begins with a letter or sign starts; 0 if none does."""
    place = len(text)
    while (place := text.rfind("\n", 0, place)) >= 0:
        if place + 1 < len(text) and not text[place + 1].isspace():
            return place + 1
    return 0


def _json_documents(pieces: Iterator[str], path: Any, tokenizer: Any) -> Iterator[Document]:
    for number, line in enumerate(_lines(pieces), 1):
        if line.strip():
            try:
                yield _document(line, tokenizer)
            except CalibrationError as error:
                raise CalibrationError(f"{path}, line {number}: {error}") from error


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Lines that end at a newline alone: JSON strings may hold the other separators."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
        if len(rest) > _LONGEST:
            yield rest  # refused for its length
    if rest:
        yield rest


def _document(line: str, tokenizer: Any) -> Document:
    if len(line) > _LONGEST:
        raise CalibrationError(f"got {len(line)} characters, accepted are up to {_LONGEST}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"not JSON: {error}; accepted is one object a line") from error
    given = [key for key in ("text", "messages") if isinstance(row, dict) and key in row]
    if len(given) != 1:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(
            f"got {keys or 'no keys'}, accepted are objects with either text or messages"
        )
    text = row["text"] if given == ["text"] else _chat(row["messages"], tokenizer)
    if not isinstance(text, str):
        raise CalibrationError(f"got text={text!r:.40}, accepted are strings")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(f"got text with half a character: {error.reason}") from error
    return Document(text, wants_end=given == ["text"])


def _chat(messages: Any, tokenizer: Any) -> str:
    """The chat as the model's own template spells it."""
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages)
    ):
        raise CalibrationError(
            f"got messages={messages!r:.40}, accepted are lists of objects with role and content"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "got messages for a tokenizer without a chat template, accepted are objects with text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (
        Exception
    ) as error:  # a template is a program of the checkpoint's, and may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"got messages that the chat template refuses ({reason}), accepted are those it takes"
        ) from error
