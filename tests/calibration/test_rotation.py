"""Rotations: the same model in float, flatter weights, and what they do not fit."""

import pytest
import torch

from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.recipes import quantize_model
from edgepass.calibration.rotation import rotate
from edgepass.ops.errors import InvalidArgumentError
from tests.models.tiny_models import tiny_model

IDS = torch.arange(20)[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_stays_the_same_in_float(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    with torch.no_grad():
        before = model.model.layers[0].mlp.down_proj.weight.clone()
        expected = model(IDS).logits
        rotate(model)
        assert (model(IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not torch.allclose(model.model.layers[0].mlp.down_proj.weight, before, atol=1e-3)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)


def test_an_outlying_channel_is_spread() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[:, 3] *= 50
    before = float(weight.abs().max() / weight.square().mean().sqrt())
    rotate(model)
    assert float(weight.abs().max() / weight.square().mean().sqrt()) < 0.7 * before


def test_the_same_seed_turns_the_same_way() -> None:
    first, second = (tiny_model("llama") for _ in range(2))
    rotate(first, seed=3), rotate(second, seed=3)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "phi3"])
def test_other_layers_are_refused_and_left_alone(family: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidArgumentError, match="rotation=spinquant does not fit: got model="):
        rotate(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_recipe_asks_for_it() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    recipe = find_recipe("8da4w").with_group_size(16).changed(rotation="spinquant")
    quantize_model(model, recipe)
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert not torch.equal(head.qdata, table.qdata)
    with pytest.raises(InvalidArgumentError, match="accepted is one of both"):
        blocks = {"lm_head": (torch.zeros(96, 64, dtype=torch.int8), torch.ones(96, 4), None)}
        quantize_model(tiny_model("llama"), recipe, blocks=blocks)
