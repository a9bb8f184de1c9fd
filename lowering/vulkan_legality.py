"""What the Vulkan runtime computes right: the table of its operators' legal forms, and its reasons.

A row is one quantity of one operator. It has one column a runtime: the values with which that
runtime gives right numbers. Outside them it gives wrong ones without an error, or ends the
process. A newer runtime is a new column. The page ``docs/vulkan-legality.md`` is rendered from
here.

Measured on the runtime's sources of August 2026 over a software driver, or read from its shaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgepass.lowering.vulkan_declined import Refused

RUNTIME = "executorch-1.5.1"


@dataclass(frozen=True)
class OneOf:
    """The value is one of ``values``."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


@dataclass(frozen=True)
class Multiple:
    """The value is a multiple of ``step``, and at most ``most`` or one of ``others``."""

    step: int
    most: int | None = None
    others: tuple[int, ...] = ()

    def holds(self, value: Any) -> bool:
        if value in self.others:
            return True
        return value % self.step == 0 and value > 0 and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        bound = "" if self.most is None else f" up to {self.most}"
        others = "".join(f", and {other}" for other in self.others)
        return f"multiples of {self.step}{bound}{others}"


@dataclass(frozen=True)
class NotOneOf:
    """The value is none of ``values``."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return value not in self.values

    def __str__(self) -> str:
        return "other than " + " or ".join(map(str, self.values))


@dataclass(frozen=True)
class Untested:
    """What the lowering cannot see, as the values of an input: a limit for the user to know."""

    text: str

    def holds(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return self.text


Condition = OneOf | Multiple | NotOneOf | Untested


@dataclass(frozen=True)
class Row:
    """Which values of ``quantity`` each runtime computes right, and why not the others."""

    operator: str
    quantity: str
    accepted: Mapping[str, Condition]
    reason: str


def _row(operator: str, quantity: str, accepted: Condition, reason: str) -> Row:
    return Row(operator, quantity, {RUNTIME: accepted}, reason)


DYNAMIC, WEIGHT_ONLY = "et_vk.linear_dq8ca_q4gsw", "et_vk.linear_q4gsw"
CHOOSE, EMBEDDING = "torchao.choose_qparams_affine", "et_vk.embedding_q4gsw"
NORM, ROTARY = "et_vk.rms_norm", "et_vk.apply_rotary_emb_hf"
ATTENTION, VIEW, SPLIT = "llama.sdpa_with_kv_cache", "aten.view_copy", "aten.split_with_sizes_copy"
GELU, SQUEEZE = "aten.gelu", "aten.squeeze_copy"
LINEAR_OF_FLOATS, EMBEDDING_OF_FLOATS = "aten.linear", "aten.embedding"

_PARAMETERS = "the runtime packs weights when it loads, so they must be constants"
_DTYPES = "the shader reads the scales in the output's dtype: other scales are misread, 0 dB"
_FLOATS = OneOf(("float32", "float16"))
_INPUT = "an input of the program"
_NULL = "it is read on the device: a number that enters a delegate is serialised as null"

TABLE: tuple[Row, ...] = (
    _row(DYNAMIC, "parameters", OneOf(("constant",)), _PARAMETERS),
    _row(DYNAMIC, "activation dtype", _FLOATS, "there are no other shaders"),
    _row(DYNAMIC, "scales dtype", OneOf(("that of the activation",)), _DTYPES),
    _row(
        *(DYNAMIC, "bias dtype", OneOf(("none", "float32"))),
        "a float16 bias is misread, 0 dB: it is added by aten.add",
    ),
    _row(
        *(DYNAMIC, "zero points", OneOf((0,))),
        "the runtime drops them, 7 dB: the kernel is symmetric",
    ),
    _row(DYNAMIC, "rank", OneOf((2, 3)), "outputs are given 2 or 3 sizes"),
    _row(
        *(DYNAMIC, "batch", OneOf((1,))),
        "encodings are chosen for one matrix: a batch ends the process",
    ),
    _row(DYNAMIC, "K", Multiple(4), "columns are read 4 at a time: another K ends the process"),
    _row(
        *(DYNAMIC, "N", Multiple(8)),
        "group sums are padded to 8 rows and read with a stride of 4, 6 to 11 dB",
    ),
    _row(
        *(DYNAMIC, "group size", Multiple(4, 64, (128,))),
        "a longer group is summed twice over by the shader that quantizes activations, -7 dB",
    ),
    _row(
        *(DYNAMIC, "tokens", Untested("1: the activation is not quantized; more: it is")),
        "the kernel for one token is weight-only, as are all on a GPU without integer dot products",
    ),
    _row(WEIGHT_ONLY, "parameters", OneOf(("constant",)), _PARAMETERS),
    _row(WEIGHT_ONLY, "activation dtype", _FLOATS, "there are no other shaders"),
    _row(WEIGHT_ONLY, "scales dtype", OneOf(("that of the activation",)), _DTYPES),
    _row(
        *(WEIGHT_ONLY, "bias dtype", OneOf(("none", "float32"))),
        "a float16 bias is misread, 0 dB: it is added by aten.add",
    ),
    _row(WEIGHT_ONLY, "zero points", OneOf((0,)), "the kernel is symmetric"),
    _row(WEIGHT_ONLY, "rank", OneOf((2, 3)), "outputs are given 2 or 3 sizes"),
    _row(WEIGHT_ONLY, "batch", OneOf((1,)), "only the first matrix is computed, 2.8 dB or NaN"),
    _row(
        *(WEIGHT_ONLY, "K", Multiple(8)),
        "K is read off the packed weight, whose rows are whole words of 8 columns",
    ),
    _row(WEIGHT_ONLY, "N", Multiple(8), "rows are packed 8 at a time"),
    _row(
        *(WEIGHT_ONLY, "group size", Multiple(4)),
        "a scale is read once for each 4 columns: group 50 gives 3.7 dB",
    ),
    _row(
        *(CHOOSE, "batch", OneOf((1,))),
        "encodings are chosen for one matrix: a batch ends the process",
    ),
    _row(
        *(CHOOSE, "range of a row", Untested("0, or more than 1e-9 in float32, 0.016 in float16")),
        "scales below 6.1e-5 are raised to that; in float32 the activation is multiplied by a "
        "power of two, and the weight's scales divided by it",
    ),
    _row(EMBEDDING, "parameters", OneOf(("constant",)), _PARAMETERS),
    _row(EMBEDDING, "bits", OneOf((4,)), "the runtime looks up 4-bit tables"),
    _row(EMBEDDING, "zero points", OneOf((0,)), "the runtime knows none"),
    _row(EMBEDDING, "K", Multiple(32), "rows are read in blocks of 32 columns"),
    _row(EMBEDDING, "group size", Multiple(4), "a scale is read once for each 4 columns"),
    _row(EMBEDDING, "rank of the ids", OneOf((1, 2)), "results of higher rank were not tried"),
    _row(EMBEDDING, "ids", Untested("0 to V - 1"), "no bounds are checked"),
    _row(NORM, "weight", OneOf(("constant",)), _PARAMETERS),
    _row(NORM, "rank", OneOf((2, 3, 4)), "results of other ranks were not tried"),
    _row(ROTARY, "pairs", OneOf(("halves",)), "neighbours turn in another operator"),
    _row(ROTARY, "batch", OneOf((1,)), "one sequence is rotated"),
    _row(ROTARY, "channels of a head", Multiple(4), "channels are read 4 at a time"),
    _row(ROTARY, "rotated channels", Multiple(8), "halves are read 4 channels at a time"),
    _row(ROTARY, "position", OneOf((_INPUT,)), _NULL),
    _row(ATTENTION, "batch", OneOf((1,)), "one sequence is attended to"),
    _row(ATTENTION, "channels of a head", Multiple(4), "channels are read 4 at a time"),
    _row(ATTENTION, "window", OneOf(("none",)), "all rows of the cache are attended to"),
    _row(ATTENTION, "cap of the scores", OneOf(("none",)), "scores are not capped"),
    _row(ATTENTION, "caches", OneOf((2,)), "keys and values are written before they are read"),
    _row(ATTENTION, "cache content", OneOf(("zeros",)), "the caches are the delegate's own"),
    _row(ATTENTION, "position", OneOf((_INPUT,)), _NULL),
    _row(
        *(ATTENTION, "rows", Untested("position and tokens, together, within the cache")),
        "no bounds are checked",
    ),
    _row(
        *(VIEW, "dynamic sizes", OneOf((0, 1))),
        "one is inferred from the others; a symbol would have to be computed on the device",
    ),
    _row(
        *(SPLIT, "dynamic sizes", OneOf((0,))),
        "outputs are never resized, garbage: aten.slice_copy takes its place",
    ),
    _row(LINEAR_OF_FLOATS, "parameters", OneOf(("constant",)), _PARAMETERS),
    _row(EMBEDDING_OF_FLOATS, "parameters", OneOf(("constant",)), _PARAMETERS),
    _row(GELU, "approximate", OneOf(("tanh",)), "the runtime has no other form"),
    _row(SQUEEZE, "dimension", NotOneOf((0,)), "the first is not resized"),
)


def require(operator: str, facts: Mapping[str, Any], runtime: str = RUNTIME) -> None:
    """Raise :class:`Refused` at the first row of ``operator`` that ``facts`` break.

    ``facts`` gives the values of the operator's quantities; those it lacks are not checked.
    """
    for row in TABLE:
        if row.operator != operator or row.quantity not in facts:
            continue
        value, accepted = facts[row.quantity], row.accepted[runtime]
        if not accepted.holds(value):
            raise Refused(f"{row.quantity} {value}: accepted are {accepted} ({row.reason})")


def accepted(operator: str, quantity: str, runtime: str = RUNTIME) -> Condition:
    """Return the condition of one row. Raises KeyError for a row that is not there."""
    for row in TABLE:
        if (row.operator, row.quantity) == (operator, quantity):
            return row.accepted[runtime]
    raise KeyError(f"{operator}, {quantity}")
