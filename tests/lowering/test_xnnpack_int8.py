"""Weights of 8 bits inside XNNPACK's delegates, alone and beside weights of 4."""

import executorch.kernels.quantized  # noqa: F401
import pytest
import torch
from executorch.runtime import Runtime
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis

from edgepass.api import explain, export_quantized
from edgepass.calibration.recipe_file import parse_recipe
from edgepass.lowering.lower import lower
from edgepass.passes.verification import signal_to_noise_db
from tests.models.tiny_models import tiny_model

MIXED = """
name: mixed
weights: {bits: 4, group_size: 32}
activations: {kind: dynamic}
overrides:
- modules: "*.v_proj"
  weights: {bits: 8, granularity: channel}
- modules: "*.0.mlp.down_proj"
  weights: {bits: 6, granularity: channel}
- modules: "lm_head"
  weights: {bits: 8, granularity: channel}
"""
UNIFORM = "name: uniform\nweights: {bits: 4, group_size: 32}\nactivations: {kind: dynamic}"


def lowered(text: str):
    torch.manual_seed(0)
    model = tiny_model("llama")
    return lower(export_quantized(model, parse_recipe(text), 24), backend="xnnpack")


@pytest.mark.parametrize(
    "text", [MIXED, UNIFORM.replace("4, group_size: 32", "8, granularity: channel")]
)
def test_the_runtime_agrees_with_the_fused_graph(text: str) -> None:
    result, plain = lowered(text), lowered(UNIFORM)
    linears = result.report["linears"]
    assert linears["fused"] == linears["total"] > 0
    # Both kinds stand in the delegates that 4 bits alone have.
    assert result.report["delegates"] == plain.report["delegates"]
    assert result.report["pte_bytes"] > plain.report["pte_bytes"]
    eager = result.fused.module(check_guards=False)
    method = Runtime.get().load_program(result.buffer).load_method("forward")
    position = 0
    for count in (5, 1, 3):
        ids, at = torch.randint(0, 40, (1, count)), torch.tensor([position])
        # An activation that rounds the other way, and the float16 cache, cost what is left.
        assert signal_to_noise_db(eager(ids, at), method.execute([ids, at])[0]) > 30
        position += count


@pytest.mark.parametrize(("n", "k", "bias"), [(5, 32, False), (48, 96, True), (7, 1030, True)])
def test_one_linear_is_exact_on_the_runtime(n: int, k: int, bias: bool) -> None:
    torch.manual_seed(n)
    module = torch.nn.Sequential(torch.nn.Linear(k, n, bias=bias)).eval()
    config = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    quantize_(module, config)
    samples = (torch.randn(6, k),)
    with torch.no_grad():
        program = torch.export.export(module, samples)
    result = lower(program, backend="xnnpack")
    assert result.report["delegates"] == {"forward": 1}
    assert result.report["outside_delegates"] == {"forward": {}}
    found = Runtime.get().load_program(result.buffer).load_method("forward").execute(samples)[0]
    with torch.no_grad():
        rows = [signal_to_noise_db(a, b) for a, b in zip(module(*samples), found, strict=True)]
    # A row in which a value lies half-way may round it the other way.
    assert sum(each > 100 for each in rows) >= 5, rows
    assert min(rows) > 35


def test_explain_names_the_kernel_of_each() -> None:
    torch.manual_seed(0)
    rows = explain(export_quantized(tiny_model("llama"), parse_recipe(MIXED), 24), "xnnpack")
    by_name = {row["name"].rpartition("model.")[2]: row["how"] for row in rows}
    assert "qcint8" in by_name["layers.0.self_attn.v_proj"]
    assert "qbint4" in by_name["layers.0.self_attn.q_proj"]


def test_vulkan_still_computes_it_in_float() -> None:
    torch.manual_seed(0)
    rows = explain(export_quantized(tiny_model("llama"), parse_recipe(MIXED), 24), "vulkan")
    reasons = {row["name"].rpartition(".")[2]: row["reason"] for row in rows if not row["fused"]}
    assert "beyond 4 bits" in reasons["v_proj"]
