"""From a graph with observers to one that only collects what they need.

Stock observers run one by one, each over its own tensor, although most watch views of what another
one watches. Here each value is reduced once, where it is computed, and the observers are given the
result afterwards. Values are the same bit by bit but for 1x1 convolutions, which are computed as
the linears that they are: on a CPU they take twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e import (
    FixedQParamsObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    NoopObserver,
    PlaceholderObserver,
)

from edgepass.calibration.histogram_observers import ElementObserver
from edgepass.passes.quantized_values import attribute
from edgepass.passes.value_names import call_name, is_view

# What these learn of a tensor is its least and its largest value; others must see the tensor.
RANGE_OBSERVERS: frozenset[type] = frozenset({MinMaxObserver, MovingAverageMinMaxObserver})
_BLIND: frozenset[type] = frozenset({FixedQParamsObserver, NoopObserver, PlaceholderObserver})


@dataclass(frozen=True)
class Watched:
    """A call of an observer in the prepared graph, and the number of the value that it sees."""

    call: Node
    observer: Any
    value: int


@dataclass
class CollectingGraph:
    """A graph that returns the extremes of each value, and what it is made for.

    ``module`` takes the flattened inputs and returns float32 ``[2]`` a value. ``places`` is the
    first observer call of each value. ``ranges`` are the calls that need the extremes alone.
    ``streams`` are observers that ``module`` calls with the values themselves, by name;
    ``followers`` saw what a stream saw, and take over its state: (follower, name of the stream).
    """

    module: GraphModule
    places: list[Node] = field(default_factory=list)
    ranges: list[Watched] = field(default_factory=list)
    streams: dict[str, Any] = field(default_factory=dict)
    followers: list[tuple[Any, str]] = field(default_factory=list)


def extremes(value: Tensor) -> Tensor:
    """The least and the largest element, float32 ``[2]``; of none, infinity and its negative."""
    if value.numel() == 0:
        return torch.tensor([torch.inf, -torch.inf])
    return torch.stack(torch.aminmax(value.detach())).float()


def collecting_graph(prepared: GraphModule, range_observers: frozenset[type]) -> CollectingGraph:
    """Make the collecting graph of ``prepared``, which shares its weights and its observers.

    Constants are observed at once and for all. ``range_observers`` are further types that learn
    only the extremes of what they see.
    """
    return _Builder(prepared, range_observers | RANGE_OBSERVERS).build()


class _Builder:
    def __init__(self, prepared: GraphModule, range_observers: frozenset[type]) -> None:
        self.prepared, self.range_observers = prepared, range_observers
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        self.values: dict[Node, int] = {}
        self.results: list[Node] = []
        self.found = CollectingGraph(prepared)
        self.leaders = _leaders(prepared)
        self.streamed: set[tuple[int, Node]] = set()

    def build(self) -> CollectingGraph:
        for node in self.prepared.graph.nodes:
            if is_observer(self.prepared, node):
                self.copies[node] = self._observe(node, self.copies[node.args[0]])
            elif node.op == "output":
                self.graph.output(tuple(self.results))
            else:
                self.copies[node] = self._computed(node)
        self.found.module = GraphModule(self.prepared, self.graph)
        return self.found

    def _observe(self, call: Node, value: Node) -> Node:
        """What replaces an observer's call: the value itself, unless the observer changes it."""
        observer = self.prepared.get_submodule(str(call.target))
        if type(observer) in _BLIND:
            return value
        if value.op == "get_attr":
            constant = attribute(self.prepared, str(value.target))
            if observer(constant) is constant:
                return value
            return self.graph.call_module(str(call.target), (value,))
        number = self._number(call, value)
        if type(observer) in self.range_observers:
            self.found.ranges.append(Watched(call, observer, number))
            return value
        return self._stream(call, observer, value)

    def _number(self, call: Node, value: Node) -> int:
        """The number of a value, of which the extremes are taken where it is first seen."""
        root = _root(value)
        if root not in self.values:
            self.values[root] = len(self.results)
            self.results.append(self.graph.call_function(extremes, (root,)))
            self.found.places.append(call)
        return self.values[root]

    def _stream(self, call: Node, observer: Any, value: Node) -> Node:
        """Let an observer see the value; one that counts elements sees each value once."""
        name = str(call.target)
        if not isinstance(observer, ElementObserver):
            if all(each is not observer for each in self.found.streams.values()):
                self.found.streams[name] = observer
            return self.graph.call_module(name, (value,))
        leader = self.leaders[id(observer)]
        if self.prepared.get_submodule(leader) is not observer:
            self.found.followers.append((observer, leader))
        elif (id(observer), _root(value)) not in self.streamed:
            self.streamed.add((id(observer), _root(value)))
            self.found.streams.setdefault(leader, observer)
            self.graph.call_module(leader, (_root(value),))
        return value

    def _computed(self, node: Node) -> Node:
        if self._is_pointwise(node):
            return self._as_linear(node)
        return self.graph.node_copy(node, lambda each: self.copies[each])

    def _is_pointwise(self, node: Node) -> bool:
        """Whether a convolution is a linear of each pixel."""
        if call_name(node) != "aten.conv2d" or node.kwargs or node.meta["val"].dim() != 4:
            return False
        weight, (stride, padding, _, groups) = self.copies[node.args[1]], _options(node)
        if weight.op != "get_attr" or (padding, groups) != ([0, 0], 1):
            return False
        size = attribute(self.prepared, str(weight.target)).shape[2:]
        return size == (1, 1) and stride == [1, 1]

    def _as_linear(self, node: Node) -> Node:
        x, weight, *bias = (arg and self.copies[arg] for arg in node.args[:3])
        aten, call = torch.ops.aten, self.graph.call_function
        rows = call(aten.permute.default, (x, [0, 2, 3, 1]))
        matrix = call(aten.flatten.using_ints, (weight, 1))
        linear = call(aten.linear.default, (rows, matrix, *bias))
        return call(aten.permute.default, (linear, [0, 3, 1, 2]))


def is_observer(prepared: GraphModule, node: Node) -> bool:
    """Whether a call is an observer's; a graph may call its guards, too."""
    return node.op == "call_module" and hasattr(
        prepared.get_submodule(str(node.target)), "calculate_qparams"
    )


def _options(convolution: Node) -> list[Any]:
    """Stride, padding, dilation and groups of a call that may leave out the last of them."""
    given = [list(arg) if isinstance(arg, (list, tuple)) else arg for arg in convolution.args[3:]]
    return [*given, *[[1, 1], [0, 0], [1, 1], 1][len(given) :]]


def _leaders(prepared: GraphModule) -> dict[int, str]:
    """For each observer that counts elements, the first that counts the same ones as it does."""
    seen: dict[int, tuple[str, Any, list[Node]]] = {}
    for node in prepared.graph.nodes:
        if is_observer(prepared, node):
            observer = prepared.get_submodule(str(node.target))
            if isinstance(observer, ElementObserver):
                root = _root(node.args[0])
                seen.setdefault(id(observer), (str(node.target), observer, []))[2].append(root)
    first: dict[Any, str] = {}
    return {
        key: first.setdefault((observer.settings(), frozenset(roots)), name)
        for key, (name, observer, roots) in seen.items()
    }


def _root(node: Node) -> Node:
    """What a chain of views and observers shows: it has the same elements."""
    while is_view(node) or node.op == "call_module":
        node = node.args[0]  # type: ignore[assignment]
    return node
