"""The exportable form of a decoder: a chunk of tokens in, logits out, its KV cache inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edgepass.models.architecture import (
    ACCEPTED_ARCHITECTURES,
    TESTED_FAMILIES,
    check_architecture,
    first_line,
)
from edgepass.models.attention import STATIC_CACHE_ATTENTION, StaticCache
from edgepass.models.rotary import longest_context, reset_rotary, static_rotary
from edgepass.ops.errors import CheckpointError, InvalidArgumentError


class StaticCacheDecoder(nn.Module):
    """A ``transformers`` causal language model with its KV cache as buffers of fixed size.

    ``forward(input_ids, input_pos)`` runs ``S`` tokens at positions ``input_pos ..
    input_pos + S - 1``. One program serves prefill (chunks of any length) and decode (``S = 1``).
    The caches are the persistent buffers ``k_cache_<i>`` and ``v_cache_<i>``, ``[1, Hkv, C, D]`` in
    the model's dtype, all of full length; a layer that slides does so by its mask.
    """

    def __init__(self, model: Any, context: int, all_logits: bool = False) -> None:
        """Wrap ``model`` (shared, put into eval mode and frozen) for ``context`` tokens.

        Args:
            model: a causal language model of ``transformers``.
            context: length ``C`` of the caches, 2 up to the model's ``max_position_embeddings``.
            all_logits: return the logits of every token instead of those of the last one.

        Raises:
            InvalidArgumentError: ``context`` is out of range.
            CheckpointError: the architecture has no standard attention, or (families without a
                test of their own) the decoder disagrees with the model's own forward.
        """
        super().__init__()
        check_architecture(model.config, type(model))
        _check_context(context, model.config)
        self.model = model.eval().requires_grad_(False)
        reset_rotary(model)
        self.context = context
        self.all_logits = all_logits
        self.layers = int(model.config.num_hidden_layers)
        shape = (1, *_cache_heads(model.config, context))
        for i in range(self.layers):
            self.register_buffer(f"k_cache_{i}", torch.zeros(shape, dtype=model.dtype))
            self.register_buffer(f"v_cache_{i}", torch.zeros(shape, dtype=model.dtype))
        self.cache_positions: Tensor
        self.register_buffer("cache_positions", torch.arange(context), persistent=False)
        if model.config.model_type not in TESTED_FAMILIES:
            _check_agreement(self)

    def forward(self, input_ids: Tensor, input_pos: Tensor) -> Tensor:
        """Return logits ``[1, 1, V]`` (``[1, S, V]`` with ``all_logits``).

        Args:
            input_ids: int64 ``[1, S]``, each within the vocabulary.
            input_pos: int64 ``[1]``, the first token's position; ``input_pos + S <= context``.
                Neither is checked here: an exported program cannot.
        """
        positions = input_pos + torch.arange(input_ids.shape[1])
        with _static_attention(self.model), static_rotary(self.model):
            return self.model(
                input_ids=input_ids,
                position_ids=positions[None],
                past_key_values=StaticCache(self._caches(), positions, self.cache_positions),
                use_cache=True,
                logits_to_keep=0 if self.all_logits else 1,
            ).logits

    def reset(self) -> None:
        """Zero the caches in place."""
        for keys, values in self._caches():
            keys.zero_()
            values.zero_()

    def _caches(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (getattr(self, f"k_cache_{i}"), getattr(self, f"v_cache_{i}"))
            for i in range(self.layers)
        ]


def export_decoder(decoder: StaticCacheDecoder) -> ExportedProgram:
    """Export ``decoder`` with a dynamic token count ``S`` in 1 .. context - 1.

    Returns:
        The training-IR program of ``torch.export`` (``linear``, ``scaled_dot_product_attention``
        and in-place ``index_copy_`` intact): inputs int64 ``input_ids [1, S]`` and
        ``input_pos [1]``, output logits as in :meth:`StaticCacheDecoder.forward`.

    Raises:
        CheckpointError: the model's own code cannot be exported with a dynamic token count.
    """
    most = decoder.context - 1
    example = (torch.zeros(1, min(7, most), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    dynamic: tuple[dict[int, Any], ...] = ({1: Dim("tokens", min=1, max=most)}, {})
    try:
        with torch.no_grad():
            return torch.export.export(decoder, example, dynamic_shapes=dynamic, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot export: got model={type(decoder.model).__name__}: {first_line(error)}; "
            "accepted are models that torch.export traces with a dynamic token count"
        ) from error


@contextmanager
def _static_attention(model: Any) -> Iterator[None]:
    # Only while the decoder runs: the same model must keep working outside of it.
    before = model.config._attn_implementation
    model.config._attn_implementation = STATIC_CACHE_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _check_context(context: int, config: Any) -> None:
    longest = longest_context(config)
    if context < 2 or (longest is not None and context > longest):
        bound = "" if longest is None else f" to {longest}, the longest that the model holds"
        raise InvalidArgumentError(
            f"context out of range: got context={context}, accepted are 2{bound}"
        )


def _check_agreement(decoder: StaticCacheDecoder) -> None:
    """Compare a few tokens, in two chunks, with the model's own forward."""
    count = min(8, decoder.context)
    tokens = torch.arange(count)[None] % decoder.model.config.vocab_size
    name = type(decoder.model).__name__
    try:
        with torch.no_grad():
            expected = decoder.model(input_ids=tokens, use_cache=False).logits[:, -1:].double()
            decoder(tokens[:, : count - 1], torch.tensor([0]))
            logits = decoder(tokens[:, count - 1 :], torch.tensor([count - 1]))[:, -1:].double()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"no static KV cache: got model={name}, which fails with it: {first_line(error)}; "
            f"{ACCEPTED_ARCHITECTURES}"
        ) from error
    decoder.reset()
    difference = (logits - expected).abs().max() / expected.abs().max()
    # Half floats differ by their rounding alone, summed over the layers.
    if not difference < (1e-3 if decoder.model.dtype == torch.float32 else 5e-2):
        raise CheckpointError(
            f"no static KV cache: got model={name}, whose logits differ by {difference:.1e} of "
            f"their largest with it; {ACCEPTED_ARCHITECTURES}"
        )


def _cache_heads(config: Any, context: int) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kv_heads, context, head_dim
