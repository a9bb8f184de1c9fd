"""Small programs of edgepass's operators, and an eager run of what is made of them for Vulkan.

The run uses stock's CPU kernels of the runtime's operators, which are independent of edgepass, but
for three: ``linear_dq8ca_q4gsw`` ignores there that activations are quantized,
``choose_qparams_affine`` that the runtime raises small scales, and ``select_as_symint`` has none.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import edgepass.ops  # noqa: F401
from edgepass.lowering.vulkan_rewrite import Rewritten
from edgepass.ops import pack_int4, unpack_int4

fused = torch.ops.edgepass


class QuantizedLinear(nn.Module):
    """Random int4 weights; called with the three outputs of ``quantize_per_token``."""

    def __init__(self, k: int, n: int, group_size: int = 32, bias: bool = False, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
        self.group_size = group_size
        self.register_buffer("packed", pack_int4(weight))
        self.register_buffer("scales", torch.rand(n, k // group_size, generator=generator) + 0.5)
        self.register_buffer("zeros", torch.zeros(n, k // group_size, dtype=torch.int8))
        self.register_buffer("bias", torch.randn(n, generator=generator) if bias else None)
        self.scales /= 8 * math.sqrt(k)

    def forward(self, quantized: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return fused.linear_qta8a_qga4w(*quantized, *self.weight())

    def of_float(self, x: Tensor) -> Tensor:
        return fused.linear_qga4w(x, *self.weight())

    def weight(self) -> tuple[Any, ...]:
        return self.packed, self.group_size, self.scales, self.zeros, self.bias


class ForeignLinear(QuantizedLinear):
    """A linear that is not taken: its zero points are another tensor than the activation's."""

    def forward(self, quantized: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, scale, zero = quantized
        return super().forward((q, scale, zero.to(torch.int32)))


class DecoderLayer(nn.Module):
    cap = 0.0

    def __init__(self, width: int, heads: int, kv_heads: int, head: int, seed: int):
        super().__init__()
        self.head, self.window, self.scale = head, 0, 1 / math.sqrt(head)
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.q = QuantizedLinear(width, heads * head, seed=seed)
        self.k = QuantizedLinear(width, kv_heads * head, seed=seed + 1)
        self.v = QuantizedLinear(width, kv_heads * head, seed=seed + 2)
        self.o = QuantizedLinear(heads * head, width, seed=seed + 3)
        self.gate = QuantizedLinear(width, 2 * width, seed=seed + 4)
        self.up = QuantizedLinear(width, 2 * width, seed=seed + 5)
        self.down = QuantizedLinear(2 * width, width, seed=seed + 6)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(1, x.shape[1], -1, self.head).transpose(1, 2)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return fused.rotary(x, cos, sin, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, caches: Any, pos: Any) -> Tensor:
        index, input_pos = pos
        h = fused.quantize_per_token(fused.rms_norm(x, self.norm, 1e-5))
        q = self.rotate(self.heads(self.q(h)), cos, sin)
        keys = caches[0].index_copy_(2, index, self.rotate(self.heads(self.k(h)), cos, sin))
        values = caches[1].index_copy_(2, index, self.heads(self.v(h)))
        a = fused.cached_attention(q, keys, values, input_pos, self.scale, self.window, self.cap)
        a = a.transpose(1, 2).reshape(1, x.shape[1], -1)
        x = x + self.o(fused.quantize_per_token(a))
        h = fused.quantize_per_token(fused.rms_norm(x, self.norm, 1e-5))
        h = nn.functional.silu(self.gate(h)) * self.up(h)
        return x + self.down(fused.quantize_per_token(h))


class Decoder(nn.Module):
    """A decoder as the passes leave it: tied int4 table, grouped-query attention, one KV cache."""

    layer_type = DecoderLayer

    def __init__(self, layers: int = 1, vocabulary: int = 64, context: int = 32, rotary: int = 16):
        super().__init__()
        width, heads, kv_heads, head = 64, 4, 2, 16
        self.table = QuantizedLinear(width, vocabulary)
        self.norm = nn.Parameter(torch.linspace(1.5, 0.5, width))
        self.layers = nn.ModuleList(
            self.layer_type(width, heads, kv_heads, head, seed=10 * i) for i in range(layers)
        )
        frequencies = 100.0 ** (-torch.arange(0, rotary, 2) / rotary)
        angles = torch.arange(context)[:, None] * frequencies[None].repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for i in range(layers):
            self.register_buffer(f"k_cache_{i}", torch.zeros(1, kv_heads, context, head))
            self.register_buffer(f"v_cache_{i}", torch.zeros(1, kv_heads, context, head))

    def forward(self, input_ids: Tensor, input_pos: Tensor) -> Tensor:
        tokens = input_ids.shape[1]
        table = self.table
        x = fused.embedding_qg(table.packed, table.scales, None, table.group_size, 4, input_ids)
        pos = input_pos + torch.arange(tokens), input_pos
        cos = fused.position_rows(self.cos, input_pos, tokens)
        sin = fused.position_rows(self.sin, input_pos, tokens)
        for i, layer in enumerate(self.layers):
            caches = getattr(self, f"k_cache_{i}"), getattr(self, f"v_cache_{i}")
            x = layer(x, cos, sin, caches, pos)
        x = fused.rms_norm(x[:, -1:], self.norm, 1e-5)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        return self.table.of_float(x)


class Mlp(nn.Module):
    """Two linears of one float activation each, with an activation function between them."""

    def __init__(self, k: int = 64, n: int = 96, group_size: int = 32, bias: bool = True):
        super().__init__()
        self.first = QuantizedLinear(k, n, group_size, bias)
        self.second = QuantizedLinear(n, k, group_size, bias, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(fused.quantize_per_token(x)))
        return self.second(fused.quantize_per_token(hidden))


def export_decoder(decoder: Decoder) -> ExportedProgram:
    tokens = Dim("tokens", min=1, max=decoder.cos.shape[0] - 1)
    example = torch.zeros(1, 7, dtype=torch.long), torch.tensor([3])
    with torch.no_grad():
        return export(decoder.eval(), example, dynamic_shapes=({1: tokens}, {}), strict=False)


def export_tokens(module: nn.Module, width: int, lead: tuple[int, ...] = (1,)) -> ExportedProgram:
    """Export a module of one input ``[*lead, tokens, width]``, the token count dynamic."""
    dynamic = {len(lead): Dim("tokens", min=1, max=31)}
    with torch.no_grad():
        return export(module.eval(), (torch.randn(*lead, 5, width),), dynamic_shapes=(dynamic,))


class EagerRun(torch.fx.Interpreter):
    """Runs a raw program on its own copy of the constants, which keeps caches between calls."""

    def __init__(self, program: ExportedProgram | Rewritten):
        program = program.program if isinstance(program, Rewritten) else program
        super().__init__(program.graph_module)
        tensors = {**program.constants, **program.state_dict}
        targets = [spec.target for spec in program.graph_signature.input_specs if spec.target]
        self.constants = [tensors[target].clone() for target in targets]

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            (output,) = self.run(*self.constants, *inputs)
        return output

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        replaced = {
            torch.ops.et_vk.select_as_symint.default: lambda x, dim, index: int(x[index]),
            torch.ops.et_vk.linear_dq8ca_q4gsw.default: dynamic_linear,
            torch.ops.torchao.choose_qparams_affine.default: choose_encodings,
        }
        return super().call_function(replaced.get(target, target), args, kwargs)


def choose_encodings(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``choose_qparams_affine`` as the runtime computes it, which flushes scales below 6.1e-5."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 0.1, scale)
    raised = scale.clamp(min=6.1e-5)
    zero = -128 - (low / scale).round()
    return raised, zero.clamp(-128, 127).to(torch.int8)


def dynamic_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    sums: Tensor,
    scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``linear_dq8ca_q4gsw`` as the runtime computes it for several tokens, in float64.

    Integer products of activations and weights are summed by groups; the activation's zero point is
    taken out by means of the weights' group ``sums``.
    """
    k, n = x.shape[-1], packed.shape[0]
    q = (x / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    q = q.clamp(-128, 127).double().unflatten(-1, (-1, group_size))
    w = unpack_int4(packed, packed.shape[1] * 2)[:, :k].double().unflatten(-1, (-1, group_size))
    products = torch.einsum("...gk,ngk->...gn", q, w)
    products = products - zero[..., None, None].double() * sums[:, :n].double()
    y = (products * scales.double()).sum(-2) * scale.double().unsqueeze(-1)
    return (y if bias is None else y + bias.double()).to(x.dtype)


def sqnr_db(got: Tensor, wanted: Tensor) -> float:
    """Signal-to-noise ratio of ``got`` against ``wanted`` in dB."""
    noise = (got.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise.clamp_min(1e-300)))
