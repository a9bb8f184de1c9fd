"""Attention over a static KV cache, in the forms that ``transformers`` lets a model plug in.

A model whose ``config._attn_implementation`` is :data:`STATIC_CACHE_ATTENTION` asks this module for
its masks and for its attention, so each family decides by itself which of its layers slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from edgepass.ops.errors import CheckpointError

STATIC_CACHE_ATTENTION = "edgepass_static_cache"


class StaticCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, float ``[1, Hkv, C, D]``, written in place at ``positions``.

    Each keeps all ``C`` rows, a sliding one too: its mask hides what lies behind the window.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.positions = keys, values, positions
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffers exist before the first call."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows at ``positions`` and return the whole caches."""
        return (
            self.keys.index_copy_(2, self.positions, key_states),
            self.values.index_copy_(2, self.positions, value_states),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class StaticCache(Cache):
    """One :class:`StaticCacheLayer` a layer; a model's masks take their positions from it."""

    def __init__(
        self, caches: Sequence[tuple[Tensor, Tensor]], positions: Tensor, cache_positions: Tensor
    ) -> None:
        """``positions`` int64 ``[S]`` of the new tokens; ``cache_positions`` int64 ``[C]``."""
        super().__init__(layers=[StaticCacheLayer(k, v, positions) for k, v in caches])
        self.visibility = _Visibility(positions, cache_positions)

    def get_query_offset(self, layer_idx: int = 0) -> _Visibility:
        # transformers hands this value unread to the mask function: that is how the positions,
        # which are tensors of the graph, get there.
        return self.visibility


class _Visibility:
    """The causal masks of one call, built once for each window and shared by the layers."""

    def __init__(self, positions: Tensor, cache_positions: Tensor) -> None:
        self.query = positions[:, None]
        self.key = cache_positions[None, :]
        self.masks: dict[int, Tensor] = {}

    def mask(self, window: int) -> Tensor:
        """Return the boolean mask ``[1, 1, S, C]``, True where attended; ``window`` 0 is full."""
        if window not in self.masks:
            visible = self.key <= self.query
            if window > 0:
                visible = visible & (self.key > self.query - window)
            self.masks[window] = visible[None, None]
        return self.masks[window]


def static_cache_mask(
    *args: Any, q_offset: _Visibility, local_size: int | None = None, **kwargs: Any
) -> Tensor:
    """Mask of one kind of layer for ``transformers``: boolean ``[1, 1, S, C]``."""
    return q_offset.mask(local_size or 0)


def refuse_other_terms(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise CheckpointError if a model adds sinks or position biases to its scores."""
    for term in ("s_aux", "position_bias"):
        if kwargs.get(term) is not None:
            raise CheckpointError(
                f"no standard attention: got {type(module).__name__} with `{term}`; accepted are "
                "layers that scale, mask and soften their scores only"
            )


def static_cache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [1, H, S, D]`` over whole caches ``[1, Hkv, C, D]``: ``[1, S, H, D]``.

    With ``softcap`` (Gemma 2) the scores become ``softcap * tanh(scores / softcap)`` before the
    mask, which ``scaled_dot_product_attention`` cannot express.

    Raises:
        CheckpointError: the model adds something else to its scores (sinks, position biases).
    """
    refuse_other_terms(module, kwargs)
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scaling)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(attention_mask.logical_not(), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2), None


AttentionInterface.register(STATIC_CACHE_ATTENTION, static_cache_attention)
AttentionMaskInterface.register(STATIC_CACHE_ATTENTION, static_cache_mask)
