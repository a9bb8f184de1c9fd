"""The Python file of an allocation for QNN, executed against the installed backend."""

import pytest

from edgepass.calibration.recipe_file import parse_recipe
from edgepass.lowering.qnn_recipe_source import qnn_recipe_source

pytest.importorskip("executorch.backends.qualcomm.quantizer.quant_recipe")

TEXT = """
name: chosen
backend: qnn
weights: {bits: 4, granularity: block, block_size: 32}
activations: {kind: static, bits: 16}
embedding: {bits: none}
overrides:
- modules: "*.down_proj"
  weights: {block_size: 16, granularity: block}
- modules: "model.layers.1.self_attn.v_proj"
  weights: {bits: 8, granularity: channel}
"""
MODULES = [
    f"model.layers.{layer}.{role}"
    for layer in (0, 1, 11)
    for role in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


def executed(text: str):
    found: dict = {}
    exec(compile(text, "qnn_recipe.py", "exec"), found)  # what a user's import does
    return found["recipe"]


def test_it_holds_what_each_module_gets() -> None:
    recipe = executed(qnn_recipe_source(parse_recipe(TEXT), MODULES))
    default, *rules = recipe._strategies
    assert (default.quant_dtype.name, default.extra_kwargs) == (
        "use_16a4w_block",
        {"block_size": (1, 32, 1, 1)},
    )
    assert {str(target) for target in default.targets} == {
        "aten.conv2d.default",
        "aten.linear.default",
    }
    told = {
        (rule.quant_dtype.name, rule.extra_kwargs.get("block_size")): rule.patterns
        for rule in rules
    }
    assert set(told) == {("use_16a4w_block", (1, 16, 1, 1)), ("use_16a8w", None)}
    assert len(told["use_16a4w_block", (1, 16, 1, 1)]) == 3
    # Layer 1 is not layer 11.
    (only,) = told["use_16a8w", None]
    import re

    assert [m for m in MODULES if re.search(only, m)] == ["model.layers.1.self_attn.v_proj"]


def test_by_channel_alone_there_are_no_rules() -> None:
    text = TEXT[: TEXT.index("overrides")].replace("block, block_size: 32", "channel")
    recipe = executed(qnn_recipe_source(parse_recipe(text), MODULES))
    (default,) = recipe._strategies
    assert (default.quant_dtype.name, default.granularity.name) == ("use_16a4w", "PER_CHANNEL")
