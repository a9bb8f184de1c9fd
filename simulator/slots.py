"""The values of a method while it runs, and those that stay for its next run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgepass.simulator.plan import References, TensorPlan


class Slots:
    """One run's values by number. Each tensor has memory of its own.

    A tensor that is read before it is written holds what an earlier run left in it: a mutable
    buffer. The runtime starts those without first content as whatever the memory holds; here they
    start as zeros.
    """

    def __init__(self, plans: list[Any], kept: dict[int, Tensor]) -> None:
        """``kept`` are the constants and buffers of earlier runs; reading adds to it."""
        self.plans, self.kept = plans, kept
        self._written: dict[int, Any] = {}

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
        if number not in self.kept:
            self.kept[number] = plan.load()
        return self.kept[number]

    def write(self, number: int, value: Any) -> None:
        """Set the value; a buffer is overwritten in place."""
        plan = self.plans[number]
        if isinstance(plan, TensorPlan) and isinstance(value, Tensor):
            value = value.to(plan.dtype)
            kept = self.kept.get(number)
            if kept is not None and number not in self._written:
                kept.copy_(value)
                return
        self._written[number] = value
