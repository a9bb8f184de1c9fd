"""edgepass's recipes in ExecuTorch's own registry, run by its export session."""

import executorch.kernels.quantized  # noqa: F401
import pytest
import torch
from executorch.export import ExportRecipe, export, recipe_registry
from executorch.runtime import Runtime

import edgepass
from edgepass.lowering.recipe_provider import EdgepassRecipeType
from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.verification import signal_to_noise_db
from tests.lowering.test_registration import Gated, quantized, with_bfloat16_scales


@pytest.fixture
def registered():
    edgepass.register()
    yield
    edgepass.unregister()


def test_the_registry_lists_the_recipes_while_registered(registered) -> None:
    assert "edgepass" in recipe_registry.list_backends()
    assert set(recipe_registry.get_supported_recipes("edgepass")) == set(EdgepassRecipeType)
    edgepass.unregister()
    assert "edgepass" not in recipe_registry.list_backends()


def test_a_session_makes_a_program_that_runs(registered) -> None:
    x = torch.randn(1, 5, 64)
    recipe = ExportRecipe.get_recipe(EdgepassRecipeType.XNNPACK_8DA4W, group_size=32)
    session = export(Gated().requires_grad_(False), [(x,)], recipe)
    program = Runtime.get().load_program(session.get_pte_buffer())
    result = program.load_method("forward").execute([x])[0]
    assert signal_to_noise_db(with_bfloat16_scales(quantized())(x), result) > 40


@pytest.mark.parametrize("kind", [EdgepassRecipeType.VULKAN_8DA4W, EdgepassRecipeType.VULKAN_4W])
def test_vulkan_recipes_delegate_everything(registered, kind) -> None:
    session = export(
        Gated().requires_grad_(False), [(torch.randn(1, 5, 64),)], ExportRecipe.get_recipe(kind)
    )
    buffer = bytes(session.get_pte_buffer())
    kernel = b"linear_q4gsw" if kind is EdgepassRecipeType.VULKAN_4W else b"linear_dq8ca_q4gsw"
    assert b"VulkanBackend" in buffer and kernel in buffer


@pytest.mark.parametrize(
    ("options", "message"),
    [({"group": 32}, "got group, accepted is group_size"), ({"group_size": 0}, "got group_size=0")],
)
def test_wrong_options_are_refused(registered, options, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ExportRecipe.get_recipe(EdgepassRecipeType.XNNPACK_8DA4W, **options)
