"""Bounds that the runtime does not check: it would go on with whatever lies there."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from edgepass.ops.errors import InvalidArgumentError, SimulatorError


def check_rows(what: str, start: int, count: int, rows: int) -> None:
    """Refuse rows ``start .. start + count - 1`` outside a table or cache of ``rows`` rows."""
    if start < 0 or start + count > rows:
        raise InvalidArgumentError(
            f"position outside the {what}: got position={start} with {count} tokens, accepted "
            f"are positions from 0 and at most {rows} together"
        )


def check_ids(what: str, ids: Tensor, rows: int) -> None:
    """Refuse indices outside ``0 .. rows - 1``."""
    wrong = ids[(ids < 0) | (ids >= rows)]
    if wrong.numel():
        raise InvalidArgumentError(
            f"id outside the {what}: got id={int(wrong[0])}, accepted are 0 to {rows - 1}"
        )


def check_size(sizes: Iterable[int], largest: Iterable[int], what: str) -> None:
    """Refuse to make a tensor larger than the program says that it can become."""
    sizes, most = list(sizes), math.prod(largest)
    if any(size < 0 for size in sizes) or math.prod(sizes) > most:
        raise SimulatorError(
            f"{what}: sizes={sizes}, accepted are at most the {most} values that the program "
            "keeps for the result"
        )
