"""Quantization-aware training of a graph for QNN: which recipes, and that the loss comes back."""

import copy

import pytest
import torch
from executorch.backends.qualcomm.quantizer.quantizer import QUANT_CONFIG_DICT
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

from edgepass.calibration.recipe_presets import PRESETS
from edgepass.lowering.qnn_quantizer import QnnQuantization
from edgepass.lowering.qnn_recipes import QNN_RECIPES, find_chip, find_qnn_recipe
from edgepass.lowering.recipe_legality import check_legality
from edgepass.ops.errors import InvalidArgumentError

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
Y = torch.sin(2 * X[:, :8]) * X[:, 8:16]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def loss_of(module: nn.Module) -> torch.Tensor:
    return (module(X) - Y).square().mean()


def learn(module: nn.Module, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()


def converted(name: str, module: nn.Module, steps: int = 0) -> nn.Module:
    quantization = QnnQuantization(find_qnn_recipe(name), find_chip("SM8650"))
    program = torch.export.export(copy.deepcopy(module), (X,), strict=False)
    prepared = quantization.prepare(program)
    if steps:
        move_exported_model_to_train(prepared)
        learn(prepared, steps, 1e-3)
        move_exported_model_to_eval(prepared)
    prepared(X)
    return quantization.convert(prepared)


def test_training_recovers_what_rounding_loses() -> None:
    exact_model = model()
    learn(exact_model, 300, 3e-3)
    exact = loss_of(exact_model).item()
    rounded = loss_of(converted("16a4w", exact_model)).item()
    trained = loss_of(converted("16a4w_qat", exact_model, steps=200)).item()
    assert rounded > 1.5 * exact
    assert rounded - trained > 0.4 * (rounded - exact)


@pytest.mark.parametrize("name", ["8a8w", "16a8w", "16a4w", "fp16a8w"])
def test_the_weights_of_each_recipe_learn(name: str) -> None:
    quantization = QnnQuantization(find_qnn_recipe(f"{name}_qat"), find_chip("SM8650"))
    prepared = quantization.prepare(torch.export.export(model(), (X,), strict=False))
    move_exported_model_to_train(prepared)
    before = loss_of(prepared).item()
    learn(prepared, 20, 1e-3)
    assert {key for key, _ in prepared.named_parameters()} >= {"0.weight", "2.weight"}
    assert loss_of(prepared).item() < 0.9 * before


def test_four_bit_rows_are_one_block_each_but_not_in_training() -> None:
    for name, rounded in (("16a4w", "dequantize_affine"), ("16a4w_qat", "per_channel")):
        graph = converted(name, model()).graph
        found = [n for n in graph.nodes if n.op == "call_function" and n.args[0].op == "get_attr"]
        assert any(rounded in str(node.target) for node in found)


def test_the_recipes_with_training_are_those_of_the_stock_quantizer() -> None:
    trained = {name for name in QNN_RECIPES if f"{name}_qat" in PRESETS}
    stock = {dtype.name.removeprefix("use_") for dtype, qat in QUANT_CONFIG_DICT if qat}
    # In training the stock quantizer does not learn the weights behind its block observers.
    assert trained == (stock & set(QNN_RECIPES)) - {"16a4w_block"}
    for name, recipe in QNN_RECIPES.items():
        asked = recipe.asked.changed(qat=True)
        if name in trained:
            check_legality(asked, "qnn")
        else:
            with pytest.raises(InvalidArgumentError, match=r"qat=True \(nearest: False\)"):
                check_legality(asked, "qnn")
