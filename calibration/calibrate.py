"""Calibrating a prepared graph: resumable, in one process or several, told as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from edgepass.calibration.checkpoint import Checkpoint, discard_states
from edgepass.calibration.collector import Collector
from edgepass.calibration.identity import identity_of
from edgepass.calibration.observe import check_observers
from edgepass.calibration.workers import Workers
from edgepass.ops.errors import EncodingError
from edgepass.ops.threads import torch_threads


@dataclass(frozen=True)
class Calibration:
    """How to calibrate, and who is told.

    ``checkpoint`` is a folder for the state, None to keep none; each process has a file there.
    ``saving`` is the part of the time that may go into it. ``progress`` is called with a stage, the
    chunks done and all of them; ``log`` with a line on what this process did, unless it is alone
    and began at the start. ``workers`` are those that torchrun started.
    """

    checkpoint: Path | None = None
    saving: float = 0.05
    progress: Callable[..., None] | None = None
    log: Callable[[str], None] | None = None
    workers: Workers = field(default_factory=Workers.here)

    def run(
        self,
        prepared: GraphModule,
        chunks: Sequence[Tensor],
        inputs: Callable[[Tensor], tuple[Any, ...]],
        range_observers: frozenset[type] = frozenset(),
    ) -> None:
        """Fill the observers of ``prepared`` (of ``prepare_pt2e``), one forward a chunk.

        ``inputs`` makes the graph's inputs of a chunk; all chunks have one shape. An interrupted
        run with a checkpoint goes on where it was, with as many threads as it had, and ends with
        the same encodings, bit by bit; so does one that several processes share, for min-max and
        moving averages, and for the histograms of this library. ``range_observers``: see
        :class:`Collector`.

        Raises EncodingError without chunks, for values that are not finite and for observers that
        saw none; CalibrationError for a foreign checkpoint or work that cannot be shared out.
        """
        if not len(chunks):
            raise EncodingError("no calibration data: got 0 chunks, accepted are 1 and more")
        kept = self._kept(prepared, chunks)
        collector = Collector(prepared, range_observers)
        check_observers(prepared, constants=True)
        self.workers.check(collector, len(chunks))
        _Run(self, collector, kept).over(chunks, inputs)
        check_observers(prepared)

    def discard(self) -> None:
        """Remove the checkpoint, when what was made of the calibration is safe."""
        if self.checkpoint is not None:
            discard_states(self.checkpoint)

    def _kept(self, prepared: GraphModule, chunks: Sequence[Tensor]) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        path = self.checkpoint / f"{self.workers.rank}of{self.workers.size}.safetensors"
        return Checkpoint(path, identity_of(prepared, torch.stack(list(chunks))), self.saving)


class _Run:
    """One process's part of a calibration."""

    def __init__(self, options: Calibration, collector: Collector, kept: Checkpoint | None) -> None:
        self.options, self.collector, self.kept = options, collector, kept
        self.workers = options.workers
        self.rows: list[Tensor] = []
        self.threads = self.workers.agree(torch.get_num_threads())

    def over(self, chunks: Sequence[Tensor], inputs: Callable[[Tensor], tuple[Any, ...]]) -> None:
        share, started = self.workers.share(len(chunks)), time.perf_counter()
        before = self._resume()
        with torch_threads(self.threads):
            for number in share[before:]:
                self._tell(len(share))
                self.rows.append(self.collector.run(inputs(chunks[number])))
                if self.kept is not None and len(self.rows) < len(share):
                    self.kept.save_if_due(*self._state())
        self._tell(len(share))
        if self.kept is not None and before < len(share):
            self.kept.save(*self._state())
        self._log(share, before, chunks, time.perf_counter() - started)
        table = self.workers.merge(self.collector, torch.stack(self.rows), len(chunks))
        self.collector.finish(table)

    def _tell(self, of: int) -> None:
        if self.options.progress is not None:
            self.options.progress("calibrate", len(self.rows), of)

    def _log(self, share: range, before: int, chunks: Sequence[Tensor], seconds: float) -> None:
        if self.options.log is None or (self.workers.size == 1 and before == 0):
            return
        ran, left = len(share) - before, [str(number) for number in share[before:]]
        shown = left if ran <= 8 else [*left[:3], "...", left[-1]]
        self.options.log(
            f"{self.workers}: ran {ran} of {len(chunks)} chunks ({', '.join(shown) or 'none'}), "
            f"{ran * len(chunks[0])} tokens in {seconds:.1f} s with {self.threads} threads, "
            f"took {before} from a checkpoint"
        )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        streams = self.collector.streams.items()
        states = {f"{n}.{k}": v for n, each in streams for k, v in each.state_dict().items()}
        facts = {"chunks": len(self.rows), "threads": self.threads}
        return {"rows": torch.stack(self.rows), **states}, facts

    def _resume(self) -> int:
        """Take over a saved state; return its chunks."""
        saved = self.kept.load() if self.kept is not None else None
        if saved is None:
            return 0
        tensors, facts = saved
        self.threads = int(facts["threads"])
        self.rows = list(tensors["rows"])
        for name, stream in self.collector.streams.items():
            own = {k: tensors[f"{name}.{k}"].clone() for k in stream.state_dict()}
            stream.load_state_dict(own)
        return len(self.rows)
