"""edgepass in ExecuTorch's own registry of export recipes (``executorch.export``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig
from executorch.exir.backend.partitioner import Partitioner
from executorch.export import (
    AOQuantizationConfig,
    BackendRecipeProvider,
    ExportRecipe,
    LoweringRecipe,
    QuantizationRecipe,
    RecipeType,
    recipe_registry,
)
from torch.export import ExportedProgram

from edgepass.calibration.recipe_presets import PRESETS
from edgepass.calibration.torchao_config import torchao_config
from edgepass.lowering.edge_forms import edge_config
from edgepass.lowering.vulkan_hooks import FusedVulkanPartitioner
from edgepass.lowering.vulkan_hooks import fuse as fuse_for_vulkan
from edgepass.lowering.xnnpack_hooks import fuse as fuse_for_xnnpack
from edgepass.lowering.xnnpack_partition import FusedXnnpackPartitioner
from edgepass.ops.errors import InvalidArgumentError

BACKEND = "edgepass"
_GROUP_SIZE = 32


class EdgepassRecipeType(RecipeType):
    """The recipes: quantized by torchao, fused by edgepass, lowered for the backend named."""

    XNNPACK_8DA4W = "edgepass_xnnpack_8da4w"
    VULKAN_8DA4W = "edgepass_vulkan_8da4w"
    VULKAN_4W = "edgepass_vulkan_4w"

    @classmethod
    def get_backend_name(cls) -> str:
        """Return the name that the registry knows edgepass by."""
        return BACKEND


class EdgepassRecipeProvider(BackendRecipeProvider):
    """Gives ``executorch.export`` the recipes of :class:`EdgepassRecipeType`."""

    @property
    def backend_name(self) -> str:
        """The name that the registry knows edgepass by."""
        return BACKEND

    def get_supported_recipes(self) -> Sequence[RecipeType]:
        """Return every recipe there is."""
        return list(EdgepassRecipeType)

    def create_recipe(self, recipe_type: RecipeType, **kwargs: Any) -> ExportRecipe | None:
        """Return the recipe, None if it is another provider's.

        ``group_size``: weights that share a scale, 32 by default; it must divide the input features
        of every linear. Raises InvalidArgumentError for any other keyword or a group size below 1.
        """
        if not isinstance(recipe_type, EdgepassRecipeType):
            return None
        fuse, partitioners = _FLOWS[recipe_type]
        preset = PRESETS[recipe_type.value.rsplit("_", 1)[1]].with_group_size(_group_size(kwargs))
        config = AOQuantizationConfig(torchao_config(preset.for_module("")))
        return ExportRecipe(
            name=recipe_type.value,
            quantization_recipe=QuantizationRecipe(ao_quantization_configs=[config]),
            aten_transform_passes=[lambda method, program: fuse(program)],
            lowering_recipe=LoweringRecipe(
                partitioners=partitioners(), edge_compile_config=edge_config()
            ),
            executorch_backend_config=ExecutorchBackendConfig(extract_delegate_segments=True),
            strict=False,
        )


def provide_recipes() -> None:
    """Make the recipes known to ``executorch.export``; nothing if they are known."""
    if BACKEND not in recipe_registry.list_backends():
        recipe_registry.register_backend_recipe_provider(EdgepassRecipeProvider())


def withdraw_recipes() -> None:
    """Take the recipes out of ``executorch.export`` again."""
    # The registry has no public way to forget a provider.
    recipe_registry._providers.pop(BACKEND, None)


def _group_size(options: dict[str, Any]) -> int:
    for name in options:
        if name != "group_size":
            raise InvalidArgumentError(f"unknown option: got {name}, accepted is group_size")
    group_size = options.get("group_size", _GROUP_SIZE)
    if not isinstance(group_size, int):
        raise InvalidArgumentError(f"got group_size={group_size}, accepted are whole numbers")
    return group_size


def _xnnpack() -> list[Partitioner]:
    return [FusedXnnpackPartitioner(), XnnpackPartitioner()]


def _vulkan() -> list[Partitioner]:
    options: dict[str, Any] = {}
    return [FusedVulkanPartitioner(options)]


Flow = tuple[Callable[[ExportedProgram], ExportedProgram], Callable[[], list[Partitioner]]]
_VULKAN: Flow = (partial(fuse_for_vulkan, half=False), _vulkan)
_FLOWS: dict[RecipeType, Flow] = {
    EdgepassRecipeType.XNNPACK_8DA4W: (fuse_for_xnnpack, _xnnpack),
    EdgepassRecipeType.VULKAN_8DA4W: _VULKAN,
    EdgepassRecipeType.VULKAN_4W: _VULKAN,
}
