"""Documents as chunks of tokens: full ones, in the order of the text, nothing padded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepass.calibration.documents import read_documents
from edgepass.ops.errors import CalibrationError, InvalidArgumentError


def read_chunks(tokenizer: Any, path: str | Path, length: int, count: int) -> Tensor:
    """Return the first ``count * length`` tokens of a file as int64 ``[count, length]``.

    The file is read only as far as these need, see ``read_documents``. No special tokens are added,
    but each ``text`` of a JSONL file is followed by the tokenizer's end token, if it has one.

    Raises CalibrationError for a text that cannot be read or has fewer tokens (both numbers are
    told), InvalidArgumentError for a ``length`` below 2 or a ``count`` below 1.
    """
    if length < 2 or count < 1:
        raise InvalidArgumentError(
            f"calibration chunks: got length={length} and count={count}, accepted are lengths of 2 "
            "and more and counts of 1 and more"
        )
    needed, found = length * count, []
    for tokens in _tokenized(tokenizer, path):
        found.extend(tokens)
        if len(found) >= needed:
            return torch.tensor(found[:needed]).reshape(count, length)
    raise CalibrationError(
        f"calibration text too short: got {len(found)} tokens in {path}, needed are {needed} "
        f"({count} x {length}); give more text or ask for fewer tokens"
    )


def chunks_of(tokens: int, longest: int) -> tuple[int, int]:
    """The (length, count) of chunks for ``tokens`` tokens where a chunk has at most ``longest``.

    A rest that fills no chunk is left out. Raises InvalidArgumentError for under two tokens.
    """
    if tokens < 2:
        raise InvalidArgumentError(
            f"too few tokens: got calibration_tokens={tokens}, accepted are 2 and more"
        )
    length = min(tokens, longest)
    return length, tokens // length


def _tokenized(tokenizer: Any, path: str | Path) -> Iterator[list[int]]:
    for document in read_documents(path, tokenizer):
        tokens = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if tokens and document.wants_end and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        yield tokens
