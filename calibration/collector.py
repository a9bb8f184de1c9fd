"""One pass a chunk over a prepared graph, and its observers filled from what was collected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e import MovingAverageMinMaxObserver

from edgepass.calibration.collecting_graph import Watched, collecting_graph
from edgepass.calibration.histogram_observers import ElementObserver
from edgepass.calibration.observe import place_of
from edgepass.ops.errors import EncodingError


class Collector:
    """Runs a graph of ``prepare_pt2e`` on chunks and keeps what its observers need.

    ``streams`` are the observers that see values themselves, by name: their state is their own.
    All others learn from the rows that :meth:`run` returns, when :meth:`finish` is called: so rows
    may be kept, sent about and put in order in between. ``range_observers`` are further observer
    types that learn only the extremes of what they see, and for which the order does not matter.
    """

    def __init__(self, prepared: GraphModule, range_observers: frozenset[type]) -> None:
        self._graph = collecting_graph(prepared, range_observers)
        self.streams = self._graph.streams

    @property
    def values(self) -> int:
        """How many values are watched, V."""
        return len(self._graph.places)

    def run(self, inputs: tuple[Any, ...]) -> Tensor:
        """Return the extremes of each value on one chunk, float32 ``[V, 2]``.

        Raises EncodingError for a value that is not finite, with the module that computed it.
        """
        with torch.no_grad():
            found = self._graph.module(*pytree.tree_leaves(inputs))
        rows = torch.stack(found) if found else torch.empty(0, 2)
        bad = ~rows.isfinite().all(1) & (rows[:, 0] != torch.inf)  # infinity first: no elements
        if bad.any():
            first = int(bad.nonzero()[0])
            low, high = rows[first].tolist()
            raise EncodingError(
                f"not finite: got {low} to {high} in {place_of(self._graph.places[first])} during "
                "calibration, accepted are finite activations"
            )
        return rows

    def finish(self, table: Tensor) -> None:
        """Give the observers the rows of all chunks in their order, float32 ``[chunks, V, 2]``."""
        ordered = any(
            isinstance(each.observer, MovingAverageMinMaxObserver) for each in self._ranges
        )
        whole = torch.stack((table[..., 0].amin(0), table[..., 1].amax(0)), -1)
        for rows in table if ordered else [whole]:
            for watched in self._ranges:
                if rows[watched.value, 0] <= rows[watched.value, 1]:
                    watched.observer(rows[watched.value].clone())
        for follower, name in self._graph.followers:
            follower.load_state_dict(self.streams[name].state_dict())

    def unmergeable(self) -> list[str]:
        """The types of streams whose states of several processes cannot be added up."""
        kinds = {type(each) for each in self.streams.values()}
        return sorted(each.__name__ for each in kinds if not issubclass(each, ElementObserver))

    @property
    def _ranges(self) -> Sequence[Watched]:
        return self._graph.ranges
