"""Linears with int4 weights: what the runtime's shaders read and add up, right or wrong.

``impl/QuantizedLinear.cpp`` (``linear_dq8ca_q4gsw``) and ``impl/Q4gswLinear.cpp``
(``linear_q4gsw``). Weights are ``[N, K/2]`` bytes, the even column in the low nibble, value + 8;
scales ``[groups, N]`` and sums are read as flat buffers, four output features at a time.

Each shader walks K in steps of four columns, and takes a group's scales for a number of steps.
That, and the width at which it reads scales and sums, decides which group sizes and features come
out right; here both become one float32 weight ``[N, K]``, whose products with small integers are
exact, and corrections that are zero where the shader is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgepass.ops.packing import unpack_int4
from edgepass.simulator.half import half_accumulate, half_cooperate
from edgepass.simulator.quantize import quantize_rows
from edgepass.simulator.registry import Kernel, Site, as_half, prepared

# Lanes that sum one group of a token's quantized values, by group size:
# `pick_quantize_and_pack_4h4w_with_group_sums_shader` in impl/QuantizeDequantize.cpp.
_WIDE_GROUP, _LANES, _LANES_OF_WIDE = 128, 16, 32


@dataclass(frozen=True)
class Weight:
    """A packed weight as integers ``[N, K]``, with its flat scales and the shader's group size."""

    values: Tensor
    scales: Tensor
    group_size: int

    @property
    def features(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def scaled(self, steps: int, whole_groups: bool) -> Tensor:
        """The float32 weight of a shader that takes new scales every ``steps`` times four columns.

        ``whole_groups``: columns behind the last whole group are left out.
        """
        width = 4 * steps
        groups = -(-self.columns // width)
        values = self.values
        if groups * width > self.columns:
            values = torch.nn.functional.pad(values, (0, groups * width - self.columns))
        scales = self.group_scales(groups).t().unsqueeze(2)
        weight = (values.unflatten(1, (groups, width)) * scales).flatten(1)
        if whole_groups:
            weight[:, self.columns // width * width :] = 0
        return weight[:, : self.columns].contiguous()

    def group_scales(self, groups: int) -> Tensor:
        """Scales float32 ``[groups, N]``, read at the width of the features in fours."""
        return read_flat(self.scales, groups, self.features)


def read_flat(buffer: Tensor, groups: int, features: int) -> Tensor:
    """Read ``[groups, features]`` from a buffer whose rows are taken to be features in fours.

    A buffer with rows of another width is misread, as on the device; behind its end are zeros.
    """
    width = -(-features // 4) * 4
    flat = buffer.reshape(-1)[: groups * width]
    flat = torch.nn.functional.pad(flat, (0, groups * width - flat.numel()))
    return flat.view(groups, width)[:, :features]


def _weight(site: Site, places: tuple[int, int, int], out_dtype: torch.dtype) -> Weight:
    packed, scales = site.constant(places[0]), site.constant(places[1])
    group = site.integer(places[2], 4)
    columns = site.tensor(0).shape[-1]
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] * 2 < columns:
        raise site.error(f"a weight {packed.dtype} {list(packed.shape)} for K={columns}")
    if columns % 4:
        raise site.error(f"K={columns} is not a multiple of 4")
    values = unpack_int4(packed, 2 * packed.shape[1])[:, :columns]
    return Weight(values, misread(scales, out_dtype), group)


def misread(content: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a shader sees that declares ``content`` as ``dtype``: its bytes, in float32."""
    if content.dtype == dtype:
        return content.float()
    data = content.reshape(-1).view(torch.uint8)
    whole = data[: data.numel() // dtype.itemsize * dtype.itemsize]
    return whole.view(dtype).float()


def _bias(site: Site, place: int, features: int, dtype: torch.dtype) -> Tensor | None:
    if site.argument(place) is None:
        return None
    return read_flat(misread(site.constant(place), dtype), 1, features)[0]


@prepared("et_vk.linear_dq8ca_q4gsw.default")
def linear_dq8ca_q4gsw(site: Site) -> Kernel:
    out = site.result()
    weight = _weight(site, (3, 5, 6), out.dtype)
    if site.tensor(3).shape[1] % 4:
        raise site.error(f"a weight of {site.tensor(3).shape[1]} bytes a row: not in words of 4")
    in_half = out.dtype == torch.float16 and out.is_buffer
    kind = HalfDynamicLinear if in_half else DynamicLinear
    return kind(weight, site.constant(4), _bias(site, 7, weight.features, out.dtype))


class DynamicLinear:
    """``linear_dq8ca_q4gsw``: quantized activations for several tokens, float ones for one."""

    def __init__(self, weight: Weight, sums: Tensor, bias: Tensor | None) -> None:
        self.steps = -(-weight.group_size // 4)
        self.groups = weight.columns // (4 * self.steps)
        self.lanes = _LANES_OF_WIDE if weight.group_size >= _WIDE_GROUP else _LANES
        self.bias = bias
        self.weight = weight.scaled(self.steps, whole_groups=True)
        ragged = self.groups * 4 * self.steps < weight.columns
        self.weight_of_one = weight.scaled(self.steps, False) if ragged else self.weight
        self.scales = weight.group_scales(self.groups)
        self.excess = self._excess(weight, sums)

    def _excess(self, weight: Weight, sums: Tensor) -> Tensor | None:
        """What is read as sums beyond the weight's true ones, ``[groups, N]``; None if nothing."""
        covered = weight.values[:, : self.groups * 4 * self.steps]
        true = covered.unflatten(1, (self.groups, 4 * self.steps)).sum(2, dtype=torch.int32).t()
        read = read_flat(sums.to(torch.int32), self.groups, weight.features)
        return read - true if not torch.equal(read, true) else None

    def __call__(self, x: Tensor, scale: Tensor, zero: Tensor, *_: object) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 1:
            out = self._of_one(rows)
        else:
            out = self._of_tokens(rows, scale.reshape(-1), zero.reshape(-1))
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], -1)

    def _of_one(self, row: Tensor) -> Tensor:
        """The shader for one token (linear_q4gsw_coop.glsl) reads the activation as it is."""
        return row @ self.weight_of_one.t()

    def _of_tokens(self, rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        q = quantize_rows(rows, scale, zero)
        zero = zero.float().unsqueeze(1)
        out = (q - zero) @ self.weight.t()
        if self.excess is not None:
            out -= zero * (self.scales * self.excess).sum(0)
        if self.steps > self.lanes:
            out += 8.0 * (self._missed_sums(q) @ self.scales)
        return out * scale.unsqueeze(1)

    def _missed_sums(self, q: Tensor) -> Tensor:
        """True minus computed sums of each group of each row, ``[M, groups]``.

        quantize_and_pack_4h4w_with_group_sums.glsl adds a lane's running sum to itself together
        with each further step, so a lane with more than one step counts its early ones twice over.
        """
        steps = q[:, : self.groups * 4 * self.steps].unflatten(1, (self.groups, self.steps, 4))
        sums = steps.sum(3)
        computed = torch.zeros(*sums.shape[:2], self.lanes)
        for start in range(0, self.steps, self.lanes):
            part = sums[:, :, start : start + self.lanes]
            lanes = part.shape[2]
            computed[:, :, :lanes] = 2 * computed[:, :, :lanes] + part
        return sums.sum(2) - computed.sum(2)


class HalfDynamicLinear(DynamicLinear):
    """The same in half precision and buffers, where the shaders' accumulators are half, too.

    (Values from images load as float, and so do the sums over them.)
    """

    def __init__(self, weight: Weight, sums: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, sums, bias)
        self.values = weight.values
        self.weight_of_one = as_half(self.weight_of_one).t().contiguous()

    def _of_one(self, row: Tensor) -> Tensor:
        return half_cooperate(row, self.weight_of_one)

    def _of_tokens(self, rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        q = quantize_rows(rows, scale, zero)
        scale, zero = scale.unsqueeze(1), zero.float().unsqueeze(1)
        missed = self._missed_sums(q) if self.steps > self.lanes else torch.zeros(1, self.groups)
        out, width = torch.zeros(1), 4 * self.steps
        for g in range(self.groups):
            columns = slice(g * width, (g + 1) * width)
            total = (q[:, columns] - zero) @ self.values[:, columns].float().t()
            if self.excess is not None:
                total -= zero * self.excess[g]
            total += 8.0 * missed[:, g : g + 1]
            out = as_half(torch.addcmul(out, as_half(total), as_half(scale * self.scales[g])))
        return out


@prepared("et_vk.linear_q4gsw.default", "et_vk.q4gsw_linear.default")
def linear_q4gsw(site: Site) -> Kernel:
    out, held = site.result(), site.tensor(0).dtype
    # This operator's scales are converted when they are packed, so that they are never misread.
    weight = _weight(site, (1, 2, 3), site.tensor(2).dtype)
    bias = _bias(site, 4, weight.features, out.dtype)
    if weight.features % 4:
        raise site.error(f"N={weight.features} is not a multiple of 4")
    if site.tensor(1).shape[1] * 2 != weight.columns:
        raise site.error(
            f"K={weight.columns} for a weight of {site.tensor(1).shape[1]} bytes a row"
        )
    return WeightOnlyLinear(weight, bias, half=held == torch.float16)


class WeightOnlyLinear:
    """``linear_q4gsw``. Of a batch, the shader writes the first matrix only; the rest is zeros.

    In half precision its accumulator is half for several tokens and float for one
    (q4gsw_linear_gemm__tin__w_4x8.glsl, q4gsw_linear_gemv_coop__w_4x8.glsl).
    """

    def __init__(self, weight: Weight, bias: Tensor | None, half: bool) -> None:
        steps = weight.group_size // 4
        self.bias, self.half = bias, half
        if half:
            weight = Weight(weight.values, as_half(weight.scales), weight.group_size)
        self.weight_of_one = weight.scaled(steps, whole_groups=False)
        ragged = weight.columns % (4 * steps)
        self.weight = self.weight_of_one
        if half:
            self.weight = as_half(self._scaled_by_column(weight))
        elif ragged:
            self.weight = weight.scaled(steps, whole_groups=True)

    @staticmethod
    def _scaled_by_column(weight: Weight) -> Tensor:
        first_columns = torch.arange(weight.columns) // 4 * 4
        group = first_columns // weight.group_size
        scales = weight.group_scales(int(group.max()) + 1)
        return weight.values * scales[group].t()

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        tokens = x.shape[-2] if x.dim() > 1 else 1
        rows = x.reshape(-1, x.shape[-1])[:tokens]
        if tokens == 1:
            out = rows @ self.weight_of_one.t()
        elif self.half:
            out = half_accumulate(rows, self.weight.t())
        else:
            out = rows @ self.weight.t()
        if self.bias is not None:
            out = out + self.bias
        if rows.shape[0] == x.numel() // x.shape[-1]:
            return out.view(*x.shape[:-1], -1)
        batch = x.new_zeros(*x.shape[:-1], out.shape[-1])
        batch.view(-1, out.shape[-1])[:tokens] = out
        return batch
