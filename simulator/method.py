"""Running a method of a program: its delegates, and what lies outside them.

The instructions are those of ExecuTorch's execution plan (``runtime/executor/method.cpp``): calls
of kernels and delegates, moves, jumps and frees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edgepass.ops.errors import InvalidArgumentError, SimulatorError
from edgepass.simulator.delegate import Delegate
from edgepass.simulator.flatbuffer import Record
from edgepass.simulator.graph import read_graph
from edgepass.simulator.plan import MethodPlan, TensorPlan
from edgepass.simulator.portable import portable_kernel
from edgepass.simulator.pte import ProgramFile
from edgepass.simulator.slots import Slots

VULKAN_BACKEND = "VulkanBackend"
# A program without loops ends long before; one that never ends was altered.
_MOST_INSTRUCTIONS = 1_000_000


class Method:
    """One method of a program, loaded, with the state that its calls leave behind."""

    def __init__(self, file: ProgramFile, name: str) -> None:
        """Read the method and prepare its kernels and delegates, before anything is run.

        Raises ProgramError for a damaged file, SimulatorError for operators that are not known.
        """
        self.file, self.plan = file, MethodPlan(file, file.plans[name])
        self.kernels = [portable_kernel(each) for each in self.plan.operators]
        self.delegates = [self._delegate(each) for each in self.plan.delegates]
        self._kept: dict[int, Tensor] = {}

    def reset(self) -> None:
        """Give every buffer and cache the content that it had after loading."""
        self._kept = {}
        for delegate in self.delegates:
            delegate.reset()

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs for the inputs: tensors, and numbers where the program has such.

        Raises InvalidArgumentError for inputs that do not fit, and as :meth:`Delegate.run`.
        """
        slots = Slots(self.plan.values, self._kept)
        self._enter(slots, inputs)
        at = steps = 0
        while at < len(self.plan.instructions):
            at = self._step(slots, self.plan.instructions[at], at)
            steps += 1
            if steps > _MOST_INSTRUCTIONS:
                raise self.file.damaged(f"it does not end within {steps} instructions")
        outputs = [slots.read(number) for number in self.plan.outputs]
        return [each.clone() if isinstance(each, Tensor) else each for each in outputs]

    def _enter(self, slots: Slots, inputs: Sequence[Any]) -> None:
        numbers = self.plan.inputs
        if len(inputs) != len(numbers):
            raise InvalidArgumentError(
                f"inputs of a method: got {len(inputs)}, accepted are {len(numbers)}"
            )
        for place, (number, given) in enumerate(zip(numbers, inputs, strict=True)):
            plan = self.plan.values[number]
            if isinstance(plan, TensorPlan):
                _check_input(place, plan, given)
                given = given.detach()
            slots.write(number, given)

    def _step(self, slots: Slots, instruction: Record, at: int) -> int:
        """Carry out one instruction; return the next one's place."""
        kind = instruction.kind
        if kind == "KernelCall":
            self.kernels[instruction.op_index].call(slots, instruction.args)
        elif kind == "DelegateCall":
            self._call_delegate(slots, instruction)
        elif kind == "MoveCall":
            slots.write(instruction.move_to, slots.read(instruction.move_from))
        elif kind == "JumpFalseCall" and not slots.read(instruction.cond_value_index):
            return instruction.destination_instruction
        return at + 1

    def _call_delegate(self, slots: Slots, instruction: Record) -> None:
        delegate, arguments = self.delegates[instruction.delegate_index], instruction.args
        count = len(delegate.graph.inputs)
        if len(arguments) != count + len(delegate.graph.outputs):
            raise self.file.damaged(
                f"a delegate of {count} inputs and {len(delegate.graph.outputs)} outputs is "
                f"called with {len(arguments)} arguments"
            )
        results = delegate.run([slots.read(number) for number in arguments[:count]])
        for number, result in zip(arguments[count:], results, strict=True):
            slots.write(number, result)

    def _delegate(self, record: Record) -> Delegate:
        if record.id != VULKAN_BACKEND:
            raise SimulatorError(
                f"unknown backend: got delegate={record.id}, accepted is {VULKAN_BACKEND}"
            )
        return Delegate(read_graph(self.file.delegate_data(record), self.file.named_data))


def _check_input(place: int, plan: TensorPlan, given: Any) -> None:
    dtype = str(plan.dtype).removeprefix("torch.")
    if not isinstance(given, Tensor) or given.dtype != plan.dtype:
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise InvalidArgumentError(f"input {place}: got dtype={got}, accepted is {dtype}")
    fits = len(given.shape) == len(plan.shape) and all(
        size == most or (plan.is_dynamic and size <= most)
        for size, most in zip(given.shape, plan.shape, strict=False)
    )
    if not fits:
        most = "at most " if plan.is_dynamic else ""
        raise InvalidArgumentError(
            f"input {place}: got shape={list(given.shape)}, accepted is {most}{list(plan.shape)}"
        )
