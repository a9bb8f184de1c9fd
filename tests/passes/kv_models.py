"""A small attention with a KV cache as inputs, and PT2E graphs of it, quantized without a backend.

``Annotator`` is a quantizer of its own: 16-bit activations, 8-bit cache, channel or block weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from edgepass.passes.value_names import call_name, is_view

KEY = "quantization_annotation"
WIDTH = 16


def activation(bits: int) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.uint8 if bits == 8 else torch.int32,
        quant_min=0,
        quant_max=2**bits - 1,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=1e-12),
    )


WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=1e-12),
)


class Block(nn.Module):
    """One head. Outputs: the result, new keys ``[1, S, W]``, new values; caches ``[1, P, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, caches: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        keys, values = self.k(x) * 1.5, self.v(x)
        every = (keys, values)
        if caches is not None:
            every = torch.cat([caches[0], keys], 1), torch.cat([caches[1], values], 1)
        weights = torch.softmax(self.q(x) @ every[0].transpose(1, 2), -1)
        return x + self.o(weights @ every[1]), keys, values


class Chunk(nn.Module):
    """Blocks one behind the other, without caches. ``first`` and ``second`` share no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, k0, v0 = self.first(x, None)
        x, k1, v1 = self.second(x, None)
        return x, k0, k1, v0, v1


class Step(Chunk):
    """The same with caches: inputs x, k0, k1, v0, v1."""

    def forward(self, x, k_cache_0, k_cache_1, v_cache_0, v_cache_1):  # type: ignore[override]
        x, k0, v0 = self.first(x, (k_cache_0, v_cache_0))
        x, k1, v1 = self.second(x, (k_cache_1, v_cache_1))
        return x, k0, k1, v0, v1


PAIRS = [(1, 1), (2, 2), (3, 3), (4, 4)]


class Annotator(Quantizer):
    """16 bits everywhere, 8 for what a matmul takes second and for the caches behind it."""

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            kind = call_name(node)
            if kind == "aten.linear":
                inputs = {node.args[0]: activation(16), node.args[1]: WEIGHT}
                self._set(node, inputs, activation(16))
            elif kind in ("aten.mul", "aten.add", "aten.softmax"):
                values = [arg for arg in node.args if isinstance(arg, torch.fx.Node)]
                self._set(node, dict.fromkeys(values, activation(16)), activation(16))
            elif kind == "aten.matmul":
                inputs = {node.args[0]: activation(16), node.args[1]: activation(8)}
                self._set(node, inputs, activation(16))
                self._cache(node.args[1])
        output = model.graph.output_node()
        new_rows = ("aten.mul", "aten.linear")
        rows = {each: activation(8) for each in output.args[0] if call_name(each) in new_rows}
        output.meta[KEY] = QuantizationAnnotation(input_qspec_map=rows, _annotated=True)
        return model

    def _cache(self, node: Any) -> None:
        if is_view(node):
            source = node.args[0]
            shared = SharedQuantizationSpec((source, node))
            self._set(node, {source: activation(8)}, shared)
            self._cache(source)
        elif call_name(node) == "aten.cat":
            parts = node.args[0]
            shared = SharedQuantizationSpec((parts[0], node))
            self._set(node, {parts[0]: activation(8), parts[1]: shared}, shared)

    def _set(self, node: Any, inputs: Any, output: Any) -> None:
        node.meta[KEY] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=output, _annotated=True
        )

    def validate(self, model: GraphModule) -> None:
        """Nothing to check."""


def prepare(module: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    exported: Any = torch.export.export(module.eval(), inputs, strict=False)
    return prepare_pt2e(exported.module(check_guards=False), Annotator())


def quantized(
    module: nn.Module, batches: Iterable[tuple[Any, ...]], run: Callable[..., Any] | None = None
) -> GraphModule:
    batches = list(batches)
    prepared = prepare(module, batches[0])
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    return convert_pt2e(prepared)


def empty_caches(past: int) -> list[Tensor]:
    # One tensor passed four times would be exported as one input.
    return [torch.zeros(1, past, WIDTH) for _ in range(4)]


def chunk_and_step(past: int = 7, seed: int = 0) -> tuple[GraphModule, GraphModule, Chunk, Tensor]:
    """A calibrated chunk graph, a step graph that saw other data, the model, and the tokens."""
    torch.manual_seed(seed)
    chunk, step = Chunk(), Step()
    step.load_state_dict(chunk.state_dict())
    x = torch.randn(1, past + 1, WIDTH)
    empty = empty_caches(past)
    source = quantized(chunk, [(x,)])
    return source, quantized(step, [(torch.randn(1, 1, WIDTH) * 9, *empty)]), chunk, x
