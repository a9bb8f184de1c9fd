"""Which recipe each backend can hold, and what is said of those that it cannot."""

import pytest

from edgepass.calibration.recipe_file import find_recipe, parse_recipe
from edgepass.calibration.recipe_presets import ALIASES, PRESETS
from edgepass.lowering.recipe_legality import check_legality, check_modules
from edgepass.ops.errors import InvalidArgumentError
from tests.models.tiny_models import tiny_model

LEGAL = {
    "xnnpack": {"8da4w", "8da8w"},
    "vulkan": {"8da4w", "4w", "8da8w", "8w"},
    "qnn": {"8a8w", "8a4w", "16a16w", "16a8w", "16a4w", "16a4w_block", "fp16a8w"},
}
UNTRAINED = [name for name, recipe in PRESETS.items() if not recipe.qat]


@pytest.mark.parametrize("backend", LEGAL)
@pytest.mark.parametrize("name", UNTRAINED)
def test_presets_by_backend(name: str, backend: str) -> None:
    if name in LEGAL[backend]:
        check_legality(PRESETS[name], backend)
    else:
        with pytest.raises(InvalidArgumentError, match=f"recipe={name}, which backend={backend}"):
            check_legality(PRESETS[name], backend)


@pytest.mark.parametrize("name", [*ALIASES])
def test_aliases_are_legal_where_they_are_for(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.backend is not None
    check_legality(recipe, recipe.backend)


ILLEGAL = [
    ("xnnpack", "weights: {group_size: 16}", "weights.group_size=16 (nearest: 32)"),
    ("xnnpack", "weights: {group_size: 100}", "weights.group_size=100 (nearest: 96)"),
    (
        "xnnpack",
        "weights: {mapping: asymmetric}",
        "weights.mapping=asymmetric (nearest: symmetric)",
    ),
    ("xnnpack", "activations: {kind: none}", "activations.kind=none (nearest: dynamic)"),
    ("xnnpack", "kv_cache: {bits: 8}", "kv_cache.bits=8 (nearest: none)"),
    ("xnnpack", "backend: qnn", "backend=qnn (nearest: xnnpack)"),
    ("vulkan", "weights: {bits: 16}", "weights.bits=16 (nearest: 8)"),
    ("vulkan", "weights: {granularity: tensor}", "weights.granularity=tensor (nearest: channel)"),
    ("vulkan", "weights: {granularity: block}", "weights.granularity=block (nearest: group)"),
    ("vulkan", "activations: {kind: dynamic, bits: 16}", "activations.bits=16 (nearest: 8)"),
    ("vulkan", "activations: {kind: static}", "activations.kind=static (nearest: dynamic)"),
    ("vulkan", "head: {weights: {bits: 16}}", "head.weights.bits=16 (nearest: 8)"),
    ("vulkan", "embedding: {bits: 16}", "embedding.weights.bits=16 (nearest: 8)"),
    ("qnn", "weights: {bits: 6, granularity: channel}", "weights.bits=6 (nearest: "),
    ("qnn", "weights: {granularity: group}", "weights.granularity=group (nearest: block)"),
    ("qnn", "activations: {mapping: symmetric}", "activations.mapping=symmetric (nearest: asymm"),
    (
        "qnn",
        "overrides: [{modules: x, weights: {bits: 3}}]",
        "overrides.0.weights.bits=3 (nearest: 4",
    ),
]
BASES = {
    "xnnpack": {"activations": "{kind: dynamic}"},
    "vulkan": {},
    "qnn": {
        "weights": "{granularity: channel}",
        "activations": "{kind: static, bits: 16}",
        "embedding": "{bits: none}",
    },
}


@pytest.mark.parametrize(("backend", "text", "message"), ILLEGAL)
def test_the_part_and_the_nearest_are_named(backend: str, text: str, message: str) -> None:
    key, _, value = text.partition(": ")
    sections = {**BASES[backend], key: value}
    if backend == "qnn" and key == "activations":
        sections[key] = "{kind: static, bits: 16, mapping: symmetric}"
    recipe = parse_recipe("\n".join(f"{k}: {v}" for k, v in {"name": "x", **sections}.items()))
    with pytest.raises(InvalidArgumentError) as caught:
        check_legality(recipe, backend)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_illegal_part_is_told_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_legality(PRESETS["16a16w"], "xnnpack")
    for part in ("backend=qnn", "kv_cache.bits=8", "weights.bits=16", "activations.kind=static"):
        assert part in str(caught.value)


def test_what_is_computed_in_float_is_told() -> None:
    assert check_legality(PRESETS["8da4w"], "vulkan") == []
    told = check_legality(PRESETS["8da8w"], "vulkan")
    assert "weights.bits=8 (computed in float, nearest: 4)" in told


def test_with_a_model_the_module_is_named() -> None:
    model = tiny_model()
    recipe = parse_recipe(
        "{name: x, activations: {kind: dynamic},"
        " overrides: [{modules: model.embed_tokens, weights: {bits: 8, granularity: channel}}]}"
    )
    check_legality(recipe, "xnnpack")
    check_modules(recipe, model, "xnnpack")
    wrong = parse_recipe(
        "{name: x, activations: {kind: dynamic},"
        " overrides: [{modules: '*.1.mlp.up_proj', weights: {bits: 8, group_size: 32}}]}"
    )
    place = r"model.layers.1.mlp.up_proj.weights.granularity=group"
    with pytest.raises(InvalidArgumentError, match=place):
        check_modules(wrong, model, "xnnpack")
