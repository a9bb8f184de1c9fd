"""What a program is said to hold."""

import pytest

from edgepass.lowering.vulkan import lower_vulkan
from edgepass.simulator.inventory import inventory
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.vulkan_programs import Decoder, export_decoder


@pytest.fixture(scope="module")
def buffer() -> bytes:
    return lower_vulkan(export_decoder(Decoder(layers=1))).buffer


@pytest.fixture(scope="module")
def listed(buffer: bytes) -> dict:
    return inventory(SimulatedProgram(buffer))


def test_borders_and_calls(listed: dict, buffer: bytes) -> None:
    assert listed["file_bytes"] == len(buffer)
    assert (listed["methods"], listed["method"], listed["outside"]) == (["forward"], "forward", {})
    assert listed["inputs"] == [
        {"dtype": "int64", "shape": [1, 31], "dynamic": True},
        {"dtype": "int64", "shape": [1], "dynamic": False},
    ]
    assert listed["outputs"] == [{"dtype": "float32", "shape": [1, 1, 64], "dynamic": False}]
    (delegate,) = listed["delegates"]
    assert delegate["operators"]["et_vk.linear_dq8ca_q4gsw.default"] == 4
    assert delegate["calls"][-1] == "et_vk.linear_q4gsw.default"
    assert sum(delegate["operators"].values()) == len(delegate["calls"])


def test_constants_by_role(listed: dict) -> None:
    (delegate,) = listed["delegates"]
    by_role: dict[str, list[tuple]] = {}
    for entry in delegate["constants"]:
        row = entry["dtype"], tuple(entry["shape"]), entry["nbytes"], entry["uses"]
        by_role.setdefault(entry["role"], []).append(row)
    # Q, K and V together, the output, gate and up together, down; the table serves as head, too.
    assert {*by_role["weights"], *by_role["tables"]} == {
        ("uint8", (256, 32), 8192, 1),
        ("uint8", (128, 32), 4096, 1),
        ("uint8", (64, 32), 2048, 1),
        ("uint8", (64, 32), 2048, 2),
        ("uint8", (64, 64), 4096, 1),
        ("float32", (32, 16), 2048, 1),
    }
    assert by_role["caches"] == [("float32", (1, 32, 2, 16), 4096, 2)]
    assert len(by_role["sums"]) == 4


def test_memory_by_kind(listed: dict) -> None:
    memory = listed["memory"]
    assert memory["weights"] == 8192 + 4096 + 2048 + 4096
    assert memory["sums"] == 4 * (2 * 128 + 2 * 64 + 2 * 256 + 4 * 64)
    # Both caches, though the file has their zeros once.
    assert memory["caches"] == 2 * 4096
    # Cosines and sines, and the table that is the head, too.
    assert memory["tables"] == 2 * 2048 + 2048
    assert memory["activations"] > 31 * 64 * 4
