"""Which operators of the Vulkan runtime the simulator knows, by the names that programs carry.

A name is known here only if the runtime registers it (``VK_REGISTER_OP`` in
``graph/ops/impl/*.cpp``): what stops a device at load time must stop the simulator too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from edgepass.ops.errors import SimulatorError
from edgepass.simulator.graph import Call, Several, TensorValue, VulkanGraph

Kernel = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Site:
    """One call while its kernel is prepared: what a load on the device would know.

    ``taken`` are the places of constants that the kernel has prepared; it is given None there.
    """

    graph: VulkanGraph
    call: Call
    taken: set[int] = field(default_factory=set)

    def argument(self, place: int) -> Any:
        """The value of an argument as the graph holds it."""
        if not -len(self.call.arguments) <= place < len(self.call.arguments):
            raise self.error(f"argument {place} of {len(self.call.arguments)} is missing")
        return self.graph.values[self.call.arguments[place]]

    def tensor(self, place: int) -> TensorValue:
        """An argument that must be a tensor."""
        value = self.argument(place)
        if not isinstance(value, TensorValue):
            raise self.error(f"argument {place} is {type(value).__name__}, accepted is a tensor")
        return value

    def constant(self, place: int) -> Tensor:
        """The content of an argument that must be a constant tensor, which is then taken."""
        value = self.tensor(place)
        if value.constant is None:
            raise self.error(f"argument {place} is computed, accepted is a constant")
        self.taken.add(place)
        return value.load()

    def integer(self, place: int, least: int) -> int:
        """An argument that must be an integer of ``least`` or more, known at load."""
        value = self.argument(place)
        if not isinstance(value, int) or value < least:
            raise self.error(f"argument {place} is {value!r}, accepted are integers from {least}")
        return value

    def result(self) -> TensorValue:
        """The tensor that the call writes."""
        value = self.graph.values[self.call.result]
        if not isinstance(value, TensorValue):
            raise self.error(f"its result is {type(value).__name__}, accepted is a tensor")
        return value

    def results(self) -> list[TensorValue]:
        """The tensors that the call writes, of which there may be several."""
        value = self.graph.values[self.call.result]
        if not isinstance(value, Several):
            return [self.result()]
        return [each for each in map(self.graph.values.__getitem__, value.ids) if each is not None]

    def error(self, reason: str) -> SimulatorError:
        """Return the error for a call that the device's runtime would not take."""
        return SimulatorError(f"{self.call.name}: {reason}")


# Packs a constant for the device; done once, when a program is loaded.
PREPACK = "et_vk.prepack.default"
OPERATORS: dict[str, Callable[[Site], Kernel]] = {}


def prepared(*names: str) -> Callable[[Function], Function]:
    """Register what makes the kernel of a call when the program is loaded."""

    def register(prepare: Function) -> Function:
        for name in names:
            OPERATORS[name] = prepare
        return prepare

    return register


def operator(*names: str) -> Callable[[Function], Function]:
    """Register a function of the call's arguments that needs no preparation."""

    def register(kernel: Function) -> Function:
        prepared(*names)(lambda site: kernel)
        return kernel

    return register


def require_known(calls: Iterable[Call]) -> None:
    """Raise SimulatorError that names each operator of ``calls`` that is not registered."""
    unknown = sorted({call.name for call in calls} - OPERATORS.keys() - {PREPACK})
    if unknown:
        raise SimulatorError(
            f"unknown operator: got {', '.join(unknown)}; known are the {len(OPERATORS)} that "
            "docs/simulator.md lists"
        )


def as_half(value: Tensor) -> Tensor:
    """Round float32 values to those that half precision can hold, kept in float32."""
    return value.to(torch.float16).to(torch.float32)
