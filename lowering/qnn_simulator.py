"""Running a lowered QNN decoder on this host, in the simulator of the HTP libraries."""

from __future__ import annotations

import atexit
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

from edgepass.lowering.qnn_libraries import prepare_libraries
from edgepass.ops.errors import ProgramError
from edgepass.ops.native_output import native_output_captured


class SimulatedProgram:
    """A ``.pte`` of HTP contexts, loaded in the simulator.

    Raises LibraryError without the QNN libraries, ProgramError for a file that does not load.
    """

    def __init__(self, path: str | Path) -> None:
        from executorch.runtime import Runtime

        prepare_libraries()
        _check_whole(Path(path))
        # The program must outlive its methods.
        try:
            with native_output_captured():
                self._program = Runtime.get().load_program(Path(path))
        except RuntimeError as error:
            raise ProgramError(
                f"truncated or foreign file: got {path}, which the runtime cannot load ({error}); "
                "accepted are .pte files that `lower` wrote"
            ) from error
        self._methods: dict[str, Any] = {}
        # The runtime tells of each context that it frees, if only when the process ends.
        atexit.register(self.close)

    def close(self) -> None:
        """Free the program; it must not be used afterwards. A second call does nothing."""
        with native_output_captured():
            self._methods.clear()
            self._program = None

    @property
    def methods(self) -> set[str]:
        """The names of the program's methods, constants among them."""
        return set(self._program.method_names)

    def constant(self, name: str) -> Any:
        """What the constant method ``name`` returns."""
        return self._program.load_method(name).execute([])[0]

    def run(self, method: str, inputs: list[Tensor]) -> list[Tensor]:
        """Run ``method`` on flat inputs; the outputs are copies."""
        with native_output_captured():
            if method not in self._methods:
                self._methods[method] = self._program.load_method(method)
            flat = [each.contiguous() for each in inputs]
            return [each.clone() for each in self._methods[method].execute(flat)]


def _check_whole(path: Path) -> None:
    """Refuse a file that ends before the sizes in its header: the runtime would crash on it.

    The layout is that of ExecuTorch's extended header: ``eh00`` at byte 8, then its length, and
    from byte 16 on the program's size, the segments' offset and the segments' size, 64 bits each.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(40)
    except OSError as error:
        raise ProgramError(
            f"no such file: got {path}, accepted is the .pte that `lower` wrote"
        ) from error
    whole = len(head) == 40 and head[8:12] == b"eh00"
    if whole:
        program, base, data = struct.unpack("<QQQ", head[16:40])
        has_data = struct.unpack("<I", head[12:16])[0] >= 32
        whole = max(program, base + (data if has_data else 0)) <= size
    if not whole:
        raise ProgramError(
            f"truncated or foreign file: got {path} of {size} bytes, accepted are .pte files that "
            "`lower` wrote"
        )
