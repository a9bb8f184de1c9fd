"""Quantized linears and tables in both dialects, as their frontends export them."""

from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed
import torchao.quantization.quant_primitives
from torch import nn

torchao = torch.ops.torchao
decomposed = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Form:
    """How a linear is written: dialect, spelling, encodings."""

    dialect: str = "torchao"
    spelling: str = "linear"
    rows: int = 8
    columns: int = 32
    group: int = 16
    asymmetric: bool = False
    fraction: float = 0.0
    bias: bool = False
    dynamic: bool = True
    low: int = -8
    high: int = 7
    dtype: torch.dtype = torch.float32


class QuantizedLinear(nn.Module):
    """A linear of a random integer weight; ``dequantized`` is its weight in float."""

    def __init__(self, form: Form, seed: int = 0) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(seed)
        shape = (form.rows, form.columns // form.group)
        values = torch.randint(
            form.low, form.high + 1, (form.rows, form.columns), generator=generator
        )
        dtype = torch.uint8 if form.low >= 0 else torch.int8
        self.register_buffer("values", values.to(dtype))
        scales = 0.01 + torch.rand(shape, generator=generator)
        self.register_buffer("scales", scales.to(form.dtype))
        zeros = torch.randint(form.low, form.high + 1, shape, generator=generator)
        zeros = zeros if form.asymmetric else torch.zeros_like(zeros)
        zeros = zeros + form.fraction if form.fraction else zeros.to(torch.int8)
        self.register_buffer("zeros", zeros)
        # As PT2E stores the encodings of a channel: one dimension.
        self.register_buffer("channel_scales", self.scales[:, 0].clone())
        self.register_buffer("channel_zeros", self.zeros[:, 0].clone())
        bias = torch.randn(form.rows, generator=generator).to(form.dtype)
        self.register_buffer("bias", bias if form.bias else None)

    def forward(self, x):
        y = self.activation(x) if self.form.dynamic else x
        weight, rows, columns = self.dequantized(), self.form.rows, self.form.columns
        if self.form.spelling == "linear":
            return nn.functional.linear(y, weight, self.bias)
        if self.form.spelling == "matmul":
            return torch.matmul(y, weight.t())
        if self.form.spelling == "bmm":
            turned = weight.t().unsqueeze(0).expand(y.shape[0], columns, rows)
            return torch.bmm(y, turned)
        flat = y.view(-1, columns)
        turned = weight.t() if self.form.spelling == "mm" else weight.permute(1, 0)
        out = torch.mm(flat, turned) if self.bias is None else torch.addmm(self.bias, flat, turned)
        return out.view(*x.shape[:-1], rows)

    def activation(self, x):
        if self.form.dialect == "torchao":
            block = [1] * (x.dim() - 1) + [x.shape[-1]]
            low, high, int8 = -128, 127, torch.int8
            scale, zero = torchao.choose_qparams_affine(
                x, "ASYMMETRIC", block, int8, low, high, None, None, int8
            )
            q = torchao.quantize_affine(x, block, scale, zero, int8, low, high)
            return torchao.dequantize_affine(
                q, block, scale, zero, int8, low, high, output_dtype=self.form.dtype
            )
        encoding = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
        q = decomposed.quantize_per_token(x, *encoding, -128, 127, torch.int8)
        return decomposed.dequantize_per_token(q, *encoding, -128, 127, torch.int8, self.form.dtype)

    def dequantized(self):
        form, bounds = self.form, (self.form.low, self.form.high, self.values.dtype)
        if form.dialect == "torchao":
            low, high, dtype = bounds
            encoding = (self.scales, self.zeros, dtype, low, high)
            return torchao.dequantize_affine(
                self.values, [1, form.group], *encoding, output_dtype=form.dtype
            )
        if form.group == form.columns:
            return decomposed.dequantize_per_channel(
                self.values, self.channel_scales, self.channel_zeros, 0, *bounds
            )
        return decomposed.dequantize_per_channel_group(
            self.values, self.scales, self.zeros, *bounds, form.group, form.dtype
        )

    def float64_weight(self) -> torch.Tensor:
        """The weight as the form defines it, apart from any operator."""
        groups = self.values.double().unflatten(1, (-1, self.form.group))
        zeros, scales = (each.double().unsqueeze(-1) for each in (self.zeros, self.scales))
        return ((groups - zeros) * scales).flatten(1)


def quantized_rows(x: torch.Tensor) -> torch.Tensor:
    """x rounded to its int8 grid, a row at a time, in float64; scales as float32 computes them."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    q = (torch.round(x * (1.0 / scale)) + zero).clamp(-128, 127)
    return (q - zero).double() * scale.double()
