"""How near a lowered program, run on the host, comes to what it was made of.

Programs for XNNPACK run on the stock runtime, those for Vulkan in the simulator.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgepass.generation import load_program
from edgepass.lowering.lower import LoweredProgram
from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.program import WorkingProgram
from edgepass.passes.verification import run_program, signal_to_noise_db

METHOD = "forward"
# JSON has no infinity: equal to the last bit, and not comparable at all.
_MOST_DB = 999.0


def add_device_check(
    lowered: LoweredProgram, samples: Sequence[Any], unquantized: Sequence[Tensor] | None = None
) -> None:
    """Run ``lowered`` on ``samples`` and put its agreement into ``report["numerics"]``.

    ``device_sqnr_db`` compares with the eager fused program, ``device_sqnr_unquantized_db`` with
    ``unquantized``, the outputs of the float module on ``samples`` (None without them). Both are
    ``{method: dB of the worst output}``, at most 999. Raises InvalidArgumentError for samples
    that are not the program's inputs, ProgramError for a backend that does not run on a host.
    """
    fused = WorkingProgram(lowered.fused)
    inputs = pytree.tree_leaves(list(samples))
    if len(inputs) != len(fused.user_inputs):
        raise InvalidArgumentError(
            f"cannot check the program: got samples={len(inputs)}, accepted are "
            f"{len(fused.user_inputs)} inputs, such as the program's own example_inputs"
        )
    expected = run_program(fused, inputs)
    got = _run(lowered, inputs)
    numerics = lowered.report["numerics"]
    numerics["device_sqnr_db"] = {METHOD: worst_db(expected, got)}
    numerics["device_sqnr_unquantized_db"] = (
        None if unquantized is None else {METHOD: worst_db(unquantized, got)}
    )


def worst_db(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The least agreement in dB of two lists of outputs; -999 if they are not comparable."""
    pairs = zip(expected, got, strict=True)
    found = [signal_to_noise_db(one, other) for one, other in pairs if isinstance(one, Tensor)]
    return round(max(-_MOST_DB, min(_MOST_DB, *found)), 2)


def _run(lowered: LoweredProgram, inputs: list[Any]) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="edgepass.") as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(lowered.buffer)
        run = load_program(path, lowered.report["backend"])
        # The runtime may hand out its own memory: outputs are copied while it lives.
        return [each.clone() if isinstance(each, Tensor) else each for each in run(inputs)]


def decoder_samples(vocabulary: int, context: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 ``[1, S]`` and the position 0: what a decoder is checked with.

    Random, of a fixed seed; several, because the Vulkan runtime reads the activation of one token
    as floats where the program quantizes it.
    """
    count = max(1, min(16, context - 1))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, count), generator=generator)
    return ids, torch.zeros(1, dtype=torch.long)
