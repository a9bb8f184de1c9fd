"""What a module gets: sections laid over each other, overrides last and in their order."""

import pytest
from pydantic import ValidationError

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import parse_recipe
from edgepass.calibration.recipe_resolution import ActivationSpec, WeightSpec
from edgepass.ops.errors import InvalidArgumentError

LAYERED = parse_recipe(
    """
name: layered
weights: {bits: 4, group_size: 64, algorithm: hqq}
activations: {kind: dynamic}
embedding: {bits: 8, granularity: channel}
head: {weights: {bits: 6}, activations: {kind: none}}
observer: {kind: mse}
overrides:
- {modules: "*.down_proj", weights: {bits: 8}, observer: {kind: histogram}}
- {modules: "layers.0.*", weights: {granularity: channel}, activations: {mapping: symmetric}}
"""
)


def test_a_module_gets_the_defaults() -> None:
    found = LAYERED.for_module("layers.1.up_proj")
    assert found.weights == WeightSpec(4, "group", 64, "symmetric", "hqq")
    assert found.activations == ActivationSpec("dynamic", 8, "token", "asymmetric")
    assert found.observer.kind == "mse"


def test_the_embedding_and_the_head_get_their_own() -> None:
    table = LAYERED.for_module("embed", "embedding")
    assert table.weights == WeightSpec(8, "channel", None, "symmetric", "hqq")
    assert table.activations.kind == "none"
    head = LAYERED.for_module("lm_head", "head")
    assert (head.weights.bits, head.weights.group_size, head.activations.kind) == (6, 64, "none")


def test_overrides_win_field_by_field_in_their_order() -> None:
    down = LAYERED.for_module("layers.1.down_proj")
    assert down.weights == WeightSpec(8, "group", 64, "symmetric", "hqq")
    assert down.observer.kind == "histogram"
    both = LAYERED.for_module("layers.0.down_proj")
    assert both.weights == WeightSpec(8, "channel", None, "symmetric", "hqq")
    assert both.activations == ActivationSpec("dynamic", 8, "token", "symmetric")
    assert both.observer.kind == "histogram"


def test_a_granularity_drops_the_size_of_another() -> None:
    recipe = parse_recipe(
        "{name: x, weights: {granularity: block, block_size: 64},"
        " overrides: [{modules: a, weights: {granularity: group}},"
        " {modules: b, weights: {block_size: 16}}]}"
    )
    assert recipe.for_module("a").weights.group_size == 32
    assert recipe.for_module("b").weights.group_size == 16
    assert recipe.for_module("c").weights.granularity == "block"


def test_overrides_that_only_together_do_not_fit_are_refused() -> None:
    recipe = parse_recipe(
        "{name: x, overrides: [{modules: 'a*', weights: {granularity: channel}},"
        " {modules: ab, weights: {group_size: 16}}]}"
    )
    assert recipe.for_module("ac").weights.granularity == "channel"
    with pytest.raises(InvalidArgumentError, match="group_size=16 with granularity=channel"):
        recipe.for_module("ab")


def test_another_group_size_leaves_overrides_alone() -> None:
    recipe = parse_recipe("{name: x, overrides: [{modules: a, weights: {group_size: 16}}]}")
    changed = recipe.with_group_size(128)
    assert changed.for_module("b").weights.group_size == 128
    assert changed.for_module("a").weights.group_size == 16
    assert recipe.for_module("b").weights.group_size == 32


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LAYERED.weights = LAYERED.weights  # type: ignore[misc]
    with pytest.raises(ValidationError, match="did you mean 'bits'"):
        LAYERED.weights.changed(bit=4)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (4, -8, 7), (8, -128, 127)])
def test_the_integers_of_a_weight(bits: int, low: int, high: int) -> None:
    spec = WeightSpec(bits)
    assert (spec.low, spec.high) == (low, high)


def test_bits_of_a_float_cache_are_none() -> None:
    assert Recipe(name="x").kv_bits is None
    assert parse_recipe("{name: x, kv_cache: {bits: none}}").kv_bits is None
    assert parse_recipe("{name: x, kv_cache: {bits: 8}}").kv_bits == 8
