"""Running a Vulkan delegate on the CPU, call by call, with sizes that may change between runs.

Values of half precision are kept in float32, rounded to half whenever a call writes one: that is
what the device's half storage does to results that its shaders compute in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgepass.ops.errors import EdgepassError, InvalidArgumentError, SimulatorError
from edgepass.simulator import kernels  # noqa: F401  (registers the operators)
from edgepass.simulator.graph import Call, Several, Symbol, TensorValue, VulkanGraph
from edgepass.simulator.registry import OPERATORS, PREPACK, Kernel, Site, as_half, require_known

_MISSING = object()


@dataclass(frozen=True)
class Step:
    """One call with its kernel, and the places of arguments that the kernel took at load.

    A kernel with a ``reset`` holds state, such as a cache.
    """

    call: Call
    kernel: Kernel
    taken: frozenset[int]


class Delegate:
    """A loaded delegate. Caches keep their content between runs, as on the device."""

    def __init__(self, graph: VulkanGraph) -> None:
        """Prepare each call. Raises SimulatorError for what the device could not load."""
        require_known(graph.calls)
        self.graph = graph
        self._first: list[Any] = [self._at_load(value) for value in graph.values]
        self._packed = [call for call in graph.calls if call.name == PREPACK]
        self.steps = [_prepare(graph, call) for call in graph.calls if call.name != PREPACK]
        self.reset()

    def reset(self) -> None:
        """Give caches the content that they had after loading."""
        self._loaded = list(self._first)
        for call in self._packed:
            source = self.graph.values[call.arguments[0]] if call.arguments else None
            if not isinstance(source, TensorValue) or source.constant is None:
                raise SimulatorError(f"{call.name}: its argument is no constant")
            self._write(self._loaded, call.result, source.load())
        for step in self.steps:
            if hasattr(step.kernel, "reset"):
                step.kernel.reset()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs (tensors and integers) for the inputs (the same).

        Raises InvalidArgumentError for inputs that do not fit and for positions or ids outside
        their tables, SimulatorError for what the runtime would end the process for.
        """
        values = list(self._loaded)
        if len(inputs) != len(self.graph.inputs):
            raise InvalidArgumentError(
                f"inputs of a delegate: got {len(inputs)}, accepted are {len(self.graph.inputs)}"
            )
        for number, given in zip(self.graph.inputs, inputs, strict=True):
            self._enter(values, number, given)
        for step in self.steps:
            try:
                self._step(values, step)
            except EdgepassError:
                raise
            except Exception as error:
                raise _misfit(step.call, error) from error
        return [self._leave(values, number) for number in self.graph.outputs]

    def _step(self, values: list[Any], step: Step) -> None:
        arguments = [
            None if place in step.taken else self._read(values, number)
            for place, number in enumerate(step.call.arguments)
        ]
        self._write(values, step.call.result, step.kernel(*arguments))

    def _at_load(self, value: Any) -> Any:
        if isinstance(value, Symbol):
            return value.first
        return _MISSING if isinstance(value, TensorValue) else value

    def _read(self, values: list[Any], number: int) -> Any:
        value = values[number]
        if isinstance(value, Several):
            return [self._read(values, each) for each in value.ids]
        if value is not _MISSING:
            return value
        spec = self.graph.values[number]
        if spec.constant is None:
            raise SimulatorError(f"value {number} is read before it is written")
        # A constant that a kernel reads as it is. Those that kernels prepare are not asked for.
        content = _as_held(spec, spec.load())
        values[number] = self._loaded[number] = self._first[number] = content
        return content

    def _write(self, values: list[Any], number: int, result: Any) -> None:
        spec = self.graph.values[number]
        if isinstance(spec, Several):
            results = result if isinstance(result, (tuple, list)) else [result]
            for each, part in zip(spec.ids, results, strict=False):
                self._write(values, each, part)
        elif isinstance(spec, TensorValue) and isinstance(result, Tensor):
            values[number] = _as_held(spec, result)
        elif isinstance(spec, Symbol):
            values[number] = int(result)

    def _enter(self, values: list[Any], number: int, given: Any) -> None:
        spec = self.graph.values[number]
        if isinstance(spec, Symbol):
            values[number] = int(given)
            return
        if not isinstance(spec, TensorValue) or not isinstance(given, Tensor):
            raise SimulatorError(f"input {number} of a delegate is no tensor")
        largest = list(spec.shape)
        if len(largest) != given.dim() or any(map(int.__gt__, given.shape, largest)):
            raise InvalidArgumentError(
                f"sizes of a delegate's input: got shape={list(given.shape)}, accepted are at "
                f"most {largest}"
            )
        values[number] = _as_held(spec, given.to(spec.staging)).clone()

    def _leave(self, values: list[Any], number: int) -> Any:
        value, spec = self._read(values, number), self.graph.values[number]
        return value.to(spec.staging) if isinstance(spec, TensorValue) else value


def _as_held(spec: TensorValue, value: Tensor) -> Tensor:
    """Return ``value`` as the device holds it for ``spec``."""
    if spec.dtype == torch.float16:
        return as_half(value)
    return value.to(spec.dtype)


def _prepare(graph: VulkanGraph, call: Call) -> Step:
    site = Site(graph, call)
    try:
        return Step(call, OPERATORS[call.name](site), frozenset(site.taken))
    except EdgepassError:
        raise
    except Exception as error:
        raise _misfit(call, error) from error


def _misfit(call: Call, error: Exception) -> SimulatorError:
    """Return the error for a call whose arguments made torch or Python raise ``error``.

    Arguments come from a file: sizes and kinds that do not go together raise almost anything, and
    each of these means that the runtime would not have taken the call.
    """
    reason = str(error).partition("\n")[0]
    return SimulatorError(
        f"{call.name}: its arguments do not go together ({reason}); accepted are calls as the "
        "lowering writes them"
    )
