"""Running a lowered QNN decoder on this host, in the simulator of the HTP libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepass.lowering.qnn_libraries import prepare_libraries
from edgepass.lowering.qnn_lowering import quiet_compiler
from edgepass.ops.encodings import Encoding
from edgepass.ops.errors import ProgramError


class SimulatedProgram:
    """A ``.pte`` of HTP contexts, loaded in the simulator.

    Raises LibraryError without the QNN libraries, ProgramError for a file that does not load.
    """

    def __init__(self, path: str | Path) -> None:
        from executorch.runtime import Runtime

        prepare_libraries()
        # The program must outlive its methods.
        try:
            with quiet_compiler():
                self._program = Runtime.get().load_program(Path(path))
        except RuntimeError as error:
            raise ProgramError(
                f"truncated or foreign file: got {path}, which the runtime cannot load ({error}); "
                "accepted are .pte files that `lower` wrote"
            ) from error
        self._methods: dict[str, Any] = {}

    @property
    def methods(self) -> set[str]:
        """The names of the program's methods, constants among them."""
        return set(self._program.method_names)

    def constant(self, name: str) -> Any:
        """What the constant method ``name`` returns."""
        return self._program.load_method(name).execute([])[0]

    def run(self, method: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run ``method`` on flat inputs; the outputs are copies."""
        with quiet_compiler():
            if method not in self._methods:
                self._methods[method] = self._program.load_method(method)
            flat = [each.contiguous() for each in inputs]
            return [each.clone() for each in self._methods[method].execute(flat)]


def quantize_tensor(value: Tensor, encoding: Encoding) -> Tensor:
    """Float ``value`` as the device holds it: unsigned 8- or 16-bit integers."""
    scaled = torch.round(value / encoding.scale) + encoding.zero_point
    clamped = scaled.clamp(encoding.quant_min, encoding.quant_max)
    return clamped.to(torch.uint8 if encoding.bits == 8 else torch.uint16)


def dequantize_tensor(value: Tensor, encoding: Encoding) -> Tensor:
    """The float values of the device's integers; float tensors pass."""
    if value.is_floating_point():
        return value
    return (value.to(torch.int32) - encoding.zero_point).to(torch.float32) * encoding.scale
