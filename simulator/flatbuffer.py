"""Reading flatbuffers of untrusted bytes, by a schema given as data.

Format: https://flatbuffers.dev/internals. Each offset, length and count is compared with the
buffer's size before anything is read, and all that is read together may be at most a few times as
large as the buffer: tables may share parts, so that a small altered file could name a great many.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgepass.ops.errors import ProgramError

# Little endian, as the format demands: codes of ``struct`` and NumPy.
SCALARS = {
    "bool": "?",
    "byte": "b",
    "ubyte": "B",
    "int": "i",
    "uint": "I",
    "long": "q",
    "ulong": "Q",
    "double": "d",
}
_MOST_NESTED = 16


@dataclass(frozen=True)
class Field:
    """One field of a table, in the order of its schema.

    ``type`` is a scalar of ``SCALARS``, ``string``, ``[scalar]``, ``[string]``, the name of a table
    or of a union, or ``[table]``. ``default`` is the value of a scalar that is absent.
    """

    name: str
    type: str
    default: Any = 0


@dataclass(frozen=True)
class Schema:
    """Tables and unions by name, and the four bytes that mark a file of this schema.

    A union lists its tables in the schema's order; its fields take two slots, kind and value.
    """

    identifier: bytes
    tables: Mapping[str, tuple[Field, ...]]
    unions: Mapping[str, tuple[str, ...]]


class Record(SimpleNamespace):
    """A table that was read: its fields as attributes, ``kind`` is the table's name."""

    kind: str

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.kind} has no field {name}")


def read_flatbuffer(data: memoryview, schema: Schema, root: str, what: str) -> Record:
    """Read ``data`` whole, as a table ``root``.

    Absent strings, vectors and tables are None; vectors of scalars are NumPy arrays that share the
    bytes of ``data``. Raises ProgramError, in which ``what`` names the thing, for a foreign
    identifier and for bytes that keep no form.
    """
    found = bytes(data[4:8])
    if found != schema.identifier:
        raise ProgramError(
            f"unknown format of {what}: got identifier={found!r}, accepted is {schema.identifier!r}"
        )
    reader = _Reader(data, schema, what)
    return reader.table(root, reader.follow(0), 0)


class _Reader:
    def __init__(self, data: memoryview, schema: Schema, what: str) -> None:
        self.data, self.schema, self.what = data, schema, what
        self.left = 4 * len(data) + 1024

    def damaged(self, reason: str) -> ProgramError:
        return ProgramError(
            f"damaged {self.what}: {reason}; got {len(self.data)} bytes, accepted are bytes as "
            "the program's writer left them"
        )

    def scalar(self, code: str, position: int) -> Any:
        if not 0 <= position <= len(self.data) - struct.calcsize("<" + code):
            raise self.damaged(f"position={position} is outside")
        return struct.unpack_from("<" + code, self.data, position)[0]

    def follow(self, position: int) -> int:
        return position + self.scalar("I", position)

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise self.damaged("its parts name one another more often than its size allows")

    def table(self, name: str, position: int, depth: int) -> Record:
        if depth > _MOST_NESTED:
            raise self.damaged(f"its tables are nested deeper than {_MOST_NESTED}")
        self.spend(4)
        slots = position - self.scalar("i", position)
        size = self.scalar("H", slots)
        record, slot = Record(kind=name), 0
        for field in self.schema.tables[name]:
            union = self.schema.unions.get(field.type)
            at = self.slot(position, slots, size, slot + (union is not None))
            if union is not None:
                kind = self.slot(position, slots, size, slot)
                value = self.union(field.type, kind, at, depth)
            else:
                value = self.value(field.type, at, field.default, depth)
            setattr(record, field.name, value)
            slot += 1 + (union is not None)
        return record

    def slot(self, position: int, slots: int, size: int, slot: int) -> int | None:
        """Return where a field's value lies, None when it is absent."""
        entry = 4 + 2 * slot
        if entry + 2 > size:
            return None
        offset = self.scalar("H", slots + entry)
        return position + offset if offset else None

    def value(self, kind: str, at: int | None, default: Any, depth: int) -> Any:
        if kind in SCALARS:
            return default if at is None else self.scalar(SCALARS[kind], at)
        if at is None:
            return None
        at = self.follow(at)
        if kind == "string":
            return self.string(at)
        if kind.startswith("["):
            return self.vector(kind[1:-1], at, depth)
        return self.table(kind, at, depth + 1)

    def union(self, name: str, kind: int | None, at: int | None, depth: int) -> Record | None:
        number = 0 if kind is None else self.scalar("B", kind)
        if number == 0:
            return None
        tables = self.schema.unions[name]
        if number > len(tables) or at is None:
            raise self.damaged(f"{name} has kind={number}, accepted are 1 to {len(tables)}")
        return self.table(tables[number - 1], self.follow(at), depth + 1)

    def string(self, at: int) -> str:
        try:
            return bytes(self.array("ubyte", at)).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a string is not UTF-8") from error

    def vector(self, kind: str, at: int, depth: int) -> Any:
        if kind in SCALARS:
            return self.array(kind, at)
        positions = [at + 4 + 4 * i + int(o) for i, o in enumerate(self.array("uint", at))]
        if kind == "string":
            return [self.string(position) for position in positions]
        return [self.table(kind, position, depth + 1) for position in positions]

    def array(self, kind: str, at: int) -> np.ndarray:
        count = self.scalar("I", at)
        dtype = np.dtype("<" + SCALARS[kind] if kind != "bool" else "?")
        if count * dtype.itemsize > len(self.data) - at - 4:
            raise self.damaged(f"a vector of {count} values ends outside")
        self.spend(count if kind != "ubyte" else 1)
        return np.frombuffer(self.data, dtype, count, at + 4)
