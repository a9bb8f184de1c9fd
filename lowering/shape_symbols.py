"""The symbols that lowering adds to the shape environment that a program and its copies share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._guards import detect_fake_mode
from torch.export import ExportedProgram


@contextmanager
def settle_symbols(program: ExportedProgram) -> Iterator[None]:
    """Let no symbol that is made meanwhile wait for an owner.

    Passes that trace a graph make a fresh symbol for each position value that they read. Those that
    reach no output of a traced operator stay pending, and the next ``run_decompositions`` on a
    program of the same shape environment fails for them.
    """
    values = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(values)
    environment = None if mode is None else mode.shape_env
    if environment is None:
        yield
        return
    before = len(environment.pending_fresh_unbacked_symbols)
    try:
        yield
    finally:
        del environment.pending_fresh_unbacked_symbols[before:]
