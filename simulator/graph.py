"""The graph that a Vulkan delegate holds: calls of the runtime's operators on numbered values.

Format: ``backends/vulkan/serialization``; what is refused here, ``VulkanBackend.cpp`` and
``VulkanDelegateHeader.cpp`` refuse too.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgepass.ops.errors import ProgramError
from edgepass.simulator.flatbuffer import Record, read_flatbuffer
from edgepass.simulator.schemas import VULKAN

_HEADER = struct.Struct("<4x4sHIIIQ")
_NAMED = (1 << 64) - 1
# The runtime reads no version; this is the one that its Python writer has always written.
_GRAPH_VERSION = "0"
DTYPES = {
    0: torch.bool,
    1: torch.uint8,
    2: torch.int8,
    3: torch.int32,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    7: torch.int64,
}
BUFFER = 0
_MOST_VALUES = 1 << 40


@dataclass(frozen=True)
class Constant:
    """Bytes of a constant: ``key`` tells which of them are stored once."""

    key: str
    data: memoryview


@dataclass(frozen=True)
class TensorValue:
    """A tensor of a graph. ``shape`` are its largest sizes; ``constant`` is None for an activation.

    ``dtype`` is what the device holds, ``staging`` what crosses the delegate's border.
    ``is_buffer``: it lies in a buffer, not in an image (in which half values load as float).
    ``memory``: tensors of the same number share bytes, each being dead while another lives; -1 has
    bytes of its own.
    """

    dtype: torch.dtype
    staging: torch.dtype
    shape: tuple[int, ...]
    constant: Constant | None
    is_buffer: bool
    memory: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes of its values, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """Return the content of a constant, in its own dtype; the bytes are shared."""
        if self.constant is None:
            raise ProgramError(f"no constant: got a tensor of shape={list(self.shape)}")
        # A copy: torch warns of memory that it may not write to.
        data = bytearray(self.constant.data[: self.nbytes]) or bytearray(self.dtype.itemsize)
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat[: math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class Symbol:
    """An integer known when the program runs: a size or a position."""

    first: int


@dataclass(frozen=True)
class Several:
    """A list of values."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One operator of the runtime: the numbers of its arguments, and of its result."""

    name: str
    arguments: tuple[int, ...]
    result: int


@dataclass(frozen=True)
class VulkanGraph:
    """A delegate: values (tensors, symbols, lists, numbers, None), calls in order, its border."""

    values: tuple[Any, ...]
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def constants(self) -> list[tuple[int, TensorValue]]:
        """Every constant tensor with its number."""
        return [
            (number, value)
            for number, value in enumerate(self.values)
            if isinstance(value, TensorValue) and value.constant is not None
        ]


def read_graph(blob: memoryview, named: Callable[[str], memoryview]) -> VulkanGraph:
    """Read a delegate's bytes; ``named`` gives the program's named data.

    Raises ProgramError for an unknown format or version, and for a reference that leads nowhere.
    """
    flatbuffer, constants = _parts(blob)
    record = read_flatbuffer(flatbuffer, VULKAN, "VkGraph", "Vulkan delegate")
    if record.version != _GRAPH_VERSION:
        raise ProgramError(
            f"unknown schema version of a Vulkan delegate: got version={record.version!r}, "
            f"accepted is {_GRAPH_VERSION!r}"
        )
    if record.shaders:
        raise _damaged("it brings shaders of its own")
    return _GraphReader(record, constants, named).graph()


def _parts(blob: memoryview) -> tuple[memoryview, memoryview]:
    if len(blob) < _HEADER.size:
        raise _damaged(f"it ends early: got {len(blob)} bytes")
    magic, length, start, size, data_start, data_size = _HEADER.unpack_from(blob)
    if magic != b"VH00":
        raise ProgramError(
            f"unknown format of a Vulkan delegate: got magic={magic!r}, accepted is b'VH00'"
        )
    inside = start + size <= len(blob) and data_start + data_size <= len(blob)
    if length < _HEADER.size or start < length or not size or not inside:
        raise _damaged(f"its header names bytes outside its {len(blob)}")
    return blob[start : start + size], blob[data_start : data_start + data_size or len(blob)]


def _damaged(reason: str) -> ProgramError:
    return ProgramError(
        f"damaged Vulkan delegate: {reason}; accepted are delegates as VulkanBackend wrote them"
    )


def is_absurd(shape: tuple[int, ...]) -> bool:
    """Whether no device could hold the sizes, or (with a 0 among them) torch their strides."""
    return math.prod(max(size, 1) for size in shape) > _MOST_VALUES


class _GraphReader:
    def __init__(
        self, record: Record, data: memoryview, named: Callable[[str], memoryview]
    ) -> None:
        self.record, self.data, self.named = record, data, named
        self.count = len(record.values or [])

    def graph(self) -> VulkanGraph:
        values = tuple(self._value(entry.value) for entry in self.record.values or [])
        calls = tuple(map(self._call, self.record.chain or []))
        return VulkanGraph(
            values, calls, self._ids(self.record.input_ids), self._ids(self.record.output_ids)
        )

    def _ids(self, ids: Any) -> tuple[int, ...]:
        found = tuple(int(i) for i in (ids if ids is not None else ()))
        for i in found:
            if not 0 <= i < self.count:
                raise _damaged(f"value={i} of {self.count}")
        return found

    def _call(self, record: Record) -> Call:
        ids = self._ids(record.args)
        if not ids or record.name is None:
            raise _damaged("an operator without a name or a result")
        return Call(record.name, ids[:-1], ids[-1])

    def _value(self, record: Record | None) -> Any:
        if record is None or record.kind == "Null":
            return None
        if record.kind == "VkTensor":
            return self._tensor(record)
        if record.kind == "SymInt":
            return Symbol(record.value)
        if record.kind == "ValueList":
            return Several(self._ids(record.items))
        if record.kind.endswith("List"):
            return [] if record.items is None else record.items.tolist()
        (value,) = [value for name, value in vars(record).items() if name != "kind"]
        return value

    def _tensor(self, record: Record) -> TensorValue:
        staging = record.datatype if record.staging_datatype == 127 else record.staging_datatype
        for datatype in (record.datatype, staging):
            if datatype not in DTYPES:
                raise _damaged(f"datatype={datatype}, accepted are {list(DTYPES)}")
        shape = tuple(int(size) for size in (record.dims if record.dims is not None else ()))
        if is_absurd(shape):
            raise _damaged(f"a tensor of shape={list(shape)}")
        dtype = DTYPES[record.datatype]
        constant = self._constant(record.constant_id) if record.constant_id >= 0 else None
        is_buffer = record.storage_type == BUFFER
        value = TensorValue(dtype, DTYPES[staging], shape, constant, is_buffer, record.mem_obj_id)
        if constant is not None and value.nbytes > len(constant.data):
            raise _damaged(
                f"a constant of shape={list(shape)} needs {value.nbytes} bytes, got "
                f"{len(constant.data)}"
            )
        return value

    def _constant(self, index: int) -> Constant:
        constants = self.record.constants or []
        if index >= len(constants):
            raise _damaged(f"constant={index} of {len(constants)}")
        entry = constants[index]
        if entry.offset == _NAMED and entry.named_key is not None:
            return Constant(entry.named_key, self.named(entry.named_key))
        if entry.offset > len(self.data):
            raise _damaged(f"constant={index} begins outside")
        return Constant(f"#{entry.offset}", self.data[entry.offset :])
