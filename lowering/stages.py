"""Times the stages of a lowering, for the report and for whoever waits."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stages:
    """The stages so far. ``progress`` is called with a stage's name when it begins."""

    progress: Callable[[str], None] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block: wall seconds, and the process's peak memory in bytes at its end."""
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        yield
        self.rows.append(
            {
                "name": name,
                "seconds": round(time.perf_counter() - started, 3),
                # Linux counts ru_maxrss in KiB.
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
