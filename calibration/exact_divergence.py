"""The divergence that quantizing one site alone really causes: the model run with that site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.attention_probes import round_attention
from edgepass.calibration.decoder_layers import find_layers
from edgepass.calibration.rounding_error import weight_error
from edgepass.calibration.sensitivity import Measured


class ExactDivergence:
    """Runs a float model on one chunk with one site changed, from the site's layer on.

    What the layers before it give is kept: memory holds a hidden state a layer and the logits.
    """

    @torch.no_grad()
    def __init__(self, model: Any, chunk: Tensor) -> None:
        """``chunk``: token ids int64 ``[T]``."""
        self.model, self.chunk = model, chunk
        self._layers = [module for _, module in find_layers(model)]
        self._given: list[Any] = []
        with ExitStack() as stack:
            for module in self._layers:
                keep = module.register_forward_hook(lambda _, args, out: self._given.append(out))
                stack.callback(keep.remove)
            self._known = self._run().log_softmax(-1)

    @torch.no_grad()
    def of(self, site: Measured, candidate: int) -> float:
        """KL of the logits a token, in nats, with ``site`` quantized by its candidate."""
        with ExitStack() as stack:
            stack.enter_context(_quantized(self.model, site, candidate))
            end = site.place.layer
            if end is None and site.place.kind != "embedding":
                end = len(self._layers)  # the head and what it reads
            for module, given in zip(self._layers[:end] if end else (), self._given, strict=False):
                stack.enter_context(_answered(module, given))
            other = self._run().log_softmax(-1)
        divergence = (self._known.exp() * (self._known - other)).sum(-1)
        return max(0.0, float(divergence.double().mean()))

    def _run(self) -> Tensor:
        return self.model(self.chunk[None], use_cache=False).logits[0]


@contextmanager
def _answered(module: Any, given: Any) -> Iterator[None]:
    """Let a layer give what it gave before, without computing it."""
    module.forward = lambda *args, **kwargs: given
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _quantized(model: Any, site: Measured, candidate: int) -> Iterator[None]:
    """Let one site of ``model`` be as its candidate is."""
    place = site.place
    if place.part is not None:
        with round_attention(model, place, site.roundings[candidate]):
            yield
    elif place.kind == "activation":
        rounding = site.roundings[candidate]
        modules = [model.get_submodule(path) for path in place.modules]
        hooks = [
            each.register_forward_pre_hook(lambda _, args: (rounding(args[0]), *args[1:]))
            for each in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
    else:
        module: Any = model.get_submodule(place.module)
        before = module.weight
        changed = before + weight_error(site.rounded[candidate], before)
        module.weight = nn.Parameter(changed, requires_grad=False)
        try:
            yield
        finally:
            module.weight = before
