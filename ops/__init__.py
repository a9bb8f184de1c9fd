"""Custom operators and the numerics that they share. Imports torch and numpy only.

Importing this package registers the operators of the ``edgepass`` namespace with torch.
"""

from edgepass.ops import (
    attention,
    embedding,
    linear,
    linear_int8,
    masked_attention,
    norm,
    quantize,
    rotary,
)
from edgepass.ops.packing import (
    dequantize_groups,
    dequantize_int4,
    pack_embedding_int4,
    pack_int4,
    swap_nibbles,
    unpack_embedding_int4,
    unpack_int4,
)
from edgepass.ops.weight_cache import set_weight_cache_limit

__all__ = [
    "attention",
    "dequantize_groups",
    "dequantize_int4",
    "embedding",
    "linear",
    "linear_int8",
    "masked_attention",
    "norm",
    "pack_embedding_int4",
    "pack_int4",
    "quantize",
    "rotary",
    "set_weight_cache_limit",
    "swap_nibbles",
    "unpack_embedding_int4",
    "unpack_int4",
]
