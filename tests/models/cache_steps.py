"""Runs forms one behind the other, writing what each returns into the caches of the next."""

from typing import Any

import torch
from torch import Tensor

from edgepass.models.cache_decoder import CacheIoDecoder, DecoderForm


def write_rows(caches: list[Tensor], rows: Any, start: int, count: int) -> None:
    """Write the first ``count`` of the new rows (keys of each layer, then values) at ``start``."""
    layers = len(caches) // 2
    for index, (cache, new) in enumerate(zip(caches, rows, strict=True)):
        axis = 3 if index < layers else 2
        cache.narrow(axis, start, count).copy_(new.narrow(axis, 0, count))


def run_chained(
    decoder: CacheIoDecoder,
    tokens: Tensor,
    plan: list[tuple[DecoderForm, list[int]]],
    run: dict[DecoderForm, Any] | None = None,
) -> Tensor:
    """Logits ``[S, V]`` of ``tokens``; ``plan`` gives each form and the tokens of its calls.

    ``run`` names what to call for a form, by default the form itself.
    """
    start, logits = 0, []
    whole = [cache.clone() for cache in decoder.form(1).empty_caches()]
    for form, counts in plan:
        for count in counts:
            layers = len(whole) // 2
            caches = [
                cache.narrow(3 if i < layers else 2, 0, form.past).clone()
                for i, cache in enumerate(whole)
            ]
            call = (run or {}).get(form, form)
            with torch.no_grad():
                out = call(*form.inputs(tokens[start : start + count], start, caches))
            logits.append(out[0][0, :count].clone())
            if start + count < decoder.context:
                write_rows(whole, out[1:], start, count)
            start += count
    return torch.cat(logits)
