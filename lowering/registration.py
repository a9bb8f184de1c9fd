"""Putting edgepass into ExecuTorch's stock pipelines, and taking it out again."""

from __future__ import annotations

import importlib.util
from types import ModuleType

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
    lowered as before. The stock ``QnnQuantizer`` and ``to_edge_transform_and_lower_to_qnn`` run
    edgepass's passes for HTP, where this ExecuTorch has the QNN backend (no QNN library is needed
    for that); a collection of your own, given to ``register_qnn_passes`` before, stays. Also makes
    the recipes of ``edgepass.lowering.recipe_provider`` known to ``executorch.export``. Calling it
    again changes nothing; safe to call from several threads.

    Raises ProgramError if ExecuTorch's partitioners no longer have the methods it hooks into, and
    PassError if its QNN backend keeps its passes elsewhere.
    """
    from edgepass.lowering.recipe_provider import provide_recipes

    _HOOKS.install()
    try:
        qnn = _qnn_registration()
        if qnn is not None and not qnn.is_registered():
            qnn.register_qnn_passes()
    except Exception:
        _HOOKS.remove()
        raise
    provide_recipes()


def unregister() -> None:
    """Undo :func:`register`: stock pipelines are as they were. Calling it again changes nothing."""
    from edgepass.lowering.recipe_provider import withdraw_recipes

    _HOOKS.remove()
    qnn = _qnn_registration()
    if qnn is not None:
        qnn.unregister_qnn_passes()
    withdraw_recipes()


def _qnn_registration() -> ModuleType | None:
    """The registration for QNN, None where ExecuTorch is built without that backend."""
    if importlib.util.find_spec("executorch.backends.qualcomm") is None:
        return None
    from edgepass.lowering import qnn_registration

    return qnn_registration


def is_registered() -> bool:
    """Tell whether the stock pipelines fuse at present."""
    return _HOOKS.installed
