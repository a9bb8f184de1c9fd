"""Recipes: what the weights become, what stays equal, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor, quantize_

from edgepass.calibration.recipe_file import find_recipe, parse_recipe
from edgepass.calibration.recipes import quantize_model
from edgepass.calibration.torchao_config import torchao_config
from edgepass.ops.errors import InvalidArgumentError
from tests.models.tiny_models import tiny_model

FOUR_BITS = ("8da4w", "4w")
MODES = {"8da4w": "int8_asym_per_token", "4w": None}


class Layers(nn.Module):
    """Two linears of the given widths, one with a bias, and an embedding."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, out), nn.Linear(out, width, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.table(ids)))


def weights(model: nn.Module) -> dict[str, IntxUnpackedToInt8Tensor]:
    kinds = (nn.Linear, nn.Embedding)
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("recipe", FOUR_BITS)
def test_every_linear_and_embedding_is_quantized(recipe: str) -> None:
    model = quantize_model(Layers(64, 96), recipe, 32)
    found = weights(model)
    assert {type(weight) for weight in found.values()} == {IntxUnpackedToInt8Tensor}
    assert {weight.target_dtype for weight in found.values()} == {torch.int4}
    assert found["up"].activation_quantization == MODES[recipe]
    assert found["table"].activation_quantization is None


@given(
    st.sampled_from([2, 8, 32]),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 2**16),
)
@settings(max_examples=20)
def test_values_scales_and_error_bound(group: int, groups: int, dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = Layers(group * groups, 64).to(dtype)
    before = model.up.weight.detach().double()
    weight = quantize_model(model, "8da4w", group).up.weight
    assert weight.qdata.shape == before.shape
    assert weight.qdata.dtype == torch.int8
    assert weight.scale.shape == weight.zero_point.shape == (64, groups)
    assert weight.scale.dtype == dtype
    assert weight.qdata.min() >= -8 and weight.qdata.max() <= 7
    assert not weight.zero_point.any()
    error = (weight.dequantize().double() - before).abs().unflatten(1, (groups, group))
    # Nothing is clipped: half a step, and the rounding of the scale itself.
    slack = 8 * torch.finfo(dtype).eps
    assert (error <= weight.scale.double()[..., None] * (0.5 + slack)).all()


@pytest.mark.parametrize("recipe", FOUR_BITS)
def test_a_tied_head_equals_the_embedding(recipe: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize_model(model, recipe, 16)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(head.qdata, table.qdata)
    assert torch.equal(head.scale, table.scale)
    assert torch.equal(head.zero_point, table.zero_point)


def test_names_stay_readable() -> None:
    before = set(dict(tiny_model().named_parameters()))
    assert set(dict(quantize_model(tiny_model(), "8da4w", 32).named_parameters())) == before


@pytest.mark.parametrize("recipe", FOUR_BITS)
def test_a_quantized_model_computes_with_its_dequantized_weights(recipe: str) -> None:
    model = quantize_model(Layers(64, 96), recipe, 32).eval()
    ids = torch.arange(11)
    exact = Layers(64, 96)
    exact.table.weight = nn.Parameter(model.table.weight.dequantize())
    exact.up.weight = nn.Parameter(model.up.weight.dequantize())
    exact.up.bias = nn.Parameter(model.up.bias.detach())
    exact.down.weight = nn.Parameter(model.down.weight.dequantize())
    expected, found = exact(ids), model(ids)
    # Weight-only is the same arithmetic; int8 activations round each input to 1 part in 255.
    tolerance = 0.05 * expected.abs().max() if recipe == "8da4w" else 1e-6
    assert (found - expected).abs().max() <= tolerance


@pytest.mark.parametrize("recipe", ["8da8w", "8w"])
def test_eight_bits_have_a_scale_a_row(recipe: str) -> None:
    found = weights(quantize_model(Layers(64, 96), recipe))
    for weight in found.values():
        assert weight.target_dtype == torch.int8
        assert weight.scale.shape == (weight.shape[0], 1)
        assert weight.qdata.abs().max() > 8


CASES = ["8da4w", "4w", "8da8w", "8w"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tensors_are_those_of_torchao(name: str, mapping: str, dtype) -> None:
    recipe = find_recipe(name)
    recipe = recipe.changed(weights=recipe.weights.changed(mapping=mapping))
    torch.manual_seed(0)
    model = Layers(64, 96).to(dtype)
    stock = copy.deepcopy(model)
    for kind, role in ((nn.Linear, "linear"), (nn.Embedding, "embedding")):
        config = torchao_config(recipe.for_module("", role))
        quantize_(stock, config, lambda module, _, kind=kind: isinstance(module, kind))
    expected, found = weights(stock), weights(quantize_model(model, recipe))
    for path, weight in found.items():
        for tensor in weight.tensor_data_names:
            left, right = getattr(weight, tensor), getattr(expected[path], tensor)
            assert left.dtype == right.dtype and torch.equal(left, right)
        for attribute in weight.tensor_attribute_names:
            assert getattr(weight, attribute) == getattr(expected[path], attribute)


def test_the_algorithm_of_each_module_is_used() -> None:
    text = "{name: x, overrides: [{modules: up, weights: {algorithm: mse}}]}"
    torch.manual_seed(0)
    model = Layers(64, 96)
    plain = weights(quantize_model(copy.deepcopy(model), "4w"))
    found = weights(quantize_model(copy.deepcopy(model), parse_recipe(text)))
    assert torch.equal(found["down"].scale, plain["down"].scale)
    errors = [(each["up"].dequantize() - model.up.weight).square().sum() for each in (found, plain)]
    assert errors[0] < errors[1]


MIXED = """
name: mixed
weights: {bits: 4, group_size: 32}
activations: {kind: dynamic}
embedding: {bits: 8, granularity: channel}
overrides:
- {modules: up, weights: {group_size: 16, mapping: asymmetric}}
- {modules: down, weights: {bits: 3, group_size: 96}, activations: {kind: none}}
"""


def test_each_module_gets_its_own_bits_and_groups() -> None:
    found = weights(quantize_model(Layers(64, 96), parse_recipe(MIXED)))
    facts = {
        name: (w.target_dtype, w.block_size, w.activation_quantization, bool(w.zero_point.any()))
        for name, w in found.items()
    }
    assert facts == {
        "table": (torch.int8, (1, 64), None, False),
        "up": (torch.int4, (1, 16), "int8_asym_per_token", True),
        "down": (torch.int3, (1, 96), None, False),
    }
    assert found["down"].qdata.min() >= -4 and found["down"].qdata.max() <= 3


def test_a_module_that_stays_float_keeps_its_parameter() -> None:
    model = Layers(64, 96)
    before = model.up.weight
    quantize_model(
        model, parse_recipe("{name: x, overrides: [{modules: up, weights: {bits: none}}]}")
    )
    assert model.up.weight is before
    assert isinstance(model.down.weight, IntxUnpackedToInt8Tensor)


def test_a_recipe_of_another_flow_changes_nothing() -> None:
    model = Layers(64, 96)
    with pytest.raises(InvalidArgumentError, match=r"got \S+=\S+ for up, which torchao"):
        quantize_model(model, "16a8w")
    assert not any(isinstance(w, IntxUnpackedToInt8Tensor) for w in weights(model).values())


def test_a_recipe_without_groups_takes_no_group_size() -> None:
    with pytest.raises(InvalidArgumentError, match="group_size=32 for recipe=8da8w, whose weights"):
        quantize_model(Layers(64, 96), "8da8w", 32)


@pytest.mark.parametrize("group_size", [0, -32, 1])
def test_a_group_size_below_two_is_refused(group_size: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"got group_size={group_size}, accepted are 2"):
        quantize_model(Layers(64, 96), "8da4w", group_size)


@pytest.mark.parametrize("group_size", [33, 128])
def test_a_group_size_that_does_not_divide_is_refused(group_size: int) -> None:
    model = Layers(64, 96)
    with pytest.raises(InvalidArgumentError) as caught:
        quantize_model(model, "8da4w", group_size)
    assert f"group_size={group_size}, which does not divide the 64 columns of" in str(caught.value)
    assert not any(isinstance(w, IntxUnpackedToInt8Tensor) for w in weights(model).values())


def test_the_linear_that_does_not_divide_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="does not divide the 96 columns of down"):
        quantize_model(Layers(64, 96), "8da4w", 64)


def test_a_quantized_model_is_refused() -> None:
    model = quantize_model(Layers(64, 96), "8da4w", 32)
    with pytest.raises(InvalidArgumentError, match="already quantized: got table"):
        quantize_model(model, "8da4w", 32)
