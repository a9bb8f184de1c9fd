"""Carries the encodings of a calibrated graph into another form of the same model.

The graph that is calibrated runs a whole chunk at once; the graphs that are lowered take KV caches
as inputs. Values are matched by their structural names, caches by their pairs of input and output,
never by position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from edgepass.ops.encodings import Encoding
from edgepass.ops.errors import EncodingError
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.kv_pairs import kv_pairs_of
from edgepass.passes.quantized_values import QuantizedValue, attribute, quantized_values
from edgepass.passes.value_names import ValueNames, root_of

_SHOWN = 5  # of a list of problems in one message


@dataclass(frozen=True)
class Propagation:
    """What was written: the number of quantizations, and the pairs (cache, what extends it)."""

    written: int
    pairs: list[tuple[str, str]]


@dataclass
class _Source:
    """The calibrated graph's encodings and constants by name, and its counts of calls."""

    encodings: dict[str, list[Encoding]] = field(default_factory=dict)
    integers: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def propagate_kv_encodings(
    source: GraphModule,
    target: GraphModule,
    kv_pairs: Sequence[tuple[int, int]] | None = None,
    prefix: str = "",
) -> Propagation:
    """Give each quantization of ``target`` the encoding that its value has in ``source``.

    Both are graphs of ``convert_pt2e`` of one model, quantized by one recipe. ``kv_pairs`` are
    (input index, output index) of the target's caches; by default they are found. A cache, its
    join and what extends it take the encoding of the output of ``source`` that corresponds to the
    pair's output. Folded constants come along. ``prefix`` is left out of names in messages.

    Raises EncodingError, and leaves ``target`` as it was, unless every quantized value of the
    target has exactly one encoding of its own kind (range, axis, block).
    """
    pairs = kv_pairs_of(target.graph, kv_pairs)
    given = _read_source(source, prefix)
    names = ValueNames(target.graph, prefix, {join for _, join, _ in pairs})
    values = quantized_values(target, names)
    for cache, join, output in pairs:
        _name_caches(values, names, cache, join, output)
    plan = _Plan(given, names, values).resolve()
    for value, (encoding, integers) in plan.items():
        write_encoding(target, value, encoding, integers)
    target.recompile()
    _check_chained(target, pairs)
    return Propagation(len(plan), [(cache.name, names.result(out)) for cache, _, out in pairs])


def _read_source(module: GraphModule, prefix: str) -> _Source:
    pairs = kv_pairs_of(module.graph)
    names = ValueNames(module.graph, prefix, {join for _, join, _ in pairs})
    found = _Source(calls=dict(names.calls))
    for value in quantized_values(module, names):
        for name in value.names:
            found.encodings.setdefault(name, []).append(value.encoding)
            if value.integers is not None:
                found.integers[name] = attribute(module, str(value.integers.target))
    return found


def _name_caches(
    values: list[QuantizedValue], names: ValueNames, cache: Node, join: Node, output: Node
) -> None:
    """Name what holds cache rows after the output that extends the cache."""
    returned = names.returned(output)
    for value in values:
        if value.root is cache or value.root is join:
            value.names = [returned]


class _Plan:
    """What to write where, complete before anything is written."""

    def __init__(self, source: _Source, names: ValueNames, values: list[QuantizedValue]) -> None:
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


def _check_chained(module: GraphModule, pairs: Any) -> None:
    """What a step writes must be what the next one reads."""
    values = quantized_values(module, ValueNames(module.graph))
    for cache, join, output in pairs:
        last = output.args[0] if output.args else None
        written = [v.encoding for v in values if output in v.calls or last in v.calls]
        read = [v.encoding for v in values if v.root is cache or v.root is join]
        if written and any(written[0].difference(each) > 0 for each in read):
            raise EncodingError(
                f"broken cache chain: got {cache.name} read with another encoding than "
                f"{root_of(output).name} is written with, accepted is one"
            )
