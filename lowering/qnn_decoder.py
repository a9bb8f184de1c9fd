"""A decoder quantized for QNN: calibrated once on the whole chunk, its encodings in both forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.observe import observe
from edgepass.lowering.qnn_quantizer import MODEL_PREFIX, RANGE_OBSERVERS, QnnQuantization
from edgepass.models.cache_decoder import CacheIoDecoder, DecoderForm, export_form
from edgepass.ops.encodings import EncodingTable
from edgepass.ops.errors import EncodingError, InvalidArgumentError
from edgepass.passes.propagate_kv_encodings import propagate_kv_encodings
from edgepass.passes.quantized_values import read_encodings

# The names that the stock QNN Llama runner loads.
DECODE_METHOD, PREFILL_METHOD = "kv_forward", "prefill_forward"


@dataclass(frozen=True)
class QuantizedDecoder:
    """The forms of one decoder by method name, and their quantized graphs.

    ``encodings`` are those of the chunk graph, which ``chunk`` (its form) and ``chunk_graph`` are.
    """

    decoder: CacheIoDecoder
    forms: dict[str, DecoderForm]
    graphs: dict[str, GraphModule]
    chunk: DecoderForm
    chunk_graph: GraphModule
    encodings: EncodingTable


def quantize_decoder(
    decoder: CacheIoDecoder,
    quantization: QnnQuantization,
    texts: Sequence[Tensor],
    prefill_chunk: int,
    calibration: Calibration | None = None,
    encodings: EncodingTable | None = None,
) -> QuantizedDecoder | None:
    """Calibrate ``decoder`` on ``texts`` and quantize its AR-``prefill_chunk`` and AR-1 forms.

    ``texts`` are token ids int ``[S]`` (or vectors float ``[S, H]``), all of one length up to the
    context; each runs once through the graph of the whole chunk. The encodings found there go into
    the forms with caches. With ``encodings`` nothing is calibrated: the texts are only run. Returns
    None in a process that only helped another to calibrate.

    Raises InvalidArgumentError for texts of different or impossible lengths, EncodingError for
    activations that are not finite, values without an encoding, or ``encodings`` of another model.
    """
    lengths = sorted({len(text) for text in texts})
    if len(lengths) != 1 or not 2 <= lengths[0] <= decoder.context:
        raise InvalidArgumentError(
            f"calibration texts: got lengths {lengths}, accepted is one length of 2 to "
            f"{decoder.context} tokens (the context)"
        )
    chunk = decoder.form(lengths[0], lengths[0])
    prepared = quantization.prepare(export_form(chunk))
    calibration = calibration or Calibration()
    if encodings is None:
        calibration.run(prepared, texts, chunk.inputs, RANGE_OBSERVERS)
    if calibration.workers.rank:
        return None
    if encodings is None:
        chunk_graph = quantization.convert(prepared)
    else:
        # Observers must have seen something to be converted; what they saw is replaced.
        observe(prepared, [chunk.inputs(texts[0])])
        chunk_graph = quantization.convert_with(prepared, encodings, MODEL_PREFIX)
    forms = {DECODE_METHOD: decoder.form(1), PREFILL_METHOD: decoder.form(prefill_chunk)}
    graphs = {
        name: _transfer(form, quantization, chunk_graph, texts[0]) for name, form in forms.items()
    }
    table = read_encodings(chunk_graph, MODEL_PREFIX)
    return QuantizedDecoder(decoder, forms, graphs, chunk, chunk_graph, table)


def _transfer(
    form: DecoderForm, quantization: QnnQuantization, source: GraphModule, text: Tensor
) -> GraphModule:
    """The form's graph with the encodings of ``source``."""
    prepared = quantization.prepare(export_form(form))
    # Observers must have seen something to be converted; what they saw is replaced.
    with torch.no_grad():
        prepared(*form.inputs(text[: form.tokens]))
    target = quantization.convert(prepared)
    pairs = form.kv_pairs()
    propagation = propagate_kv_encodings(source, target, pairs, MODEL_PREFIX)
    if len(propagation.pairs) != len(pairs):
        raise EncodingError(
            f"KV pairs: got {len(propagation.pairs)}, accepted are the {len(pairs)} of the form"
        )
    return target


def metadata(quantized: QuantizedDecoder, ends: Sequence[int], kv_bits: int) -> dict[str, Any]:
    """The constant methods that the stock runner reads."""
    decoder = quantized.decoder
    heads, width = decoder.head_sizes()
    config = decoder.model.config
    start = config.bos_token_id
    facts = {
        "get_ar_len": quantized.forms[PREFILL_METHOD].tokens,
        "get_bos_id": int(start if isinstance(start, int) else 0),
        "get_eos_id": int(ends[0]) if ends else 0,
        "get_dim": int(config.hidden_size),
        "get_head_dim": width,
        "get_max_batch_size": 1,
        "get_max_seq_len": decoder.context,
        "get_max_context_len": decoder.context,
        "get_n_bos": 1,
        "get_n_eos": 1,
        "get_n_kv_heads": heads,
        "get_n_layers": decoder.layers,
        "get_vocab_size": int(config.vocab_size),
        "get_use_kv_cache": True,
        # No stock runner reads this one: it passes token ids to each program.
        "get_use_embeddings": decoder.embeddings,
        "get_kv_io_bit_width": kv_bits,
    }
    if any(decoder.windows):
        facts["get_sliding_window"] = max(decoder.windows)
    return facts
