"""The forms of a decoder whose KV caches are inputs and outputs: the chunk, AR-N and AR-1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgepass.models.architecture import check_architecture, first_line
from edgepass.models.cache_attention import CACHE_IO_ATTENTION, CacheIo
from edgepass.models.cache_mask import cache_mask
from edgepass.models.plain_modules import NormWeights, plain_modules, rotary_tables
from edgepass.models.rotary import longest_context, reset_rotary
from edgepass.ops.errors import CheckpointError, InvalidArgumentError


class CacheIoDecoder(nn.Module):
    """A ``transformers`` causal language model of which :meth:`form` makes graphs of fixed size.

    The forms share its weights, its rotary tables and its norms. Inputs of a form, in the order
    that the stock QNN Llama runner passes them:

    - ``tokens`` int32 ``[1, S]``, or float ``[1, S, H]`` with ``embeddings``;
    - one additive mask float ``[1, 1, S, C]`` a window: the full one, then the sliding one;
    - ``input_pos`` int32 ``[1, S]``, the positions of the tokens;
    - with a cache, keys ``[1, Hkv, D, C - S]`` of each layer, then values ``[1, Hkv, C - S, D]``.

    Outputs: logits ``[1, S, V]``, new keys ``[1, Hkv, D, S]`` of each layer, then new values.
    """

    def __init__(self, model: Any, context: int, embeddings: bool = False) -> None:
        """Wrap ``model`` (shared, put into eval mode and frozen) for ``context`` tokens.

        Raises:
            InvalidArgumentError: ``context`` is out of range.
            CheckpointError: the architecture has no standard attention.
        """
        super().__init__()
        check_architecture(model.config, type(model))
        longest = longest_context(model.config)
        if context < 2 or (longest is not None and context > longest):
            raise InvalidArgumentError(
                f"context out of range: got context={context}, accepted are 2 to {longest}"
            )
        self.model = model.eval().requires_grad_(False)
        reset_rotary(model)
        self.context, self.embeddings = context, embeddings
        self.layers = int(model.config.num_hidden_layers)
        self.windows = _windows(model.config)
        self.tables = rotary_tables(model, context)
        self.norms = NormWeights(model)

    def form(self, tokens: int, context: int | None = None) -> DecoderForm:
        """The form of ``tokens`` a call behind caches of ``context - tokens`` positions.

        ``context`` defaults to the decoder's; with ``context=tokens`` the form has no caches: it
        is the full-chunk graph that is calibrated. Raises InvalidArgumentError for a count that
        does not fit.
        """
        context = self.context if context is None else context
        if not 1 <= tokens <= context <= self.context:
            raise InvalidArgumentError(
                f"tokens out of range: got tokens={tokens} and context={context}, accepted are 1 "
                f"to context tokens and a context of at most {self.context}"
            )
        return DecoderForm(self, tokens, context)

    def head_sizes(self) -> tuple[int, int]:
        """Return the KV heads and the head size ``(Hkv, D)``."""
        config = self.model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return getattr(config, "num_key_value_heads", None) or heads, width


class DecoderForm(nn.Module):
    """One form of a :class:`CacheIoDecoder`, which describes its inputs and outputs."""

    def __init__(self, decoder: CacheIoDecoder, tokens: int, context: int) -> None:
        super().__init__()
        self.decoder, self.tokens, self.context = decoder, tokens, context
        self.past = context - tokens

    def forward(
        self,
        tokens: Tensor,
        masks: list[Tensor],
        input_pos: Tensor,
        k_cache: list[Tensor] | None = None,
        v_cache: list[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return logits, then the new keys and the new values of each layer."""
        decoder = self.decoder
        pairs: list[tuple[Tensor, Tensor] | None] = [None] * decoder.layers
        if k_cache is not None and v_cache is not None:
            pairs = list(zip(k_cache, v_cache, strict=True))
        cache = CacheIo(pairs, dict(zip(decoder.windows, masks, strict=True)))
        name = "inputs_embeds" if decoder.embeddings else "input_ids"
        with _cache_io(decoder):
            logits = decoder.model(
                **{name: tokens}, position_ids=input_pos, past_key_values=cache, use_cache=True
            ).logits
        keys, values = cache.new_rows()
        return (logits, *keys, *values)

    def kv_pairs(self) -> list[tuple[int, int]]:
        """(flat input index, output index) of each cache and of the new rows that extend it."""
        first = len(self.decoder.windows) + 2
        return [(first + i, 1 + i) for i in range(2 * self.decoder.layers)] if self.past else []

    def inputs(self, tokens: Tensor, start: int = 0, caches: Any = ()) -> tuple[Any, ...]:
        """The inputs for ``tokens`` (int ``[S]``, or float ``[S, H]``) at ``start``.

        Masks, keys and values are lists. ``caches`` are keys of each layer, then values, in the
        shapes of the form, of which the first ``start`` positions are read; default zeros. Fewer
        than ``S`` tokens are padded with zeros at the end, which no real token attends.
        """
        count = tokens.shape[0]
        pad = (0, 0) * (tokens.dim() - 1) + (0, self.tokens - count)
        padded = nn.functional.pad(tokens, pad)[None]
        positions = (start + torch.arange(self.tokens)).clamp(max=self.decoder.context - 1)
        if not self.decoder.embeddings:
            padded = padded.to(torch.int32)
        masks = [self.mask(start, count, window) for window in self.decoder.windows]
        caches, layers = list(caches) or list(self.empty_caches()), self.decoder.layers
        nested = (caches[:layers], caches[layers:]) if self.past else ()
        return (padded, masks, positions[None].to(torch.int32), *nested)

    def empty_caches(self) -> tuple[Tensor, ...]:
        """Zeros in the shapes of the caches, keys first."""
        if not self.past:
            return ()
        heads, width = self.decoder.head_sizes()
        shapes = [(1, heads, width, self.past), (1, heads, self.past, width)]
        # A tensor each: one passed twice is exported as one input.
        return tuple(torch.zeros(shape) for shape in shapes for _ in range(self.decoder.layers))

    def mask(self, start: int, count: int, window: int = 0) -> Tensor:
        """The mask for ``count`` tokens at ``start``; see :func:`cache_mask`."""
        return cache_mask(self.tokens, self.past, start, count, window)


def export_form(form: DecoderForm) -> ExportedProgram:
    """Export ``form`` with its fixed sizes: training IR, inputs and outputs as in its class.

    Raises:
        CheckpointError: the model's own code cannot be exported.
    """
    width = form.decoder.model.config.hidden_size
    tokens = (
        torch.zeros(form.tokens, width) if form.decoder.embeddings else torch.zeros(form.tokens)
    )
    try:
        with torch.no_grad():
            return torch.export.export(form, form.inputs(tokens), strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot export: got model={type(form.decoder.model).__name__} for {form.tokens} "
            f"tokens: {first_line(error)}; accepted are models that torch.export traces"
        ) from error


def _windows(config: Any) -> tuple[int, ...]:
    """The attention windows of the layers, 0 for full attention, which comes first."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) or 0
    if kinds:
        return tuple(
            size
            for kind, size in (("full_attention", 0), ("sliding_attention", window))
            if kind in kinds
        )
    return (window,)


@contextmanager
def _cache_io(decoder: CacheIoDecoder) -> Iterator[None]:
    """Let the model use this attention and the plain modules while the form runs."""
    config = decoder.model.config
    before = config._attn_implementation
    config._attn_implementation = CACHE_IO_ATTENTION
    try:
        with plain_modules(decoder.model, decoder.tables, decoder.norms):
            yield
    finally:
        config._attn_implementation = before
