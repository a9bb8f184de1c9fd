"""The values of a method while it runs, and those that stay for its next run."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from edgepass.ops.errors import SimulatorError
from edgepass.simulator.plan import References, TensorPlan


class Slots:
    """One run's values by number.

    Each tensor has memory of its own, but for views of fixed sizes: these have no instruction, the
    memory plan puts them where their source lies. A tensor that is read where nothing was written
    holds what an earlier run left in it: a mutable buffer. The runtime starts those without first
    content as whatever the memory holds; here they start as zeros.
    """

    def __init__(self, plans: list[Any], kept: dict[int, Tensor]) -> None:
        """``kept`` are the constants and buffers of earlier runs; reading adds to it."""
        self.plans, self.kept = plans, kept
        self._written: dict[int, Any] = {}
        self._latest: dict[tuple[int, int], int] = {}
        for number in kept:
            self._place(number)

    def read(self, number: int) -> Any:
        """The value, tensors as tensors and lists as lists of their values; None for -1."""
        if number < 0:
            return None
        if number in self._written:
            return self._written[number]
        plan = self.plans[number]
        if isinstance(plan, References):
            return [self.read(each) for each in plan.ids]
        if not isinstance(plan, TensorPlan):
            return plan
        source = self._latest.get(plan.place) if plan.place is not None else None
        if source is not None and source != number:
            return self._view(number, source)
        if number not in self.kept:
            self.kept[number] = plan.load()
            self._place(number)
        return self.kept[number]

    def write(self, number: int, value: Any) -> None:
        """Set the value; a buffer is overwritten in place."""
        plan = self.plans[number]
        if isinstance(plan, TensorPlan) and isinstance(value, Tensor):
            value = value.to(plan.dtype)
            if number in self.kept and number not in self._written:
                self.kept[number].copy_(value)
                return
        self._written[number] = value
        self._place(number)

    def _place(self, number: int) -> None:
        plan = self.plans[number]
        if isinstance(plan, TensorPlan) and plan.place is not None:
            self._latest[plan.place] = number

    def _view(self, number: int, source: int) -> Tensor:
        plan, value = self.plans[number], self.read(source)
        if not isinstance(value, Tensor) or value.dtype != plan.dtype:
            raise SimulatorError(
                f"value {number} is read where value {source} of another kind lies"
            )
        if value.numel() != math.prod(plan.shape):
            raise SimulatorError(
                f"value {number} of sizes={list(plan.shape)} is read where value {source} of "
                f"sizes={list(value.shape)} lies"
            )
        return value.view(plan.shape) if value.is_contiguous() else value.reshape(plan.shape)
