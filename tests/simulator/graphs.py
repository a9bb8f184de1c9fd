"""Delegates of one call, made by hand, for tests that know what the call must give."""

from typing import Any

import torch
from torch import Tensor

from edgepass.simulator.delegate import Delegate
from edgepass.simulator.graph import Call, Constant, Several, TensorValue, VulkanGraph


def constant(content: Tensor) -> TensorValue:
    """A constant tensor of a graph."""
    data = content.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    held = Constant(str(hash(data)), memoryview(data))
    return TensorValue(content.dtype, content.dtype, tuple(content.shape), held, False)


def activation(*shape: int, dtype: torch.dtype = torch.float32, is_buffer: bool = False) -> Any:
    """A tensor that is computed or given, with its largest sizes."""
    staging = torch.float32 if dtype == torch.float16 else dtype
    return TensorValue(dtype, staging, shape, None, is_buffer)


def one_call(name: str, arguments: list[Any], *results: Any) -> Delegate:
    """A delegate of one call. Activations among the arguments are its inputs, in order."""
    values: list[Any] = []

    def add(value: Any) -> int:
        if isinstance(value, list) and any(isinstance(each, TensorValue) for each in value):
            value = Several(tuple(add(each) for each in value))
        values.append(value)
        return len(values) - 1

    places = tuple(add(value) for value in arguments)
    inputs = tuple(i for i, v in enumerate(values) if isinstance(v, TensorValue) and not v.constant)
    outputs = tuple(add(value) for value in results)
    result = outputs[0] if len(outputs) == 1 else add(Several(outputs))
    return Delegate(VulkanGraph(tuple(values), (Call(name, places, result),), inputs, outputs))
