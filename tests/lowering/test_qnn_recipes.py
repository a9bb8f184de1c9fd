"""Names of recipes and chips; unknown ones are listed."""

from dataclasses import replace

import pytest

from edgepass.calibration.recipe_sections import KvCache
from edgepass.lowering.qnn_recipes import (
    QNN_RECIPES,
    check_chip,
    check_kv_bits,
    find_chip,
    find_qnn_recipe,
)
from edgepass.ops.errors import InvalidArgumentError


@pytest.mark.parametrize("name", QNN_RECIPES)
def test_each_recipe_is_one_of_the_stock_backend(name) -> None:
    recipe = find_qnn_recipe(name)
    # 4-bit rows under 16-bit activations go to HTP as one LPBQ block each.
    assert recipe.quant_dtype().name == f"use_{name}{'_block' if name == '16a4w' else ''}"
    check_kv_bits(recipe, 16 if recipe.activation_bits is None else 8)


def test_a_recipe_of_another_backend_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="recipe=8da4w, which backend=qnn cannot hold"):
        find_qnn_recipe("8da4w")


def test_an_unknown_chip_is_refused_with_the_known_ones() -> None:
    assert find_chip("SM8650").name == "SM8650"
    with pytest.raises(InvalidArgumentError, match=r"got soc='SM1', accepted are .*SM8650"):
        find_chip("SM1")


def test_caches_of_16_bits_are_refused_on_chips_that_cannot_multiply_by_them() -> None:
    recipe = find_qnn_recipe("16a8w")
    wide = replace(recipe, asked=recipe.asked.changed(kv_cache=KvCache(bits=16)))
    for chosen, bits in ((recipe, 16), (wide, None)):
        check_chip(chosen, bits, find_chip("SM8550"))
        with pytest.raises(InvalidArgumentError, match="got kv_bits=16 for soc=SM8450, whose HTP"):
            check_chip(chosen, bits, find_chip("SM8450"))
    for chosen, bits in ((recipe, None), (wide, 8), (find_qnn_recipe("fp16a8w"), None)):
        check_chip(chosen, bits, find_chip("SM8450"))
