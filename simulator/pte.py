"""The parts of a ``.pte``: its program, its segments, its named data and its delegates.

Layout: ``exir/_serialize/_program.py`` of ExecuTorch. A flatbuffer comes first; an extended header
behind its identifier says where it ends and where the segments begin.
"""

from __future__ import annotations

import struct
from pathlib import Path

from edgepass.ops.errors import ProgramError
from edgepass.simulator.flatbuffer import Record, read_flatbuffer
from edgepass.simulator.schemas import PROGRAM

_HEADER = struct.Struct("<4sIQQ")
_HEADER_START = 8
_PROGRAM_VERSION = 0
_INLINE, _SEGMENT = 0, 1


class ProgramFile:
    """A ``.pte`` whose program was read and whose references were checked as they are followed.

    Attributes: ``program`` (the root table), ``plans`` (its methods by name) and ``nbytes``.
    """

    def __init__(self, source: str | Path | bytes | bytearray | memoryview) -> None:
        """Read a file or its bytes. Raises ProgramError when they are not a program."""
        self.what, data = _content(source)
        self.data = memoryview(data).toreadonly()
        self.nbytes = len(self.data)
        end, self._base = self._read_header()
        self.program = read_flatbuffer(self.data[:end], PROGRAM, "Program", self.what)
        if self.program.version != _PROGRAM_VERSION:
            raise ProgramError(
                f"unknown schema version of {self.what}: got version={self.program.version}, "
                f"accepted is {_PROGRAM_VERSION}"
            )
        plans = self.program.execution_plan or []
        self.plans: dict[str, Record] = {plan.name or "": plan for plan in plans}
        if not self.plans:
            raise self.damaged("it holds no method")
        self._named = {entry.key: entry.segment_index for entry in self.program.named_data or []}

    def damaged(self, reason: str) -> ProgramError:
        """Return the error for a reference that leads nowhere."""
        return ProgramError(
            f"damaged {self.what}: {reason}; accepted are .pte files as ExecuTorch wrote them"
        )

    def _read_header(self) -> tuple[int, int]:
        """Return where the flatbuffer ends and where the segments begin."""
        if len(self.data) < _HEADER_START + _HEADER.size:
            raise self.damaged(f"it ends early: got {len(self.data)} bytes")
        magic, length, size, base = _HEADER.unpack_from(self.data, _HEADER_START)
        if magic != b"eh00":
            return len(self.data), len(self.data)
        if length < _HEADER.size or size > len(self.data) or base > len(self.data):
            raise self.damaged(
                f"its header names program_size={size} and segment_base_offset={base} in "
                f"{len(self.data)} bytes"
            )
        return size, base or len(self.data)

    def segment(self, index: int) -> memoryview:
        """The bytes of a segment, without a copy."""
        segments = self.program.segments or []
        if not 0 <= index < len(segments):
            raise self.damaged(f"segment={index} of {len(segments)}")
        start = self._base + segments[index].offset
        end = start + segments[index].size
        if end > len(self.data):
            raise self.damaged(f"segment={index} ends at {end} of {len(self.data)} bytes")
        return self.data[start:end]

    def named_data(self, key: str) -> memoryview:
        """The bytes that a delegate keeps under ``key``."""
        if key not in self._named:
            raise self.damaged(f"no named data key={key!r}")
        return self.segment(self._named[key])

    def delegate_data(self, delegate: Record) -> memoryview:
        """The bytes that a backend prepared for a ``BackendDelegate``."""
        reference = delegate.processed
        if reference is None:
            raise self.damaged(f"a delegate of {delegate.id} without data")
        if reference.location == _SEGMENT:
            return self.segment(reference.index)
        inline = self.program.backend_delegate_data or []
        if reference.location != _INLINE or reference.index >= len(inline):
            raise self.damaged(f"delegate data index={reference.index} of {len(inline)}")
        data = inline[reference.index].data
        return memoryview(b"" if data is None else data)

    def constant(self, tensor: Record) -> memoryview | None:
        """The bytes that a ``Tensor`` of a method begins with, None if it has none.

        Those of a constant, or the first content of a mutable buffer; they may be longer than
        the tensor.
        """
        extra, index = tensor.extra_tensor_info, tensor.data_buffer_idx
        if index == 0:
            return None
        if tensor.allocation_info is not None:
            mutable = self.program.mutable_data_segments or []
            group = extra.mutable_data_segments_idx if extra is not None else 0
            if group >= len(mutable):
                raise self.damaged(f"mutable data segment={group} of {len(mutable)}")
            return self._subsegment(mutable[group], index)
        constants = self.program.constant_segment
        if constants is not None and constants.offsets is not None and len(constants.offsets):
            return self._subsegment(constants, index)
        buffers = self.program.constant_buffer or []
        if index >= len(buffers):
            raise self.damaged(f"constant buffer index={index} of {len(buffers)}")
        storage = buffers[index].storage
        return memoryview(b"" if storage is None else storage)

    def _subsegment(self, group: Record, index: int) -> memoryview:
        offsets = group.offsets if group.offsets is not None else ()
        if index >= len(offsets):
            raise self.damaged(f"data index={index} of {len(offsets)}")
        data = self.segment(group.segment_index)
        if int(offsets[index]) > len(data):
            raise self.damaged(f"data index={index} begins outside its segment")
        return data[int(offsets[index]) :]


def _content(source: str | Path | bytes | bytearray | memoryview) -> tuple[str, bytes]:
    if not isinstance(source, (str, Path)):
        return f"program of {len(source)} bytes", bytes(source)
    try:
        return f"file {source}", Path(source).read_bytes()
    except OSError as error:
        raise ProgramError(
            f"unreadable file: got {source} ({error.strerror}), accepted is a .pte"
        ) from error
