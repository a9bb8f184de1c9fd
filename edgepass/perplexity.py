"""Perplexity of a text, for an eager model or a lowered program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgepass.ops.errors import InvalidArgumentError

# For a window of token ids, the logits [len - 1, V] that predict all but its first.
WindowLogits = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Perplexity:
    """``perplexity`` over ``tokens`` tokens of text (those read; the first of a window is not
    scored)."""

    perplexity: float
    tokens: int


def read_tokens(tokenizer: Any, path: str | Path, limit: int | None) -> list[int]:
    """Return the first ``limit`` tokens of a file, tokenized as one string without special tokens.

    Raises InvalidArgumentError if the file cannot be read as UTF-8 or gives under two tokens.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"unreadable text: got text={path}, accepted are UTF-8 files"
        ) from error
    if limit is not None and limit < 2:
        raise InvalidArgumentError(f"too few tokens: got max_tokens={limit}, accepted are 2 on")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:limit]
    if len(tokens) < 2:
        raise InvalidArgumentError(
            f"text too short: got text={path} with {len(tokens)} tokens, accepted are 2 and more"
        )
    return tokens


def perplexity(
    tokens: list[int],
    context: int,
    window_logits: WindowLogits,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return exp of the mean negative log-likelihood over windows of ``context`` tokens.

    The windows are consecutive; each is scored from its second token on, so a last window of one
    token counts nothing. ``on_window`` is told the windows done and all.

    Raises InvalidArgumentError for a context below 2.
    """
    if context < 2:
        raise InvalidArgumentError(f"too small: got context={context}, accepted are 2 and more")
    windows = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    windows = [window for window in windows if len(window) > 1]
    total, count = 0.0, 0
    for done, window in enumerate(windows, 1):
        logits, targets = window_logits(window).double(), torch.tensor(window[1:])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(window) - 1
        if on_window is not None:
            on_window(done, len(windows))
    return Perplexity(math.exp(total / count), len(tokens))


def of_model(model: Any) -> WindowLogits:
    """Logits of an eager ``transformers`` model."""

    def logits(window: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([window[:-1]]), use_cache=False).logits[0]

    return logits


def of_program(decoder: Callable[[list[int], int], torch.Tensor]) -> WindowLogits:
    """Logits of a lowered program, which gives those of the last token: one step a token."""

    def logits(window: list[int]) -> torch.Tensor:
        return torch.stack([decoder([token], i).clone() for i, token in enumerate(window[:-1])])

    return logits
