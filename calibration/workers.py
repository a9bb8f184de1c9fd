"""Calibrating in several processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from edgepass.calibration.collector import Collector
from edgepass.ops.errors import CalibrationError


@dataclass(frozen=True)
class Workers:
    """The processes of a calibration: ``rank`` of this one, and how many there are (``size``)."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Workers:
        """Those that ``torchrun`` says there are; joins their group (gloo) if there are several."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
            return Workers()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return Workers(dist.get_rank(), size)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def share(self, chunks: int) -> range:
        """The numbers of the chunks that are this process's: every ``size``-th."""
        return range(self.rank, chunks, self.size)

    def check(self, collector: Collector, chunks: int) -> None:
        """Raise CalibrationError if the work cannot be shared out."""
        if self.size > 1 and collector.unmergeable():
            raise CalibrationError(
                f"cannot be shared out: got observers {', '.join(collector.unmergeable())} in "
                f"{self.size} processes, accepted are min_max, moving_average, histogram, "
                "percentile and mse, or one process"
            )
        if chunks < self.size:
            raise CalibrationError(
                f"too few chunks: got {chunks} for {self.size} processes, accepted is one for each "
                "and more"
            )

    def agree(self, number: int) -> int:
        """The first process's number."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.broadcast(value, 0)
        return int(value)

    def merge(self, collector: Collector, mine: Tensor, chunks: int) -> Tensor:
        """Return the rows of all chunks in order, ``[chunks, V, 2]``; add up the streams.

        ``mine`` ``[share, V, 2]`` are this process's. All processes end with the same.
        """
        table = self.join(mine, chunks)
        if self.size == 1:
            return table
        for name in sorted(collector.streams):
            states = self._gather_states(collector.streams[name].state_dict())
            collector.streams[name].merge(states[: self.rank] + states[self.rank + 1 :])
        return table

    def join(self, mine: Tensor, count: int) -> Tensor:
        """Return the rows of all of ``count`` items in order, from each process's ``share``."""
        if self.size == 1:
            return mine
        most = -(-count // self.size)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        return torch.stack(self._gather(padded), 1).flatten(0, 1)[:count]

    def _gather(self, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous())
        return parts

    def _gather_states(self, state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        gathered = {name: self._gather(value) for name, value in state.items()}
        return [{name: gathered[name][rank] for name in gathered} for rank in range(self.size)]
