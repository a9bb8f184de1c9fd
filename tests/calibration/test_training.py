"""Quantization-aware training: what is trained is what is stored, and the loss comes back."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torchao.quantization.qat.linear import FakeQuantizedLinear

from edgepass.calibration.recipe_file import parse_recipe
from edgepass.calibration.recipe_modules import plan_modules
from edgepass.calibration.recipes import find_recipe, quantize_model
from edgepass.calibration.training import train_for
from edgepass.ops.errors import InvalidArgumentError
from tests.models.tiny_models import tiny_model

IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(IDS).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


def learn(model: nn.Module, steps: int = 20, rate: float = 3e-3) -> None:
    torch.manual_seed(0)
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    for each in parameters:
        each.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    model.requires_grad_(False)


@cache
def learnt() -> nn.Module:
    """A tiny model with a tied head that knows a few texts by heart."""
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    learn(model, steps=40)
    return model


def low(name: str):
    """The recipe with so few bits that rounding costs the tiny model something."""
    recipe = find_recipe(name)
    return recipe.changed(weights=recipe.weights.changed(bits=3))


@pytest.mark.parametrize("name", ["8da4w", "4w", "8da8w", "8w"])
def test_training_recovers_most_of_what_rounding_loses(name: str) -> None:
    exact = loss_of(learnt()).item()
    rounded = loss_of(quantize_model(copy.deepcopy(learnt()), low(name))).item()
    trained = quantize_model(copy.deepcopy(learnt()), low(f"{name}_qat"), train=learn)
    assert rounded > 2 * exact
    assert rounded - loss_of(trained).item() > 0.6 * (rounded - exact)


MIXED = """
name: mixed
qat: true
weights: {bits: 4, group_size: 32, algorithm: mse}
activations: {kind: dynamic}
embedding: {bits: 4, mapping: asymmetric}
overrides:
- {modules: "*.down_proj", weights: {bits: 8, granularity: channel}}
- {modules: "*.up_proj", weights: {bits: none}}
- {modules: "*.o_proj", activations: {kind: none}}
"""


@pytest.mark.parametrize("text", [None, MIXED], ids=["8da4w", "mixed"])
def test_the_model_in_training_computes_what_is_stored(text) -> None:
    recipe = find_recipe("8da4w_qat") if text is None else parse_recipe(text)
    seen = {}

    def look(model: nn.Module) -> None:
        seen["kinds"] = {type(each) for each in model.modules()}
        with torch.no_grad():
            seen["logits"] = model(IDS).logits

    model = quantize_model(copy.deepcopy(learnt()), recipe, train=look)
    assert FakeQuantizedLinear in seen["kinds"]
    difference = seen["logits"] - model(IDS).logits
    # Sums in another order, and an activation that rounds the other way now and then.
    assert difference.square().mean() < 1e-4 * seen["logits"].square().mean()


def test_a_tied_head_stays_tied() -> None:
    model = quantize_model(copy.deepcopy(learnt()), "8da4w_qat", train=learn)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(head.qdata, table.qdata) and torch.equal(head.scale, table.scale)


def test_a_training_that_fails_leaves_a_plain_model() -> None:
    model = copy.deepcopy(learnt())
    before = [type(each) for each in model.modules()]

    def fail(_: nn.Module) -> None:
        raise KeyError("no data")

    with pytest.raises(KeyError, match="no data"):
        train_for(model, plan_modules(model, find_recipe("8da4w_qat")), fail)
    assert [type(each) for each in model.modules()] == before
    assert torch.equal(model(IDS).logits, learnt()(IDS).logits)


def test_training_goes_with_its_recipes_only() -> None:
    model = copy.deepcopy(learnt())
    with pytest.raises(
        InvalidArgumentError, match="recipe=8da4w_qat without train=, accepted is a"
    ):
        quantize_model(model, "8da4w_qat")
    with pytest.raises(InvalidArgumentError, match="got train= with recipe=8da4w, accepted are"):
        quantize_model(model, "8da4w", train=learn)
    assert torch.equal(model(IDS).logits, learnt()(IDS).logits)
