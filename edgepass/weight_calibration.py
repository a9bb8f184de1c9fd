"""The text that weight algorithms go by: whether a recipe needs one, and its chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from edgepass.calibration.chunks import chunks_of, read_chunks
from edgepass.calibration.recipe import Recipe
from edgepass.calibration.weight_rounding import NEED_STATISTICS
from edgepass.ops.errors import InvalidArgumentError

DEFAULT_TOKENS = 32768
_CHUNK = 512


def check_text(recipe: Recipe | None, text: Path | None, tokens: int | None) -> None:
    """Refuse an algorithm without the text that it needs, and a text that nothing reads.

    Raises InvalidArgumentError, before a model is loaded.
    """
    needing = sorted(recipe.algorithms() & NEED_STATISTICS) if recipe is not None else []
    if needing and text is None:
        raise InvalidArgumentError(
            f"no calibration text: got weight algorithm {needing[0]} without --calibration, "
            "accepted is a file of text, or an algorithm that needs none: rtn, hqq, mse"
        )
    if not needing and (text is not None or tokens is not None):
        raise InvalidArgumentError(
            f"got calibration={text} and calibration_tokens={tokens} for a recipe that reads no "
            f"text, accepted are weight algorithms {', '.join(sorted(NEED_STATISTICS))}"
        )


def read_text(tokenizer: Any, text: Path | None, tokens: int | None) -> Tensor | None:
    """The chunks int64 ``[C, T]`` of a text, None for no text.

    Raises CalibrationError for a text that cannot be read or is too short.
    """
    if text is None:
        return None
    wanted = DEFAULT_TOKENS if tokens is None else tokens
    return read_chunks(tokenizer, text, *chunks_of(wanted, _CHUNK))
