"""Which modules a recipe speaks of; patterns that match none, and ones that contradict."""

import pytest
from torch import nn

from edgepass.calibration.recipe_file import parse_recipe
from edgepass.calibration.recipe_modules import plan_modules, quantized_sites
from edgepass.ops.errors import InvalidArgumentError
from tests.models.tiny_models import tiny_model

DOWN = "model.layers.1.mlp.down_proj"


def overriding(*overrides: str):
    return parse_recipe(f"name: x\noverrides: [{', '.join(overrides)}]")


def override(modules: str, bits: int = 8, section: str = "") -> str:
    return f"{{modules: '{modules}', weights: {{bits: {bits}}}{section}}}"


def test_the_sites_of_a_decoder() -> None:
    for tied in (False, True):
        sites = quantized_sites(tiny_model("llama", tie_word_embeddings=tied))
        assert sites["model.embed_tokens"] == "embedding"
        assert sites["lm_head"] == "head"
        assert sites[DOWN] == "linear"
        assert len(sites) == 2 * 7 + 2


def test_the_head_of_a_plain_module_is_known_by_its_name() -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    assert quantized_sites(model) == {"up": "linear", "lm_head": "head"}


def test_every_site_is_planned() -> None:
    model = tiny_model()
    planned = plan_modules(model, overriding(override("*.down_proj"), override(DOWN, 6)))
    assert planned.keys() == quantized_sites(model).keys()
    bits = {name: each.weights.bits for name, each in planned.items()}
    assert bits[DOWN] == 6
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.0.mlp.up_proj"] == 4


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest() -> None:
    recipe = overriding(override("model.layers.0.mlp.down_porj"))
    with pytest.raises(InvalidArgumentError) as caught:
        plan_modules(tiny_model(), recipe)
    assert "overrides.0.modules='model.layers.0.mlp.down_porj', which matches no linear" in str(
        caught.value
    )
    assert "did you mean 'model.layers.0.mlp.down_proj'?" in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (override(DOWN), override(DOWN, 6)),
        (override("*.down_proj"), override("*.down_proj", 6)),
        (override("*.down_proj"), override("model.layers.1.*", 6)),
        (override(DOWN), override("*.down_proj", 6)),
    ],
    ids=["one module twice", "one pattern twice", "crossing", "the wider one last"],
)
def test_a_module_that_is_asked_for_two_things_is_refused(overrides) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        plan_modules(tiny_model(), overriding(*overrides))
    assert f"got weights.bits for {DOWN} twice, 8 by overrides.0" in str(caught.value).replace(
        "model.layers.0.mlp.down_proj", DOWN
    )
    assert "6 by overrides.1" in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (override("*.down_proj"), override("model.layers.1.*")),
        (override("*.down_proj"), override("model.layers.1.*", 6), override(DOWN, 5)),
        (
            override("*.down_proj"),
            "{modules: 'model.layers.1.*', activations: {mapping: symmetric}}",
        ),
    ],
    ids=["the same value", "settled by a third", "other fields"],
)
def test_overrides_that_do_not_contradict_are_taken(overrides) -> None:
    planned = plan_modules(tiny_model(), overriding(*overrides))
    assert planned[DOWN].weights.bits == (5 if len(overrides) == 3 else 8)


def test_a_block_that_does_not_divide_names_its_key() -> None:
    recipe = parse_recipe("{name: x, weights: {granularity: block, block_size: 48}}")
    with pytest.raises(InvalidArgumentError, match="got block_size=48, which does not divide"):
        plan_modules(tiny_model(), recipe)


def test_a_module_that_stays_float_may_have_any_width() -> None:
    recipe = parse_recipe(
        "{name: x, weights: {group_size: 48}, overrides: [{modules: '*', weights: {bits: none}}]}"
    )
    assert {each.weights.bits for each in plan_modules(tiny_model(), recipe).values()} == {None}
