"""The one place that orders passes."""

from __future__ import annotations

from edgepass.passes.attention import FuseCachedAttention
from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.int8_linear import FuseInt8Linear
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.positions import FoldPositions
from edgepass.passes.quantized_embedding import FuseQuantizedEmbedding
from edgepass.passes.quantized_linear import FuseQuantizedLinear, ShareActivationQuantization
from edgepass.passes.rms_norm import FuseRmsNorm
from edgepass.passes.rope import FuseRotary


def fusion_pipeline(*, int8_weights: bool = False) -> Pipeline:
    """From a raw program to fused operators; every backend starts from its result.

    ``int8_weights`` is for backends that compute linears of int8 weights.
    """
    return Pipeline(
        [
            Canonicalize(),
            FuseCachedAttention(),
            FuseRotary(),
            FuseRmsNorm(),
            FoldPositions(),
            ShareActivationQuantization(),
            FuseQuantizedLinear(),
            *([FuseInt8Linear()] if int8_weights else []),
            FuseQuantizedEmbedding(),
        ]
    )
