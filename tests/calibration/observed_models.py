"""The small attention of the pass tests with observers of any kind, and their state as bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from edgepass.calibration.collecting_graph import is_observer
from tests.passes import kv_models
from tests.passes.kv_models import KEY, WIDTH, Annotator, Chunk

LENGTH = 6


class Observed(Annotator):
    """The annotator of the pass tests with ``observer`` for activations."""

    def __init__(self, observer: Any) -> None:
        self.observer = observer

    def annotate(self, model: GraphModule) -> GraphModule:
        super().annotate(model)
        for node in model.graph.nodes:
            if (annotation := node.meta.get(KEY)) is not None:
                specs = annotation.input_qspec_map
                annotation.input_qspec_map = {key: self._own(spec) for key, spec in specs.items()}
                annotation.output_qspec = self._own(annotation.output_qspec)
        return model

    def _own(self, spec: Any) -> Any:
        if not isinstance(spec, QuantizationSpec) or spec is kv_models.WEIGHT:
            return spec
        # One specification stays one: what is shared is found by equality.
        bits = 8 if spec.dtype == torch.uint8 else 16
        return QuantizationSpec(
            dtype=spec.dtype,
            quant_min=0,
            quant_max=2**bits - 1,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=self.observer,
        )


def prepared(observer: Any = None, module: nn.Module | None = None, seed: int = 0) -> GraphModule:
    """A prepared graph of two blocks of attention, with random weights by ``seed``."""
    torch.manual_seed(seed)
    example = (torch.zeros(1, LENGTH, WIDTH),)
    module = module or Chunk()
    if observer is None:
        return kv_models.prepare(module, example)
    program: Any = torch.export.export(module.eval(), example, strict=False)
    return prepare_pt2e(program.module(check_guards=False), Observed(observer))


def chunks(count: int, seed: int = 1) -> Tensor:
    """Random inputs ``[count, LENGTH, WIDTH]`` that grow and shrink."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(count, 1, 1, generator=generator) * 3
    return torch.randn(count, LENGTH, WIDTH, generator=generator) * sizes


def inputs(chunk: Tensor) -> tuple[Tensor]:
    return (chunk[None],)


def observers(graph: GraphModule) -> dict[str, Any]:
    """The observers of a prepared graph by name."""
    calls = [node for node in graph.graph.nodes if is_observer(graph, node)]
    return {str(node.target): graph.get_submodule(str(node.target)) for node in calls}


def encodings(graph: GraphModule) -> dict[str, list[bytes]]:
    """Scale and zero point of each observer, bit by bit."""
    return {
        name: [each.detach().numpy().tobytes() for each in observer.calculate_qparams()]
        for name, observer in observers(graph).items()
    }
