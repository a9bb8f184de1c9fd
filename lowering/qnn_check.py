"""The HTP simulator against the fake-quantized graph, output by output."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgepass.lowering.qnn_decoder import QuantizedDecoder
from edgepass.lowering.qnn_io import dequantize_tensor, io_encodings, quantize_tensor
from edgepass.lowering.qnn_simulator import SimulatedProgram
from edgepass.models.cache_decoder import DecoderForm
from edgepass.passes.verification import signal_to_noise_db


def device_sqnr_db(
    quantized: QuantizedDecoder, buffer: bytes, text: Tensor
) -> dict[str, list[float]]:
    """SQNR in dB of each output of each method, logits first, on the end of ``text``.

    The caches hold what the fake-quantized chunk graph makes of the text before it. Equal outputs
    count as 999.
    """
    with tempfile.TemporaryDirectory(prefix="edgepass.") as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(buffer)
        program = SimulatedProgram(path)
        try:
            return {
                name: _compare(quantized, program, name, form, text)
                for name, form in quantized.forms.items()
            }
        finally:
            program.close()


def _compare(
    quantized: QuantizedDecoder,
    program: SimulatedProgram,
    name: str,
    form: DecoderForm,
    text: Tensor,
) -> list[float]:
    graph = quantized.graphs[name]
    inputs = form.inputs(*_end_of(quantized, form, text))
    entering, leaving = io_encodings(graph)
    flat = pytree.tree_leaves(inputs)
    given = [quantize_tensor(value, each) for value, each in zip(flat, entering, strict=True)]
    with torch.no_grad():
        expected = graph(*inputs)
    found = program.run(name, given)
    return [
        round(min(signal_to_noise_db(one, dequantize_tensor(other, each)), 999.0), 2)
        for one, other, each in zip(expected, found, leaving, strict=True)
    ]


def _end_of(
    quantized: QuantizedDecoder, form: DecoderForm, text: Tensor
) -> tuple[Tensor, int, list[Tensor]]:
    """The last tokens of ``text`` that fit the form, their position, and caches before them."""
    count = min(form.tokens, len(text))
    start = min(len(text) - count, form.past)
    with torch.no_grad():
        rows = quantized.chunk_graph(*quantized.chunk.inputs(text))[1:]
    caches = [cache.clone() for cache in form.empty_caches()]
    for index, (cache, new) in enumerate(zip(caches, rows, strict=True)):
        axis = 3 if index < len(caches) // 2 else 2
        cache.narrow(axis, 0, start).copy_(new.narrow(axis, 0, start))
    return text[start : start + count], start, caches
