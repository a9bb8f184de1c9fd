"""What `simulate` does: a Vulkan program's inventory, and a run of it on arrays of a file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepass.ops.errors import InvalidArgumentError, OutputError
from edgepass.simulator.inventory import inventory
from edgepass.simulator.simulate import SimulatedProgram

# Values of a result that are shown; all of them go into the file of `--out`.
_SHOWN = 8


def load(file: Path, method: str) -> SimulatedProgram:
    """Read a ``.pte`` and prepare ``method``: what cannot be run is told before anything is."""
    program = SimulatedProgram(file)
    program.method(method)
    return program


def describe(program: SimulatedProgram, method: str, with_calls: bool) -> dict[str, Any]:
    """Return the inventory, with every call in order if ``with_calls``."""
    listed = inventory(program, method)
    if not with_calls:
        for delegate in listed["delegates"]:
            del delegate["calls"]
    return listed


def run(
    program: SimulatedProgram, method: str, inputs: Path, out: Path | None
) -> list[dict[str, Any]]:
    """Run ``method`` on the arrays of ``inputs``; describe the results, write them to ``out``.

    Raises InvalidArgumentError for an unreadable file, OutputError when ``out`` cannot be written.
    """
    results = program.run(_read_arrays(inputs), method)
    if out is not None:
        _write_arrays(out, results)
    return [_shown(result) for result in results]


def refuse_out_alone(out: Path) -> None:
    """Raise InvalidArgumentError: there are no results to write without inputs."""
    raise InvalidArgumentError(
        f"nothing to write: got out={out} without inputs, accepted is --out with --inputs"
    )


def _read_arrays(path: Path) -> list[torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [torch.from_numpy(arrays[name]) for name in arrays.files]
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidArgumentError(
            f"unreadable inputs: got inputs={path}, accepted is an .npz of arrays of numbers"
        ) from error


def _write_arrays(path: Path, results: list[Any]) -> None:
    arrays: dict[str, Any] = {f"output_{i}": np.asarray(each) for i, each in enumerate(results)}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write out={path}: {error.strerror or error}") from error


def _shown(result: Any) -> dict[str, Any]:
    if not isinstance(result, torch.Tensor):
        return {"dtype": type(result).__name__, "shape": [], "values": [result]}
    dtype = str(result.dtype).removeprefix("torch.")
    values = result.reshape(-1)[:_SHOWN].tolist()
    return {"dtype": dtype, "shape": list(result.shape), "values": values}
