"""Per-token quantization of activations, as the runtime's shaders compute it.

``glsl/choose_qparams_per_row.glsl`` and ``glsl/linear_int8_input_block.glslh``: all in float32,
the scale at least 6.1e-5, so that rows near 1e-6 come out as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.ops.quantize import VULKAN_SCALE_FLOOR
from edgepass.simulator.graph import Several
from edgepass.simulator.registry import Kernel, Site, prepared

# `1 / scale` is infinite below this: such a row is taken for zeros, with a scale of 0.1.
_LEAST_INVERTIBLE = 1.0 / torch.finfo(torch.float32).max
_SCALE_OF_ZEROS = 0.1
_LINEAR = "et_vk.linear_dq8ca_q4gsw.default"


@prepared("torchao.choose_qparams_affine.default")
def choose_qparams_affine(site: Site) -> Kernel:
    x, block = site.tensor(0), list(site.argument(2))
    lead = x.shape[:-2]
    if len(x.shape) < 2 or any(size != 1 for size in lead) or x.shape[-1] % 4:
        raise site.error(f"an input of shape={list(x.shape)}; the runtime takes one matrix")
    if block != [1] * (len(x.shape) - 1) + [x.shape[-1]]:
        raise site.error(f"block_size={block}; the runtime takes one block a token")
    low, high = _bounds(site, 4, 5)
    shape = [1] * (len(site.results()[0].shape) - 1) + [-1]
    unread = torch.zeros([*shape[:-1], 1]) if _are_for_linears(site) else None

    def kernel(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        if unread is not None and rows.shape[0] == 1:
            return unread, unread
        scale, zero = choose_qparams(rows, low, high)
        return scale.view(shape), zero.view(shape)

    return kernel


def _are_for_linears(site: Site) -> bool:
    """Tell whether only quantized linears read the encodings: of one token, they do not."""
    results = site.graph.values[site.call.result]
    numbers = set(results.ids) if isinstance(results, Several) else {site.call.result}
    readers = {
        (call.name, place)
        for call in site.graph.calls
        for place, number in enumerate(call.arguments)
        if number in numbers
    }
    of_linears = {(_LINEAR, 1), (_LINEAR, 2)}
    return readers <= of_linears and not numbers & set(site.graph.outputs)


def _bounds(site: Site, low: int, high: int) -> tuple[int, int]:
    least, most = site.argument(low), site.argument(high)
    if least is None:
        return -128, 127
    if not isinstance(least, int) or not isinstance(most, int) or least >= most:
        raise site.error(f"quant_min={least!r} and quant_max={most!r} are no range")
    return least, most


def choose_qparams(rows: Tensor, least: int = -128, most: int = 127) -> tuple[Tensor, Tensor]:
    """Encode float32 ``[M, K]`` per row: scale float32 ``[M]``, zero point int32 ``[M]``."""
    low, high = rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)
    scale = (high - low) / float(most - least)
    if bool((scale < VULKAN_SCALE_FLOOR).any()):
        low, high, scale = _grown(low, high, scale, most - least)
    return scale, _zero_point(low / scale, high / scale, least, most)


def _grown(low: Tensor, high: Tensor, scale: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let ranges that are too small grow to all steps of the floor: about zero, or from it."""
    scale = torch.where(scale < _LEAST_INVERTIBLE, _SCALE_OF_ZEROS, scale)
    floor = torch.tensor(VULKAN_SCALE_FLOOR)
    small, width = scale < floor, floor * float(steps)
    two_sided = small & (low != 0) & (high != 0)
    from_zero, to_zero = small & (low == 0), small & (low != 0) & (high == 0)
    grown = floor / scale
    low = torch.where(two_sided, low * grown, torch.where(to_zero, -width, low))
    high = torch.where(two_sided, high * grown, torch.where(from_zero, width, high))
    return low, high, torch.where(small, floor, scale)


def _zero_point(low: Tensor, high: Tensor, least: int, most: int) -> Tensor:
    """The zero point of a range given in steps: from that end which it fits better."""
    from_low, from_high = least - low, most - high
    closer = abs(least) - low.abs() < abs(most) - high.abs()
    zero = torch.where(closer, from_low, from_high)
    return zero.clamp(least, most).round().to(torch.int32)


def quantize_rows(rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Quantize float32 ``[M, K]`` by each row's encoding: float32 that holds -128..127.

    Halves round to even, as software drivers do; GLSL leaves it open.
    """
    steps = torch.round(rows * (1.0 / scale).unsqueeze(1)) + zero.unsqueeze(1)
    return steps.clamp_(-128, 127)
