"""Capped attention scores (Gemma 2) inside the XNNPACK delegates, run by the stock runtime."""

import executorch.kernels.quantized  # noqa: F401
import pytest
import torch
from executorch.runtime import Runtime

from edgepass.lowering.report import delegates, outside_delegates
from edgepass.lowering.xnnpack import lower_xnnpack
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.targets import is_call
from edgepass.passes.verification import signal_to_noise_db
from tests.models.tiny_models import tiny_model

LAYERS = 2


@pytest.fixture(scope="module")
def lowered():
    program = export_decoder(StaticCacheDecoder(tiny_model("gemma2"), 48))
    fused = fusion_pipeline().run(program).program
    manager, _ = lower_xnnpack(fused, cache_dtype=torch.float32)
    return fused, manager


def test_every_attention_keeps_its_cap(lowered):
    fused, _ = lowered
    attentions = [n for n in fused.graph.nodes if is_call(n, "edgepass.cached_attention")]
    assert [node.args[5:] for node in attentions] == [(6, 5.0), (0, 5.0)]


def test_nothing_is_computed_outside(lowered):
    _, manager = lowered
    assert delegates(manager) == {"forward": LAYERS + 2}
    assert set(outside_delegates(manager)["forward"]) <= {
        *("aten::sym_size", "aten::_local_scalar_dense", "aten::slice_copy", "aten::embedding"),
        *("executorch_prim::add", "executorch_prim::et_view", "llama::update_cache"),
    }


def test_the_runtime_agrees_with_transformers_in_float64(lowered):
    _, manager = lowered
    method = Runtime.get().load_program(manager.buffer).load_method("forward")
    exact = tiny_model("gemma2").double()
    tokens = torch.randint(0, 96, (1, 19), generator=torch.Generator().manual_seed(3))
    position = 0
    for count in (7, 9, 1, 2):
        ids = tokens[:, position : position + count]
        got = method.execute([ids, torch.tensor([position])])[0]
        position += count
        wanted = exact(tokens[:, :position]).logits[:, -1:]
        assert signal_to_noise_db(wanted.reshape(-1), got.double().reshape(-1)) > 100
