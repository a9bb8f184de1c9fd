"""Putting edgepass into ExecuTorch's stock pipelines, and taking it out again."""

from __future__ import annotations

from edgepass.lowering.partitioner_hooks import Hook, HookSet


def _hooks() -> list[Hook]:
    from edgepass.lowering.vulkan_hooks import vulkan_hooks
    from edgepass.lowering.xnnpack_hooks import xnnpack_hooks

    return [*xnnpack_hooks(), *vulkan_hooks()]


_HOOKS = HookSet(_hooks)


def register() -> None:
    """Let stock ``to_edge_transform_and_lower`` fuse and delegate as edgepass does.

    From now on, in this process, a program that is lowered with a stock ``XnnpackPartitioner`` or
    ``VulkanPartitioner`` is fused before it is decomposed. Programs in which nothing is fused are
    lowered as before. Also makes the recipes of ``edgepass.lowering.recipe_provider`` known to
    ``executorch.export``. Calling it again changes nothing; safe to call from several threads.

    Raises ProgramError if ExecuTorch's partitioners no longer have the methods it hooks into.
    """
    from edgepass.lowering.recipe_provider import provide_recipes

    _HOOKS.install()
    provide_recipes()


def unregister() -> None:
    """Undo :func:`register`: stock pipelines are as they were. Calling it again changes nothing."""
    from edgepass.lowering.recipe_provider import withdraw_recipes

    _HOOKS.remove()
    withdraw_recipes()


def is_registered() -> bool:
    """Tell whether the stock pipelines fuse at present."""
    return _HOOKS.installed
