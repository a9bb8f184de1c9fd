"""Attention whose KV caches are inputs and outputs, in the plain operators that HTP quantizes.

A model whose ``config._attn_implementation`` is :data:`CACHE_IO_ATTENTION` asks this module for its
masks and attention, as it does in ``attention.py``. Here the mask is an input of the graph, keys
are kept transposed, and the grouped heads of a query are folded into its rows, so that each matmul
reads the joined cache itself and nothing repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from edgepass.models.attention import refuse_other_terms, static_cache_mask
from edgepass.ops.errors import CheckpointError

CACHE_IO_ATTENTION = "edgepass_cache_io"


class CacheIoLayer(CacheLayerMixin):
    """One layer's caches, given as ``keys [1, Hkv, D, P]`` and ``values [1, Hkv, P, D]``, or None.

    ``new`` holds what the layer computed for the new tokens after the forward: keys
    ``[1, Hkv, D, S]`` and values ``[1, Hkv, S, D]``.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, caches: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.caches = caches
        self.new: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the caches are inputs."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember the new rows; return old and new, ``[1, Hkv, D, C]`` and ``[1, Hkv, C, D]``."""
        self.new = key_states.transpose(2, 3), value_states
        if self.caches is None:
            return self.new
        return (
            torch.cat([self.caches[0], self.new[0]], dim=-1),
            torch.cat([self.caches[1], self.new[1]], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = 0 if self.caches is None else self.caches[0].shape[-1]
        return past + query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class CacheIo(Cache):
    """One :class:`CacheIoLayer` a layer. ``masks`` are the additive masks by window, 0 for full."""

    def __init__(
        self, caches: Sequence[tuple[Tensor, Tensor] | None], masks: dict[int, Tensor]
    ) -> None:
        super().__init__(layers=[CacheIoLayer(each) for each in caches])
        self.given = _GivenMasks(masks)

    def get_query_offset(self, layer_idx: int = 0) -> _GivenMasks:
        # transformers hands this value unread to the mask function.
        return self.given

    def new_rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the layers computed: new keys ``[1, Hkv, D, S]`` and values ``[1, Hkv, S, D]``.

        Raises:
            CheckpointError: a layer did not write its own cache (it shares another layer's).
        """
        rows = [layer.new for layer in self.layers]
        if None in rows:
            raise CheckpointError(
                f"no standard attention: got layer {rows.index(None)}, which writes no keys and "
                "values of its own; accepted are layers with a cache each"
            )
        return [keys for keys, _ in rows], [values for _, values in rows]


class _GivenMasks:
    """The masks that are inputs of the graph, by window."""

    def __init__(self, masks: dict[int, Tensor]) -> None:
        self.masks = masks

    def mask(self, window: int) -> Tensor | None:
        # Gemma makes the masks of all its kinds of layers, of which a cut model may lack one.
        return self.masks.get(window)


def cache_io_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [1, H, S, D]`` over ``key [1, Hkv, D, C]``, ``value [1, Hkv, C, D]``.

    ``attention_mask [1, 1, S, C]`` is added to the scores. Returns ``[1, S, H, D]``.

    Raises:
        CheckpointError: the model adds something else to its scores (sinks, position biases).
    """
    refuse_other_terms(module, kwargs)
    batch, heads, tokens, width = query.shape
    kv_heads, past = key.shape[1], key.shape[-1]
    rows = heads // kv_heads * tokens
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.matmul((query * scale).reshape(batch, kv_heads, rows, width), key)
    scores = scores.reshape(batch, heads, tokens, past)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + attention_mask, dim=-1)
    mixed = torch.matmul(weights.reshape(batch, kv_heads, rows, past), value)
    return mixed.reshape(batch, heads, tokens, width).transpose(1, 2), None


AttentionInterface.register(CACHE_IO_ATTENTION, cache_io_attention)
AttentionMaskInterface.register(CACHE_IO_ATTENTION, static_cache_mask)
