"""Keeps what native libraries print off standard output and error."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def native_output_captured() -> Iterator[Any]:
    """Send what native code prints in the block to a temporary file, which is yielded."""
    _flush()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            _flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # C has buffers of its own, which would otherwise be written after the block.
    ctypes.CDLL(None).fflush(None)
