"""What a lowered program is made of, read from the program itself."""

from __future__ import annotations

from collections import Counter

from executorch.exir import ExecutorchProgramManager
from executorch.exir.schema import DelegateCall, KernelCall


def delegates(manager: ExecutorchProgramManager) -> dict[str, int]:
    """The number of delegates that each method calls."""
    return {
        plan.name: sum(
            isinstance(instruction.instr_args, DelegateCall)
            for chain in plan.chains
            for instruction in chain.instructions
        )
        for plan in manager.executorch_program.execution_plan
    }


def outside_delegates(manager: ExecutorchProgramManager) -> dict[str, dict[str, int]]:
    """The operators that each method runs outside its delegates, with their counts."""
    return {
        plan.name: dict(
            Counter(
                plan.operators[instruction.instr_args.op_index].name
                for chain in plan.chains
                for instruction in chain.instructions
                if isinstance(instruction.instr_args, KernelCall)
            )
        )
        for plan in manager.executorch_program.execution_plan
    }
