"""Reading a Vulkan ``.pte`` back with stock's own readers, for tests to look into."""

from dataclasses import dataclass
from typing import Any

from executorch.backends.vulkan.serialization.vulkan_graph_schema import (
    VkGraph,
    VkTensor,
)
from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
    VulkanDelegateHeader,
    flatbuffer_to_vk_graph,
)
from executorch.exir._serialize._program import deserialize_pte_binary


@dataclass(frozen=True)
class Delegate:
    """One delegate: its backend, its graph, and the file's named data."""

    backend: str
    graph: VkGraph
    data: dict[str, bytes]

    @property
    def operators(self) -> list[str]:
        """The names of the operators, in order."""
        return [call.name for call in self.graph.chain]

    def arguments(self, operator: str) -> list[list[Any]]:
        """The values of the arguments (the result last) of each call of ``operator``."""
        calls = [call for call in self.graph.chain if call.name == operator]
        return [[self.graph.values[index].value for index in call.args] for call in calls]

    def content(self, tensor: VkTensor) -> bytes:
        """The bytes of a constant."""
        return self.data[self.graph.constants[tensor.constant_id].named_key]

    def canonical(self) -> list[tuple[str, list[Any]]]:
        """The calls in a form that is equal for graphs that compute the same in the same way.

        Values are numbered by their first use, constants go by their content. Which memory is
        shared is left out, and so is a constant's storage: neither is read for constants.
        """
        numbers: dict[int, int] = {}
        return [
            (call.name, [self._describe(index, numbers) for index in call.args])
            for call in self.graph.chain
        ]

    def _describe(self, index: int, numbers: dict[int, int]) -> Any:
        value = self.graph.values[index].value
        if hasattr(value, "items") and type(value).__name__ == "ValueList":
            return [self._describe(each, numbers) for each in value.items]
        if not isinstance(value, VkTensor):
            return (
                value if type(value).__name__ != "SymInt" else ("symbol", _number(numbers, index))
            )
        if value.constant_id >= 0:
            key = self.graph.constants[value.constant_id].named_key
            return (tuple(value.dims), value.datatype, key)
        form = (value.datatype, value.staging_datatype, value.storage_type, value.memory_layout)
        return (_number(numbers, index), tuple(value.dims), *form)


def _number(numbers: dict[int, int], index: int) -> int:
    return numbers.setdefault(index, len(numbers))


def delegates(buffer: bytes) -> list[Delegate]:
    """Read every delegate of the first method of a ``.pte``."""
    file = deserialize_pte_binary(buffer)
    assert file.named_data is not None, "a Vulkan file keeps its weights as named data"
    data = {
        key: file.named_data.buffers[entry.buffer_index]
        for key, entry in file.named_data.pte_data.items()
    }
    found = []
    for delegate in file.program.execution_plan[0].delegates:
        blob = file.program.backend_delegate_data[delegate.processed.index].data
        found.append(Delegate(delegate.id, read_graph(bytes(blob)), data))
    return found


def read_graph(blob: bytes) -> VkGraph:
    """Read the graph in the bytes of one delegate."""
    header = VulkanDelegateHeader.from_bytes(blob[: VulkanDelegateHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    return flatbuffer_to_vk_graph(blob[start : start + header.flatbuffer_size])
