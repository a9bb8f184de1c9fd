"""Running the Vulkan programs of ``.pte`` files without a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgepass.ops.errors import InvalidArgumentError, ProgramError
from edgepass.simulator.method import VULKAN_BACKEND, Method
from edgepass.simulator.pte import ProgramFile

Source = str | Path | bytes | bytearray | memoryview


class SimulatedProgram:
    """A program with Vulkan delegates, loaded. Caches and buffers persist between calls.

    Attributes: ``file`` (its parts) and ``methods`` (the names of its methods).
    """

    def __init__(self, source: Source) -> None:
        """Read a ``.pte``, a path or bytes. Methods are prepared when they are first run.

        Raises ProgramError for a file that is damaged, of an unknown version, or without a
        Vulkan delegate.
        """
        self.file = ProgramFile(source)
        self.methods = list(self.file.plans)
        self._loaded: dict[str, Method] = {}
        backends = {
            delegate.id for plan in self.file.plans.values() for delegate in plan.delegates or []
        }
        if VULKAN_BACKEND not in backends:
            found = ", ".join(sorted(map(str, backends))) or "none"
            raise ProgramError(
                f"no Vulkan delegate: got {self.file.what} with delegates={found}, accepted are "
                f"programs with a delegate of {VULKAN_BACKEND}"
            )

    def method(self, name: str = "forward") -> Method:
        """Return a method, prepared.

        Raises InvalidArgumentError for an unknown name, ProgramError for damaged parts, and
        SimulatorError for operators that are not known or that a device could not load.
        """
        if name not in self.file.plans:
            raise InvalidArgumentError(
                f"unknown method: got method={name!r}, accepted are {', '.join(self.methods)}"
            )
        if name not in self._loaded:
            self._loaded[name] = Method(self.file, name)
        return self._loaded[name]

    @torch.no_grad()
    def run(self, inputs: Sequence[Any], method: str = "forward") -> list[Any]:
        """Run a method: its outputs, tensors that later calls do not change.

        ``inputs`` have the dtypes that the program names, and at most its sizes. Raises
        InvalidArgumentError for inputs that do not fit, for positions and tokens beyond a cache
        or a rotary table, and for ids outside an embedding: the device would go on with wrong
        numbers. Raises SimulatorError for what would end the process on the device.
        """
        return self.method(method).run(inputs)

    def reset(self) -> None:
        """Give caches and buffers the content that they had after loading."""
        for loaded in self._loaded.values():
            loaded.reset()


def simulate(source: Source, inputs: Sequence[Any], method: str = "forward") -> list[Any]:
    """Run a ``.pte`` once as the Vulkan runtime would: a list of output tensors.

    ``source`` is a path or the program's bytes, ``inputs`` are those of ``method``. Use
    :class:`SimulatedProgram` for several calls. Raises as its methods do.
    """
    return SimulatedProgram(source).run(inputs, method)
