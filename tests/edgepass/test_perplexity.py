"""Perplexity against its definition, written once more in plain float64."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepass.models.decoder import StaticCacheDecoder
from edgepass.ops.errors import InvalidArgumentError
from edgepass.perplexity import of_model, of_program, perplexity, read_tokens
from tests.models.tiny_models import tiny_model, tiny_tokenizer

VOCABULARY = 96
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=40)


def by_definition(tokens: list[int], context: int, model) -> float:
    """exp of the mean of -log p(token | the window so far), token by token."""
    losses = []
    for i, token in enumerate(tokens):
        if i % context:
            window = torch.tensor([tokens[i - i % context : i]])
            losses.append(-model(window).logits[0, -1].double().log_softmax(-1)[token].item())
    return math.exp(sum(losses) / len(losses))


def uniform(window: list[int]) -> torch.Tensor:
    return torch.zeros(len(window) - 1, VOCABULARY)


@given(TOKENS, st.integers(2, 50))
def test_a_uniform_model_has_the_vocabulary_as_perplexity(tokens: list[int], context: int) -> None:
    found = perplexity(tokens, context, uniform)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-9)
    assert found.tokens == len(tokens)


@given(TOKENS, st.integers(2, 12))
def test_windows_do_not_overlap_and_are_scored_from_the_second_token_on(
    tokens: list[int], context: int
) -> None:
    seen: list[list[int]] = []

    def recorded(window: list[int]) -> torch.Tensor:
        seen.append(window)
        return uniform(window)

    perplexity(tokens, context, recorded)
    whole = [tokens[i : i + context] for i in range(0, len(tokens), context)]
    assert seen == [window for window in whole if len(window) > 1]


@pytest.mark.parametrize(("count", "context"), [(30, 10), (31, 10), (25, 10), (9, 40)])
def test_equals_the_definition(count: int, context: int) -> None:
    model = tiny_model()
    tokens = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))
    found = perplexity(tokens.tolist(), context, of_model(model)).perplexity
    assert found == pytest.approx(by_definition(tokens.tolist(), context, model), rel=1e-4)


def test_a_program_gives_what_the_model_gives() -> None:
    model = tiny_model("qwen3")
    decoder = StaticCacheDecoder(model, 8)

    def step(tokens: list[int], position: int) -> torch.Tensor:
        return decoder(torch.tensor([tokens]), torch.tensor([position])).reshape(-1)

    tokens = list(range(3, 27))
    expected = perplexity(tokens, 8, of_model(model)).perplexity
    assert perplexity(tokens, 8, of_program(step)).perplexity == pytest.approx(expected, rel=1e-4)


def test_tells_each_window() -> None:
    told: list[tuple[int, int]] = []
    perplexity([5] * 21, 10, uniform, lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_reads_the_file_as_one_string_without_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("He said\nno", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    expected = tokenizer("He said\nno", add_special_tokens=False)["input_ids"]
    assert read_tokens(tokenizer, path, None) == expected
    assert read_tokens(tokenizer, path, 4) == expected[:4]


@pytest.mark.parametrize("content", [b"", b"a", b"\xff\xfe\x00", None])
def test_an_unusable_text_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=f"got text={path}"):
        read_tokens(tiny_tokenizer(), path, None)


@pytest.mark.parametrize("limit", [-5, 0, 1])
def test_too_few_tokens_are_refused(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "text"
    path.write_text("some text")
    with pytest.raises(InvalidArgumentError, match=f"max_tokens={limit}"):
        read_tokens(tiny_tokenizer(), path, limit)


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_a_context_below_two_is_refused(context: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"context={context}"):
        perplexity([1, 2, 3], context, uniform)
