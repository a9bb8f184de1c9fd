"""Chunks: the first tokens of a text in order, and refusals that tell how many it has."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepass.calibration.chunks import chunks_of, read_chunks
from edgepass.ops.errors import CalibrationError, InvalidArgumentError
from tests.models.tiny_models import tiny_tokenizer

TEXT = "He said that\nthe tiny model knows nothing. " * 4


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(("length", "count"), [(2, 1), (7, 5), (40, 3)])
def test_chunks_are_the_text_s_first_tokens(text, length, count) -> None:
    tokenizer = tiny_tokenizer()
    chunks = read_chunks(tokenizer, text, length, count)
    assert chunks.shape == (count, length) and chunks.dtype == torch.int64
    expected = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert chunks.flatten().tolist() == expected[: length * count]


def test_no_more_is_read_than_needed(tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a" * 50}) + "\nno JSON\n")
    assert read_chunks(tiny_tokenizer(), path, 10, 5).shape == (5, 10)
    with pytest.raises(CalibrationError, match="line 2"):
        read_chunks(tiny_tokenizer(), path, 10, 6)


def test_documents_are_parted_by_the_end_token(tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("ab", "", "c")))
    tokenizer = tiny_tokenizer()
    a, b, c = tokenizer("abc")["input_ids"]
    end = tokenizer.eos_token_id
    assert read_chunks(tokenizer, path, 5, 1).tolist() == [[a, b, end, c, end]]
    tokenizer.eos_token = None
    assert read_chunks(tokenizer, path, 3, 1).tolist() == [[a, b, c]]


@pytest.mark.parametrize(("content", "found"), [("", 0), ("abcde", 5)])
def test_a_text_too_short_says_what_is_needed(tmp_path, content, found) -> None:
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(CalibrationError) as caught:
        read_chunks(tiny_tokenizer(), path, 3, 2)
    message = f"got {found} tokens in {path}, needed are 6 (2 x 3)"
    assert message in str(caught.value)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 0), (-3, -3)])
def test_impossible_chunks_are_refused(text, length, count) -> None:
    with pytest.raises(InvalidArgumentError, match=f"length={length} and count={count}"):
        read_chunks(tiny_tokenizer(), text, length, count)


@given(st.integers(2, 10_000), st.integers(2, 2048))
def test_chunks_of_use_all_but_a_rest(tokens, longest) -> None:
    length, count = chunks_of(tokens, longest)
    assert length <= longest and tokens - length < length * count <= tokens
    assert length == longest or count == 1


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="calibration_tokens=1, accepted are 2 and more"):
        chunks_of(1, 128)
