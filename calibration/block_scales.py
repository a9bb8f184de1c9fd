"""Block scales as HTP stores them: four bits times a float scale of the channel (LPBQ)."""

from __future__ import annotations

from torch.fx import GraphModule

from edgepass.ops.encodings import Encoding
from edgepass.ops.encodings_file import split_block_scales
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.quantized_values import quantized_values
from edgepass.passes.value_names import ValueNames


def snap_block_scales(module: GraphModule) -> int:
    """Replace each block scale of ``module`` by ``m * round(s / m)``; return how many tensors.

    ``m`` is the largest scale of the channel over 16, the whole number is 1 to 16. The stock
    conversion does this only when it writes the device's tensors, so that the graph on the host
    computes with other scales than the device. Run it on a converted PT2E graph, in which constants
    are folded: their integers stay, and a second run changes nothing.
    """
    count = 0
    for value in quantized_values(module, ValueNames(module.graph)):
        encoding = value.encoding
        if encoding.block is None:
            continue
        channel, steps = split_block_scales(encoding.scale)
        snapped = Encoding(
            channel[:, None] * steps,
            encoding.zero_point,
            encoding.quant_min,
            encoding.quant_max,
            encoding.axis,
            encoding.block,
        )
        write_encoding(module, value, snapped)
        count += 1
    return count
