"""Reading the GGUF container: its metadata, and where each tensor's bytes lie.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little endian. Nothing of a tensor is read before it is asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepass.ops.errors import CheckpointError

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: ``shape`` in torch order, ``kind`` the ggml type, bytes from start."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file: its metadata by key (arrays of strings as their length only) and tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor ``name``, uint8, as they are stored."""
        tensor = self.tensors[name]
        return np.fromfile(self.path, dtype=np.uint8, count=tensor.size, offset=tensor.start)

    def dequantize(self, name: str) -> Tensor:
        """Return tensor ``name`` as float32, in the shape of its :class:`GgufTensor`."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        rows = self.read(name).reshape(*tensor.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType(tensor.kind))
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def read_gguf(path: Path) -> GgufFile:
    """Read the header of ``path``.

    Raises:
        CheckpointError: no GGUF file of version 2 or 3, cut short, or with a tensor of a type that
            the ``gguf`` package does not know.
    """
    cursor = _Cursor(path)
    magic, version, tensor_count, pair_count = cursor.unpack("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(
            f"not a GGUF file: got path={path}, which begins with {magic!r} (version {version}); "
            "accepted are little-endian GGUF files of version 2 or 3"
        )
    metadata = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(*cursor.unpack("I"))
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: _locate(path, name, shape, kind, offset, data_start)
        for name, shape, kind, offset in entries
    }
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if end > len(cursor.data):
        raise cursor.truncated(end)
    return GgufFile(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    (rank,) = cursor.unpack("I")
    *sizes, kind, offset = cursor.unpack(f"{rank}QIQ")
    return name, tuple(reversed(sizes)), kind, offset


def _locate(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int
) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {member.value: member for member in GGMLQuantizationType}
    if kind not in known:
        raise CheckpointError(
            f"unknown tensor type: got type={kind} for tensor {name} of path={path}; accepted are "
            "those of the installed gguf package"
        )
    block, block_bytes = GGML_QUANT_SIZES[known[kind]]
    return GgufTensor(shape, kind, data_start + offset, prod(shape) // block * block_bytes)


class _Cursor:
    """A position in a memory-mapped file; reading past its end is a truncated checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = (
            np.memmap(path, mode="r", dtype=np.uint8).data if _size(path) else memoryview(b"")
        )
        self.position = 0

    def truncated(self, needed: int) -> CheckpointError:
        return CheckpointError(
            f"truncated GGUF file: got path={self.path} of {len(self.data)} bytes, its header asks "
            f"for at least {needed}"
        )

    def take(self, count: int) -> memoryview:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise self.truncated(self.position)
        return self.data[start : self.position]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def string(self) -> str:
        return bytes(self.take(*self.unpack("Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(*self.unpack("IQ"))
        raise CheckpointError(
            f"unknown metadata type: got type={kind} at byte {self.position} of path={self.path}; "
            "accepted are those of GGUF version 3"
        )

    def array(self, kind: int, count: int) -> Any:
        """Return numbers as a list; of an array of strings (a vocabulary) only its length."""
        if kind in _SCALARS:
            layout = f"<{_SCALARS[kind]}"
            data = self.take(count * struct.calcsize(layout))
            return [number for (number,) in struct.iter_unpack(layout, data)]
        if kind == _STRING:
            for _ in range(count):
                self.take(*self.unpack("Q"))
            return count
        raise CheckpointError(
            f"unknown metadata type: got an array of type={kind} in path={self.path}; accepted are "
            "arrays of numbers and of strings"
        )


def _size(path: Path) -> int:
    return path.stat().st_size
