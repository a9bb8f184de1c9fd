"""What attention computes on the way, with the gradients there: queries, keys, weights, values.

``transformers`` lets a model name its attention; while a probe watches, it is this module's, which
writes out the products so that each operand can be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from edgepass.calibration.rounding_error import Rounding
from edgepass.calibration.sites import SitePlace

if TYPE_CHECKING:
    from edgepass.calibration.sensitivity import Measured

WATCHED_ATTENTION = "edgepass_watched"
# By which of an attention's operands a site is made up.
_OPERANDS = {
    "scores": ("query", "key"),
    "context": ("weights", "value"),
    "keys": ("key",),
    "values": ("value",),
}
Note = Callable[["Measured", Sequence[tuple[Tensor, Tensor]]], None]


def watch_attention(stack: ExitStack, model: Any, sites: Sequence[Measured], note: Note) -> None:
    """Until ``stack`` closes, tell ``note`` of each attention site's values and gradients."""
    by_module: dict[str, list[Measured]] = {}
    for site in sites:
        if site.place.part is not None:
            by_module.setdefault(site.place.module, []).append(site)
    stack.enter_context(_attention_written_out(model))
    for path, watched in by_module.items():
        stack.enter_context(_probed(model.get_submodule(path), _Probe(watched, note)))


@contextmanager
def round_attention(model: Any, place: SitePlace, rounding: Rounding) -> Iterator[None]:
    """Let the operands of one attention site be rounded."""
    rounder = _Rounder(_OPERANDS[str(place.part)], rounding)
    with _attention_written_out(model), _probed(model.get_submodule(place.module), rounder):
        yield


@contextmanager
def _attention_written_out(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = WATCHED_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def _probed(module: Any, probe: _Probe | _Rounder) -> Iterator[None]:
    module.edgepass_probe = probe
    try:
        yield
    finally:
        del module.edgepass_probe


class _Rounder:
    """Rounds some operands of an attention module."""

    def __init__(self, names: Sequence[str], rounding: Rounding) -> None:
        self.names, self.rounding = names, rounding

    def operand(self, name: str, value: Tensor) -> Tensor:
        return self.rounding(value) if name in self.names else value


class _Probe:
    """The sites of one attention module, told when all operands of a site have a gradient."""

    def __init__(self, sites: Sequence[Measured], note: Note) -> None:
        self.sites, self.note = sites, note
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def operand(self, name: str, value: Tensor) -> Tensor:
        if value.requires_grad:
            found = value.detach()
            value.register_hook(lambda grad: self._keep(name, found, grad))
        return value

    def _keep(self, name: str, value: Tensor, grad: Tensor) -> None:
        if name in self.found:
            self.found.clear()  # of the backward pass before
        self.found[name] = (value, grad)
        for site in self.sites:
            names = _OPERANDS[str(site.place.part)]
            if name in names and all(each in self.found for each in names):
                self.note(site, [_by_token(self.found[each]) for each in names])


def _by_token(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``[1, H, T, D]`` as ``[H, T, D]``: heads, tokens, values."""
    return pair[0][0], pair[1][0]


def watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [1, H, T, D]``, written out: ``[1, T, H, D]``."""
    probe: Any = getattr(module, "edgepass_probe", None) or _Rounder((), torch.clone)
    query, key = probe.operand("query", query), probe.operand("key", key)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights, value = probe.operand("weights", weights), probe.operand("value", value)
    return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2), None


AttentionInterface.register(WATCHED_ATTENTION, watched_attention)
AttentionMaskInterface.register(WATCHED_ATTENTION, eager_mask)
