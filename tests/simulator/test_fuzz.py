"""Altered and truncated programs: an EdgepassError or a result, in bounded time and memory."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
from functools import cache

import pytest
import torch

from edgepass.lowering.vulkan import lower_vulkan
from edgepass.ops.errors import EdgepassError
from edgepass.simulator.inventory import inventory
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.vulkan_programs import Decoder, export_decoder

INTEGERS = (0, 1, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40)
INPUTS = (torch.zeros(1, 3, dtype=torch.long), torch.tensor([0]))
# The program takes less than a megabyte; the interpreter and torch about 500.
MEMORY = 3 << 30
SECONDS_A_PROGRAM = 20


@cache
def program() -> bytes:
    return lower_vulkan(export_decoder(Decoder(layers=1))).buffer


def altered(data: bytes, seed: int) -> bytes:
    """Cut the program, flip bits of it, or splice integers into it; mostly near its structure."""
    numbers = random.Random(seed)
    if seed % 10 == 0:
        return data[: numbers.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(numbers.choice((1, 1, 1, 2, 8))):
        at = numbers.choice(structure(data)) + numbers.randrange(4)
        if seed % 2:
            changed[at] ^= 1 << numbers.randrange(8)
        else:
            width = numbers.choice((1, 2, 4, 8))
            value = numbers.choice(INTEGERS) & ((1 << 8 * width) - 1)
            changed[at : at + width] = value.to_bytes(width, "little")
    return bytes(changed)


@cache
def structure(data: bytes) -> list[int]:
    """Where both flatbuffers lie: any change of the weights behind them is a right program, too."""
    (end,) = struct.unpack_from("<Q", data, 16)
    header = data.index(b"VH00") - 4
    start, size = struct.unpack_from("<II", data, header + 10)
    return [
        *range(4, end),
        *range(header + 4, header + 30),
        *range(header + start, header + start + size),
    ]


def attempt(data: bytes) -> str:
    """Read, list and run a program; the name of the error that ends that, or "ran"."""
    try:
        simulated = SimulatedProgram(data)
        inventory(simulated, simulated.methods[0])
        simulated.run(INPUTS, simulated.methods[0])
    except EdgepassError as error:
        assert "\n" not in str(error), error
        return type(error).__name__
    return "ran"


def check(seeds: range) -> dict[str, int]:
    """Try each seed's program under a limit of time; count the outcomes."""
    data, found = program(), {}
    for seed in seeds:
        signal.alarm(SECONDS_A_PROGRAM)  # ends the process: a hang is a failure
        outcome = attempt(altered(data, seed))
        found[outcome] = found.get(outcome, 0) + 1
    signal.alarm(0)
    return found


def in_bounds(seeds: range) -> dict[str, int]:
    """:func:`check` in a process that may take ``MEMORY`` bytes."""
    script = (
        "import json, resource, sys; from tests.simulator import test_fuzz as t; t.program();"
        f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}));"
        f"print(json.dumps(t.check({seeds!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_few_hundred_altered_programs() -> None:
    found = in_bounds(range(300))
    assert sum(found.values()) == 300
    assert found["ProgramError"] > 30
    assert found["ran"] > 30  # many bytes are names and padding, which change nothing


@pytest.mark.nightly
def test_ten_thousand_altered_programs() -> None:
    assert sum(in_bounds(range(1000, 11000)).values()) == 10_000
