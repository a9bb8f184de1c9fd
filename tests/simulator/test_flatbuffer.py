"""The flatbuffer reader, on buffers that the flatbuffers package writes and on altered ones."""

import struct

import flatbuffers
import numpy as np
import pytest

from edgepass.ops.errors import ProgramError
from edgepass.simulator.flatbuffer import Field, Record, Schema, read_flatbuffer

SCHEMA = Schema(
    identifier=b"TEST",
    tables={
        "Leaf": (Field("size", "int"), Field("name", "string")),
        "Other": (Field("value", "double", 1),),
        "Root": (
            Field("flag", "bool"),
            Field("level", "ubyte", 7),
            Field("either", "Either"),
            Field("numbers", "[long]"),
            Field("leaves", "[Leaf]"),
            Field("leaf", "Leaf"),
        ),
    },
    unions={"Either": ("Leaf", "Other")},
)


def leaf(builder: flatbuffers.Builder, size: int, name: str) -> int:
    text = builder.CreateString(name)
    builder.StartObject(2)
    builder.PrependInt32Slot(0, size, 0)
    builder.PrependUOffsetTRelativeSlot(1, text, 0)
    return builder.EndObject()


def written(leaves: int = 2) -> bytes:
    builder = flatbuffers.Builder(64)
    made = [leaf(builder, i, f"leaf {i}") for i in range(leaves)]
    numbers = builder.CreateNumpyVector(np.array([3, -1, 2**40], dtype=np.int64))
    builder.StartVector(4, leaves, 4)
    for each in reversed(made):
        builder.PrependUOffsetTRelative(each)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependFloat64Slot(0, 2.5, 1.0)
    other = builder.EndObject()
    builder.StartObject(7)
    builder.PrependBoolSlot(0, True, False)
    builder.PrependUint8Slot(2, 2, 0)
    builder.PrependUOffsetTRelativeSlot(3, other, 0)
    builder.PrependUOffsetTRelativeSlot(4, numbers, 0)
    builder.PrependUOffsetTRelativeSlot(5, vector, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"TEST")
    return bytes(builder.Output())


def read(data: bytes) -> Record:
    return read_flatbuffer(memoryview(data), SCHEMA, "Root", "thing")


def test_each_kind_of_field_is_read() -> None:
    root = read(written())
    assert (root.kind, root.flag, root.level, root.leaf) == ("Root", True, 7, None)
    assert (root.either.kind, root.either.value) == ("Other", 2.5)
    assert root.numbers.tolist() == [3, -1, 2**40]
    assert [(each.size, each.name) for each in root.leaves] == [(0, "leaf 0"), (1, "leaf 1")]


def test_an_unknown_field_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="Root has no field size"):
        read(written()).size  # noqa: B018


def test_a_foreign_identifier_is_named() -> None:
    data = bytearray(written())
    data[4:8] = b"ELSE"
    with pytest.raises(ProgramError, match=r"unknown format of thing: got identifier=b'ELSE'"):
        read(bytes(data))


def test_a_truncated_buffer_is_an_error() -> None:
    data = written()
    for size in range(len(data) - 4):  # the last bytes are a string's end and padding
        with pytest.raises(ProgramError):
            read(data[:size])


@pytest.mark.parametrize("value", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_spliced_integers_never_escape(value: int) -> None:
    data = written()
    for at in range(8, len(data) - 4, 4):
        altered = data[:at] + struct.pack("<I", value) + data[at + 4 :]
        try:
            read(altered)
        except ProgramError as error:
            assert "damaged thing" in str(error)


def test_tables_may_be_shared() -> None:
    data = bytearray(written(leaves=400))
    vector = data.index(struct.pack("<I", 400))
    first = vector + 4
    target = first + struct.unpack_from("<I", data, first)[0]
    for i in range(400):
        struct.pack_into("<I", data, first + 4 * i, target - first - 4 * i)
    assert len(read(bytes(data)).leaves) == 400


def test_a_vector_of_one_large_table_may_not_outgrow_the_buffer() -> None:
    numbers = {"Root": (Field("rows", "[Row]"),), "Row": (Field("values", "[long]"),)}
    builder = flatbuffers.Builder(64)
    values = builder.CreateNumpyVector(np.arange(1000, dtype=np.int64))
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, values, 0)
    row = builder.EndObject()
    builder.StartVector(4, 1000, 4)
    for _ in range(1000):
        builder.PrependUOffsetTRelative(row)
    rows = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, rows, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"TEST")
    with pytest.raises(ProgramError, match="more often than its size allows"):
        read_flatbuffer(
            memoryview(bytes(builder.Output())), Schema(b"TEST", numbers, {}), "Root", "thing"
        )
