"""XNNPACK programs, run by the stock runtime and compared with the fused graph in eager mode."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import executorch.kernels.quantized  # noqa: F401
from executorch.runtime import Runtime
from transformers import LlamaConfig, LlamaForCausalLM

from edgepass.calibration.recipes import quantize_model
from edgepass.lowering.lower import lower
from edgepass.lowering.report import delegates, outside_delegates
from edgepass.lowering.xnnpack import lower_xnnpack
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.verification import signal_to_noise_db

CONTEXT, LAYERS = 48, 2


def _program():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    decoder = StaticCacheDecoder(model, CONTEXT)
    quantize_model(model, "8da4w", 32)
    return export_decoder(decoder)


def _round_scales_to_bfloat16(program):
    """XNNPACK keeps weight scales in bfloat16: give eager the same ones."""
    for name, tensor in program.state_dict.items():
        if "scale" in name and tensor.dim() == 2:
            program.state_dict[name] = tensor.bfloat16().float()


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    fused = fusion_pipeline().run(_program()).program
    _round_scales_to_bfloat16(fused)
    manager, declined = lower_xnnpack(fused, cache_dtype=torch.float32)
    path = tmp_path_factory.mktemp("xnnpack") / "model.pte"
    path.write_bytes(manager.buffer)
    return fused, manager, declined, path


def _steps():
    """A prompt in two chunks of different lengths, then single tokens."""
    torch.manual_seed(3)
    position = 0
    for count in (7, 12, 1, 1, 3, 1):
        yield torch.randint(0, 96, (1, count)), torch.tensor([position])
        position += count


def test_all_linears_stay_int4_and_delegates_are_few(lowered):
    _, manager, declined, _ = lowered
    assert declined == []
    assert delegates(manager) == {"forward": LAYERS + 2}


def test_only_caches_tables_and_scalars_stay_outside(lowered):
    _, manager, _, _ = lowered
    assert set(outside_delegates(manager)["forward"]) <= {
        "aten::sym_size",
        "aten::_local_scalar_dense",
        "aten::slice_copy",
        "executorch_prim::add",
        "executorch_prim::et_view",
        "llama::update_cache",
        "quantized_decomposed::embedding_4bit",
    }


def test_the_runtime_agrees_with_the_fused_graph(lowered):
    fused, _, _, path = lowered
    eager = fused.module(check_guards=False)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    for ids, position in _steps():
        wanted = eager(ids, position)
        got = method.execute([ids, position])[0]
        # One activation that rounds the other way costs what is left here.
        assert signal_to_noise_db(wanted, got) > 40


def test_half_the_cache_changes_little(lowered, tmp_path):
    fused, _, _, _ = lowered
    manager, _ = lower_xnnpack(fused)
    path = tmp_path / "half.pte"
    path.write_bytes(manager.buffer)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    eager = fused.module(check_guards=False)
    for ids, position in _steps():
        got = method.execute([ids, position])[0]
        assert signal_to_noise_db(eager(ids, position), got) > 30


def test_the_report_counts_and_compares(tmp_path):
    result = lower(_program(), backend="xnnpack", recipe="8da4w", model_name="tiny")
    linears = result.report["linears"]
    assert linears == {"total": 7 * LAYERS + 1, "fused": 7 * LAYERS + 1, "unfused": []}
    assert result.report["numerics"]["sqnr_db"] > 30
    assert result.report["pte_bytes"] == len(result.buffer)
    folder = result.save(tmp_path / "out")
    assert sorted(each.name for each in folder.iterdir()) == ["model.pte", "report.json"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(InvalidArgumentError, match="backend='tpu', accepted are vulkan, xnnpack"):
        lower(_program(), backend="tpu")
