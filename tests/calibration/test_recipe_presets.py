"""The names of recipes: edgepass's own, and those of ExecuTorch's ``--pt2e_quantize``."""

import pytest
from executorch.extension.llm.export.config.llm_config import Pt2eQuantize

from edgepass.calibration.recipe_file import find_recipe, format_recipe, parse_recipe
from edgepass.calibration.recipe_presets import ALIASES, PRESETS
from edgepass.ops.errors import InvalidArgumentError

NAMED = {
    "8da4w": (4, "group", 32, "dynamic"),
    "8da8w": (8, "channel", None, "dynamic"),
    "4w": (4, "group", 32, "none"),
    "8w": (8, "channel", None, "none"),
    "8a8w": (8, "channel", None, "static"),
    "8a4w": (4, "channel", None, "static"),
    "16a16w": (16, "channel", None, "static"),
    "16a8w": (8, "channel", None, "static"),
    "16a4w": (4, "channel", None, "static"),
    "16a4w_block": (4, "block", 32, "static"),
    "fp16a8w": (8, "channel", None, "none"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_preset_is_what_its_name_says(name: str) -> None:
    recipe = find_recipe(name)
    module = recipe.for_module("model.layers.0.mlp.up_proj")
    weights = module.weights
    found = (weights.bits, weights.granularity, weights.group_size, module.activations.kind)
    assert found == NAMED[name]
    if module.activations.kind == "static":
        assert str(module.activations.bits) == name.partition("a")[0]


def test_each_preset_has_its_name_and_survives_a_file() -> None:
    for name, recipe in PRESETS.items():
        assert recipe.name == name
        assert recipe.qat == name.endswith("_qat")
        assert parse_recipe(format_recipe(recipe)) == recipe
    assert set(NAMED) == {name for name, recipe in PRESETS.items() if not recipe.qat}


def test_a_trained_preset_is_the_other_one_trained() -> None:
    for name, recipe in PRESETS.items():
        if recipe.qat:
            untrained = PRESETS[name.removesuffix("_qat")]
            assert recipe.changed(name=untrained.name, qat=False) == untrained


OTHERS = ("openvino", "coreml", "tosa", "ethosu", "vgf")


@pytest.mark.parametrize("name", [each.value for each in Pt2eQuantize])
def test_each_name_of_the_stock_table_is_known(name: str) -> None:
    owner = name.partition("_")[0]
    if owner in OTHERS:
        with pytest.raises(InvalidArgumentError, match=f"got recipe='{name}', which is for "):
            find_recipe(name)
        return
    recipe = find_recipe(name)
    assert (recipe.name, recipe.backend) == (name, owner)
    assert recipe.for_module("", "embedding").weights.bits is None


def test_aliases_are_what_the_stock_quantizers_do() -> None:
    dynamic = find_recipe("xnnpack_dynamic").for_module("")
    assert (dynamic.weights.bits, dynamic.weights.granularity) == (8, "channel")
    assert dynamic.activations.kind == "dynamic"
    four = find_recipe("xnnpack_dynamic_qc4").for_module("")
    assert (four.weights.bits, four.weights.granularity) == (4, "channel")
    alone = find_recipe("vulkan_8w").for_module("")
    assert (alone.weights.bits, alone.activations.kind) == (8, "none")
    assert set(ALIASES) >= {f"qnn_{name}" for name in ("8a8w", "16a16w", "16a4w", "16a4w_block")}


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidArgumentError, match=r"recipe='8da3w', did you mean '8da\dw'\?"):
        find_recipe("8da3w")
    with pytest.raises(
        InvalidArgumentError, match=r"got recipe='x', accepted are 8da4w, 8da8w, 4w"
    ):
        find_recipe("x")
