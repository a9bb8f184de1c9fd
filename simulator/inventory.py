"""What a Vulkan program is made of: calls, constants, and where its memory goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from edgepass.simulator.delegate import Delegate
from edgepass.simulator.graph import TensorValue, VulkanGraph
from edgepass.simulator.method import Method
from edgepass.simulator.plan import TensorPlan
from edgepass.simulator.registry import PREPACK
from edgepass.simulator.simulate import SimulatedProgram

# What each constant of these is for: (operator, place of the argument).
_ROLES = {
    ("et_vk.linear_dq8ca_q4gsw.default", 3): "weights",
    ("et_vk.linear_dq8ca_q4gsw.default", 4): "sums",
    ("et_vk.linear_dq8ca_q4gsw.default", 5): "scales",
    ("et_vk.linear_dq8ca_q4gsw.default", 7): "biases",
    ("et_vk.linear_q4gsw.default", 1): "weights",
    ("et_vk.linear_q4gsw.default", 2): "scales",
    ("et_vk.linear_q4gsw.default", 4): "biases",
    ("et_vk.embedding_q4gsw.default", 0): "tables",
    ("et_vk.embedding_q4gsw.default", 1): "scales",
    ("aten.embedding.default", 0): "tables",
    ("aten.linear.default", 1): "weights",
    ("aten.linear.default", 2): "biases",
    ("et_vk.apply_rotary_emb_hf.default", 2): "tables",
    ("et_vk.apply_rotary_emb_hf.default", 3): "tables",
    ("sdpa_with_kv_cache.default", 3): "caches",
    ("sdpa_with_kv_cache.default", 4): "caches",
    ("update_cache.default", 1): "caches",
}
_CACHES, _OTHER, _ACTIVATIONS = "caches", "other constants", "activations"


@dataclass(frozen=True)
class ConstantEntry:
    """A constant as the file stores it, once: its ``role``, dtype, shape, bytes and readers."""

    role: str
    dtype: str
    shape: list[int]
    nbytes: int
    uses: int


def inventory(program: SimulatedProgram, method: str = "forward") -> dict[str, Any]:
    """Describe a method as one JSON object.

    Keys: ``methods``, ``method``, ``file_bytes``, ``inputs`` and ``outputs`` (dtype and largest
    shape), ``delegates`` (for each: ``operators`` with their counts, ``constants``, ``calls`` in
    order), ``outside`` (operators outside the delegates), and ``memory``: bytes by kind. Weights,
    scales, sums, tables, biases and other constants are counted once however often they are read;
    caches and activations are what the device holds, without padding; activations that share memory
    count as the largest of them.
    """
    loaded = program.method(method)
    values = loaded.plan.values
    memory: Counter[str] = Counter()
    seen: dict[str, str] = {}
    for delegate in loaded.delegates:
        memory += _memory(delegate.graph, seen)
    return {
        "file_bytes": program.file.nbytes,
        "methods": program.methods,
        "method": method,
        "inputs": [_border(values[number]) for number in loaded.plan.inputs],
        "outputs": [_border(values[number]) for number in loaded.plan.outputs],
        "delegates": [_delegate(each) for each in loaded.delegates],
        "outside": _outside(loaded),
        "memory": dict(memory),
    }


def _border(value: Any) -> dict[str, Any]:
    if not isinstance(value, TensorPlan):
        return {"dtype": type(value).__name__, "shape": [], "dynamic": False}
    return {"dtype": _name(value.dtype), "shape": list(value.shape), "dynamic": value.is_dynamic}


def _delegate(delegate: Delegate) -> dict[str, Any]:
    calls = [call.name for call in delegate.graph.calls]
    constants = _constants(delegate.graph)
    return {
        "operators": dict(Counter(calls).most_common()),
        "constants": [asdict(entry) for entry in constants],
        "calls": calls,
    }


def _outside(method: Method) -> dict[str, int]:
    names = [
        method.kernels[each.op_index].name
        for each in method.plan.instructions
        if each.kind == "KernelCall"
    ]
    return dict(Counter(names).most_common())


def _reads(graph: VulkanGraph) -> list[tuple[str, int, int]]:
    """Each read of a value: operator, place of the argument, and number, of what is packed that of
    its source."""
    packed = {call.result: call.arguments[0] for call in graph.calls if call.name == PREPACK}
    return [
        (call.name, place, packed.get(number, number))
        for call in graph.calls
        if call.name != PREPACK
        for place, number in enumerate(call.arguments)
    ]


def _roles(graph: VulkanGraph) -> dict[int, str]:
    """What each constant is for, by its number, from the operator that reads it."""
    reads = reversed(_reads(graph))
    return {n: _ROLES[name, place] for name, place, n in reads if (name, place) in _ROLES}


def _constants(graph: VulkanGraph) -> list[ConstantEntry]:
    role_of = _roles(graph)
    constants = [(n, value, value.constant.key) for n, value in graph.constants() if value.constant]
    keys = {number: key for number, _, key in constants}
    uses = Counter(keys[number] for _, _, number in _reads(graph) if number in keys)
    entries: dict[str, ConstantEntry] = {}
    for number, value, key in constants:
        role = role_of.get(number, _OTHER)
        if key not in entries or entries[key].role == _OTHER:
            shape, dtype = list(value.shape), _name(value.dtype)
            entries[key] = ConstantEntry(role, dtype, shape, value.nbytes, uses[key])
    return sorted(entries.values(), key=lambda entry: -entry.nbytes)


def _memory(graph: VulkanGraph, seen: dict[str, str]) -> Counter[str]:
    memory: Counter[str] = Counter()
    shared: dict[int, int] = {}
    role_of = _roles(graph)
    for number, value in enumerate(graph.values):
        if not isinstance(value, TensorValue):
            continue
        role = role_of.get(number, _OTHER if value.constant else _ACTIVATIONS)
        if value.constant and role != _CACHES:
            # The bytes are in the file once, whoever shares them.
            if value.constant.key in seen:
                continue
            seen[value.constant.key] = role
        if role == _ACTIVATIONS and value.memory >= 0:
            shared[value.memory] = max(shared.get(value.memory, 0), value.nbytes)
        else:
            memory[role] += value.nbytes
    memory[_ACTIVATIONS] += sum(shared.values())
    return memory


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
