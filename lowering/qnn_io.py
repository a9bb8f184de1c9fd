"""How the quantized inputs and outputs of a lowered decoder are encoded."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from edgepass.lowering.qnn_decoder import DECODE_METHOD, QuantizedDecoder
from edgepass.models.cache_mask import MASKED
from edgepass.ops.encodings import Encoding
from edgepass.passes.quantized_values import quantized_values
from edgepass.passes.value_names import ValueNames

# These pass as they are, whatever the graph makes of them.
PLAIN_INPUTS = ("tokens", "input_pos")


def io_encodings(module: GraphModule) -> tuple[list[Encoding | None], list[Encoding | None]]:
    """The encoding of each flat input and output of a converted graph, None for plain ones."""
    values = quantized_values(module, ValueNames(module.graph))
    by_root = {value.root: value.encoding for value in reversed(values)}
    by_call = {call: value.encoding for value in values for call in value.calls}
    inputs = [
        None if node.name in PLAIN_INPUTS else by_root.get(node)
        for node in module.graph.find_nodes(op="placeholder")
    ]
    outputs: Any = module.graph.output_node().args[0]
    return inputs, [by_call.get(node) for node in outputs]


def quantize_tensor(value: torch.Tensor, encoding: Encoding | None) -> torch.Tensor:
    """Float ``value`` as the device's uint8, uint16 or int16; without an encoding as it is."""
    if encoding is None:
        return value
    scaled = torch.round(value / encoding.scale) + encoding.zero_point
    clamped = scaled.clamp(encoding.quant_min, encoding.quant_max)
    return clamped.to(getattr(torch, _dtype(encoding)))


def dequantize_tensor(value: torch.Tensor, encoding: Encoding | None) -> torch.Tensor:
    """The float values of the device's integers; floats pass."""
    if encoding is None or value.is_floating_point():
        return value
    return (value.to(torch.int32) - encoding.zero_point).to(torch.float32) * encoding.scale


def describe_io(quantized: QuantizedDecoder) -> dict[str, Any]:
    """What whoever runs the program must know, as JSON: masks, logits, caches and their sizes."""
    inputs, outputs = io_encodings(quantized.graphs[DECODE_METHOD])
    heads, width = quantized.decoder.head_sizes()
    mask, cache = inputs[1], inputs[-1]
    ends = quantize_tensor(torch.tensor([0.0, MASKED]), mask)
    return {
        "windows": list(quantized.decoder.windows),
        "kv_heads": heads,
        "head_dim": width,
        "mask": {"dtype": _dtype(mask), "visible": ends[0].item(), "hidden": ends[1].item()},
        "cache": {"dtype": _dtype(cache), "zero": 0 if cache is None else int(cache.zero_point)},
        "logits": _logits(outputs[0]),
    }


def _dtype(encoding: Encoding | None) -> str:
    if encoding is None:
        return "float32"
    return f"{'' if encoding.signed else 'u'}int{encoding.bits}"


def _logits(encoding: Encoding | None) -> dict[str, Any] | None:
    if encoding is None:
        return None
    return {"scale": encoding.scale.item(), "zero_point": int(encoding.zero_point)}
