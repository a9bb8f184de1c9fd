"""Linears of quantized weights, in either dialect and every spelling, as one operator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgepass.passes.cancel_views import JoinReshapes
from edgepass.passes.explain_linears import LinearRow, explain_linears
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.quantized_linear_rules import DynamicallyQuantizedLinear, WeightOnlyLinear
from edgepass.passes.rule import RewriteRule
from edgepass.passes.share_activation_quantization import ShareActivationQuantization

__all__ = ["FuseQuantizedLinear", "LinearRow", "ShareActivationQuantization", "explain_linears"]


@dataclass(frozen=True)
class FuseQuantizedLinear(GraphPass):
    """Fuse quantize, dequantize and linear into ``edgepass::linear_qta8a_qga4w``.

    What it does: a linear (``linear``, ``matmul``, or ``addmm``, ``mm``, ``bmm`` with their
    views) of a dynamically quantized activation and an int4 weight becomes one operator on the
    activation's ``edgepass::quantize_per_token``, of which there is one for each activation. With
    a float activation it becomes ``edgepass::linear_qga4w``. Both dialects, torchao and
    quantized_decomposed; symmetric and asymmetric groups, whose zero points may be floats; signed
    and unsigned 4-bit values. A weight used twice is packed once.

    Before: ``linear(dq(q(x, scale, zero), scale, zero), dequantize(w, w_scales, w_zeros), bias)``
    After: ``linear_qta8a_qga4w(*quantize_per_token(x), packed, group, w_scales, w_zeros, bias)``

    Refuses when: the weight is no constant ``[N, K]``, has values beyond 4 bits, blocks other than
    groups of a row, whole zero points beyond int8, or scales that the result's dtype cannot hold;
    the activation is not asymmetric int8 per token over -128..127; a view mixes K with rows.

    Numerics: exact integer sums, scaled in float32: 100 dB or better. The decomposed dialect adds
    the zero point before it rounds, edgepass after: a value half-way may round the other way.

    Backends: all.
    """

    name: ClassVar[str] = "fuse-quantized-linear"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "quantized parameters must be unwrapped to be read"),
        Order("share-activation-quantization", "else an activation is quantized for each linear"),
    )
    agreement_db: ClassVar[float] = 100.0
    rounding_flip_db: ClassVar[float | None] = 30.0

    def rules(self) -> Sequence[RewriteRule]:
        return (DynamicallyQuantizedLinear(), WeightOnlyLinear(), JoinReshapes())
