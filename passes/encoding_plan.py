"""Which encoding each quantization of a graph takes, known whole before any is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from edgepass.ops.encodings import Encoding
from edgepass.ops.errors import EncodingError
from edgepass.passes.quantized_values import QuantizedValue
from edgepass.passes.value_names import ValueNames

_SHOWN = 5  # of a list of problems in one message


@dataclass
class EncodingSource:
    """The calibrated graph's encodings and constants by name, and its counts of calls."""

    encodings: dict[str, list[Encoding]] = field(default_factory=dict)
    integers: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


class EncodingPlan:
    """What to write where, complete before anything is written."""

    def __init__(
        self, source: EncodingSource, names: ValueNames, values: list[QuantizedValue]
    ) -> None:
        self.source, self.names, self.values = source, names, values
        self.found: dict[QuantizedValue, tuple[Encoding, torch.Tensor | None]] = {}
        self.problems: list[str] = []

    def resolve(self) -> dict[QuantizedValue, tuple[Encoding, torch.Tensor | None]]:
        for value in self.values:
            candidates = self._candidates(value)
            if candidates:
                self._choose(value, candidates)
        self._fill_between_views()
        for value in self.values:
            if value not in self.found:
                self.problems.append(f"missing: {self._name(value)}")
        if self.problems:
            more = len(self.problems) - _SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            raise EncodingError(
                f"cannot carry encodings over: got {len(self.problems)} of {len(self.values)} "
                f"values without exactly one: {'; '.join(self.problems[:_SHOWN])}{rest}; accepted "
                "is a source of the same model and recipe"
            )
        return self.found

    def _candidates(self, value: QuantizedValue) -> list[tuple[str, Encoding]]:
        return [
            (name, encoding)
            for name in value.names
            for encoding in self.source.encodings.get(name, ())
            if encoding.same_kind(value.encoding)
        ]

    def _choose(self, value: QuantizedValue, candidates: list[tuple[str, Encoding]]) -> None:
        names = sorted({name for name, _ in candidates})
        first = candidates[0][1]
        if any(first.difference(other) > 0 for _, other in candidates):
            self.problems.append(f"ambiguous: {self._name(value)} has several encodings")
            self.found[value] = (first, None)
            return
        for name in names:
            call = name.partition("#")[0]
            if "#" in name and self.source.calls.get(call) != self.names.calls.get(call):
                self.problems.append(
                    f"ambiguous: {name} is one of {self.source.calls.get(call, 0)} calls in the "
                    f"source and of {self.names.calls.get(call, 0)} here"
                )
        integers = next((self.source.integers.get(name) for name in names), None)
        self.found[value] = (first, integers if value.integers is not None else None)

    def _fill_between_views(self) -> None:
        """A quantization between two views repeats the one before it, or the one behind it.

        Which of them it repeats shows in the encodings that the target has so far.
        """
        by_call = {call: value for value in self.values for call in value.calls}
        near: dict[QuantizedValue, list[QuantizedValue]] = {value: [] for value in self.values}
        for value in self.values:
            before = by_call.get(value.before) if value.before is not None else None
            if before is not None:
                near[value].append(before)
                near[before].append(value)
        for order in (self.values, list(reversed(self.values))):
            for value in order:
                if value not in self.found and not value.is_parameter:
                    self._repeat(value, [each for each in near[value] if each in self.found])

    def _repeat(self, value: QuantizedValue, near: list[QuantizedValue]) -> None:
        alike = [each for each in near if each.encoding.difference(value.encoding) == 0]
        known = [self.found[each][0] for each in alike]
        if known and all(known[0].difference(each) == 0 for each in known):
            self.found[value] = (known[0], None)

    def _name(self, value: QuantizedValue) -> str:
        return value.names[0] if value.names else self.names.of(value.root) + " behind a view"
