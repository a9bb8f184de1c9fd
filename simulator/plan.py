"""The execution plan of a method, read and checked: its values and instructions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgepass.simulator.flatbuffer import Record
from edgepass.simulator.graph import is_absurd
from edgepass.simulator.pte import ProgramFile

SCALAR_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
_STATIC = 0


@dataclass(frozen=True)
class TensorPlan:
    """What a program says of one of its tensors. ``shape`` are the largest sizes.

    ``content`` are the bytes of a constant, or those that a mutable buffer begins with. ``place``
    is where the memory plan puts it, None for constants and for what the plan leaves out.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_dynamic: bool
    content: memoryview | None
    place: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """Its first content; zeros without one."""
        if self.content is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        data = bytearray(self.content[: self.nbytes]) or bytearray(self.dtype.itemsize)
        return torch.frombuffer(data, dtype=self.dtype)[: math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class References:
    """A list of values by number; -1 stands for None."""

    ids: tuple[int, ...]


class MethodPlan:
    """Attributes: ``values`` (tensors as :class:`TensorPlan`), the numbers of ``inputs`` and
    ``outputs``, ``instructions``, ``operators`` and ``delegates`` as they were written."""

    def __init__(self, file: ProgramFile, record: Record) -> None:
        """Read ``record`` of ``file``. Raises ProgramError for references that lead nowhere."""
        self.file = file
        self.operators, self.delegates = record.operators or [], record.delegates or []
        self._count = len(record.values or [])
        sizes = record.non_const_buffer_sizes
        self._planned = sum(int(size) for size in (sizes if sizes is not None else ()))
        self.values = [self._value(each.val) for each in record.values or []]
        self.inputs, self.outputs = self._ids(record.inputs), self._ids(record.outputs)
        self.instructions = self._instructions(record.chains or [])

    def _ids(self, ids: Any, least: int = 0) -> list[int]:
        found = [int(i) for i in (ids if ids is not None else ())]
        for i in found:
            if not least <= i < self._count:
                raise self.file.damaged(f"value={i} of {self._count}")
        return found

    def _value(self, record: Record | None) -> Any:
        if record is None or record.kind == "Null":
            return None
        if record.kind == "Tensor":
            return self._tensor(record)
        if record.kind in ("TensorList", "OptionalTensorList", "IntList"):
            return References(tuple(self._ids(record.items, least=-1)))
        if record.kind.endswith("List"):
            return [] if record.items is None else record.items.tolist()
        (value,) = [value for name, value in vars(record).items() if name != "kind"]
        return value

    def _tensor(self, record: Record) -> TensorPlan:
        if record.scalar_type not in SCALAR_TYPES:
            raise self.file.damaged(f"a tensor of scalar_type={record.scalar_type}")
        shape = tuple(int(size) for size in (record.sizes if record.sizes is not None else ()))
        if any(size < 0 for size in shape) or is_absurd(shape):
            raise self.file.damaged(f"a tensor of sizes={list(shape)}")
        dtype, content = SCALAR_TYPES[record.scalar_type], self.file.constant(record)
        is_dynamic, place = record.shape_dynamism != _STATIC, _place(record.allocation_info)
        plan = TensorPlan(dtype, shape, is_dynamic, content, place)
        if content is not None and plan.nbytes > len(content):
            raise self.file.damaged(f"a constant of sizes={list(shape)} in {len(content)} bytes")
        if content is None and record.allocation_info is not None and plan.nbytes > self._planned:
            raise self.file.damaged(f"sizes={list(shape)} in {self._planned} planned bytes")
        return plan

    def _instructions(self, chains: list[Record]) -> list[Record]:
        if len(chains) != 1:
            raise self.file.damaged(f"{len(chains)} chains of instructions, accepted is one")
        found = [each.instr_args for each in chains[0].instructions or []]
        for record in found:
            if record is None:
                raise self.file.damaged("an instruction of an unknown kind")
            self._check(record, len(found))
        return found

    def _check(self, record: Record, count: int) -> None:
        """Check the numbers of an instruction; those of its arguments become integers."""
        limits = {
            "op_index": len(self.operators),
            "delegate_index": len(self.delegates),
            "destination_instruction": count + 1,
        }
        for name, value in list(vars(record).items()):
            if name == "args":
                record.args = self._ids(value)
            elif name != "kind" and not 0 <= value < limits.get(name, self._count):
                raise self.file.damaged(f"an instruction with {name}={value}")


def _place(allocation: Record | None) -> tuple[int, int] | None:
    if allocation is None:
        return None
    offset = allocation.memory_offset_high << 32 | allocation.memory_offset_low
    return allocation.memory_id, offset
