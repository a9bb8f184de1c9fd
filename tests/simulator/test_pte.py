"""Files that are no programs, or not of this version, and what delegates refer to."""

import struct
from pathlib import Path

import pytest
import torch

from edgepass.lowering.vulkan import lower_vulkan
from edgepass.ops.errors import ProgramError
from edgepass.simulator.pte import ProgramFile
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.vulkan_files import delegates
from tests.lowering.vulkan_programs import Mlp, export_tokens


@pytest.fixture(scope="module")
def buffer() -> bytes:
    return lower_vulkan(export_tokens(Mlp(), 64)).buffer


def test_a_path_and_bytes_are_the_same(buffer: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(buffer)
    x = torch.randn(1, 3, 64)
    one, other = (SimulatedProgram(source).run([x])[0] for source in (path, str(path)))
    assert torch.equal(one, other)
    assert torch.equal(one, SimulatedProgram(memoryview(buffer)).run([x])[0])


def test_the_graph_is_what_stock_reads(buffer: bytes) -> None:
    """Names, shapes and constants, against ExecuTorch's own readers."""
    (stock,) = delegates(buffer)
    graph = SimulatedProgram(buffer).method().delegates[0].graph
    assert [call.name for call in graph.calls] == stock.operators
    assert [[*call.arguments, call.result] for call in graph.calls] == [
        call.args for call in stock.graph.chain
    ]
    for number, value in graph.constants():
        expected = stock.graph.values[number].value
        assert list(value.shape) == expected.dims
        assert value.constant is not None
        assert bytes(value.constant.data) == stock.content(expected)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"unreadable file: got .*none\.pte \(No such file"):
        ProgramFile(tmp_path / "none.pte")


@pytest.mark.parametrize("size", [0, 7, 30, 40])
def test_a_file_that_ends_in_its_header_is_refused(buffer: bytes, size: int) -> None:
    with pytest.raises(ProgramError, match=r"damaged program of|unknown format of program of"):
        ProgramFile(buffer[:size])


def test_a_truncated_file_is_refused(buffer: bytes) -> None:
    with pytest.raises(ProgramError, match="damaged"):
        SimulatedProgram(buffer[: len(buffer) // 2]).method()


def test_a_foreign_identifier_is_an_unknown_format(buffer: bytes) -> None:
    with pytest.raises(ProgramError, match="got identifier=b'ET13', accepted is b'ET12'"):
        ProgramFile(buffer[:4] + b"ET13" + buffer[8:])


def test_an_unknown_version_of_the_program_is_refused(
    buffer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepass.simulator.pte._PROGRAM_VERSION", 1)
    with pytest.raises(ProgramError, match="got version=0, accepted is 1"):
        ProgramFile(buffer)


@pytest.mark.parametrize(
    ("magic", "other", "words"),
    [
        (b"VH00", b"VH01", "magic=b'VH01', accepted is b'VH00'"),
        (b"VK00", b"VK01", "identifier=b'VK01', accepted is b'VK00'"),
    ],
)
def test_an_unknown_version_of_a_delegate_is_refused(
    buffer: bytes, magic: bytes, other: bytes, words: str
) -> None:
    with pytest.raises(ProgramError, match=words):
        SimulatedProgram(buffer.replace(magic, other, 1)).method()


def test_segments_outside_the_file_are_refused(buffer: bytes) -> None:
    beyond = buffer[:24] + struct.pack("<Q", len(buffer) + 1) + buffer[32:]
    with pytest.raises(ProgramError, match="segment_base_offset"):
        ProgramFile(beyond)
    late = buffer[:24] + struct.pack("<Q", len(buffer) - 16) + buffer[32:]
    with pytest.raises(ProgramError, match=r"segment=\d ends at"):
        SimulatedProgram(late).method()
