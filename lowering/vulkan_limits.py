"""What the Vulkan runtime's quantized operators compute right, as tables of conditions.

Measured on the runtime (August 2026) over a software driver. Outside these limits it gives wrong
numbers without an error, or ends the process, so whatever breaks one stays outside the delegate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edgepass.lowering.vulkan_declined import Refused

Shape = TypeVar("Shape")


@dataclass(frozen=True)
class LinearShape:
    """A linear ``[batch.., M, K] -> [.., M, N]`` of group-quantized weights.

    ``lead`` are the sizes before M, -1 for a dynamic one; ``tokens`` is M, -1 if dynamic.
    ``dtypes`` are those of the activation and of the scales.
    ``dynamic_activation`` tells whether the activation is quantized per token.
    """

    rank: int
    lead: tuple[int, ...]
    tokens: int
    k: int
    n: int
    group_size: int
    symmetric: bool
    constant: bool
    dtypes: tuple[str, str]
    dynamic_activation: bool


@dataclass(frozen=True)
class EmbeddingShape:
    """A table ``[V, K]`` of ``bits`` a value in groups of ``group_size``."""

    k: int
    group_size: int
    bits: int
    symmetric: bool
    constant: bool
    ids_rank: int


@dataclass(frozen=True)
class Limit(Generic[Shape]):
    """One condition and the reason when it does not hold, a format of the shape's fields."""

    holds: Callable[[Shape], bool]
    reason: str


# The activation shader adds up the groups' sums wrongly for 96, 100, 256, 512 and whole rows.
_DYNAMIC_GROUPS = frozenset(range(4, 65, 4)) | {128}

LINEAR: Sequence[Limit[LinearShape]] = (
    Limit(lambda s: s.constant, "its weight, scales, zero points or bias are not constants"),
    Limit(
        lambda s: s.dtypes in (("float32", "float32"), ("float16", "float16")),
        "activation and scales are {dtypes}: both must be float32 or both float16",
    ),
    Limit(lambda s: s.symmetric, "asymmetric weights: the runtime drops their zero points"),
    Limit(lambda s: s.rank in (2, 3), "an activation of rank {rank}: 2 and 3 are taken"),
    Limit(lambda s: all(size == 1 for size in s.lead), "batch {lead} is not 1"),
    Limit(lambda s: s.k % 4 == 0, "K={k} is not a multiple of 4"),
    Limit(lambda s: s.n % 8 == 0, "N={n} is not a multiple of 8"),
    Limit(lambda s: s.group_size % 4 == 0, "group size {group_size} is not a multiple of 4"),
    Limit(
        lambda s: not s.dynamic_activation or s.group_size in _DYNAMIC_GROUPS,
        "group size {group_size} with quantized activations: 4 to 64 and 128 are right",
    ),
    Limit(
        lambda s: s.dynamic_activation or 32 <= s.group_size <= 512,
        "group size {group_size} with float activations: 32 to 512 are right",
    ),
    Limit(
        lambda s: s.dynamic_activation or s.k % 8 == 0,
        "K={k} with float activations is not a multiple of 8",
    ),
)

EMBEDDING: Sequence[Limit[EmbeddingShape]] = (
    Limit(lambda s: s.constant, "its table, scales or zero points are not constants"),
    Limit(lambda s: s.bits == 4, "{bits} bits: the runtime looks up 4-bit tables"),
    Limit(lambda s: s.symmetric, "asymmetric table: the runtime knows no zero points"),
    Limit(lambda s: s.k % 32 == 0, "K={k} is not a multiple of 32"),
    Limit(lambda s: s.group_size % 4 == 0, "group size {group_size} is not a multiple of 4"),
    Limit(lambda s: s.ids_rank in (1, 2), "ids of rank {ids_rank}: 1 and 2 are taken"),
)


def keeps(limits: Sequence[Limit[Shape]], shape: Shape) -> bool:
    """Tell whether ``shape`` breaks none of the limits."""
    return all(limit.holds(shape) for limit in limits)


def require(limits: Sequence[Limit[Shape]], shape: Shape) -> None:
    """Raise :class:`Refused` with the reason of the first limit that ``shape`` breaks."""
    for limit in limits:
        if not limit.holds(shape):
            raise Refused(limit.reason.format(**vars(shape)))
