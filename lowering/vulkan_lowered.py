"""The delegates of a lowered program: named for the runtime, their original graphs let go."""

from __future__ import annotations

from executorch.exir import EdgeProgramManager
from executorch.exir.lowered_backend_module import LoweredBackendModule

from edgepass.lowering.shapes_only import replace_delegates, with_shapes_only
from edgepass.lowering.vulkan_backend import EdgepassVulkanBackend

RUNTIME_BACKEND = "VulkanBackend"


def name_for_runtime(manager: EdgeProgramManager) -> None:
    """Give delegates that :class:`EdgepassVulkanBackend` wrote the backend's name on the device."""
    replace_delegates(manager, _renamed)


def _renamed(module: LoweredBackendModule) -> LoweredBackendModule:
    ours = module.backend_id == EdgepassVulkanBackend.__name__
    return with_shapes_only(module, RUNTIME_BACKEND) if ours else module
