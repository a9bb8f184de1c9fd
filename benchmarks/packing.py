"""Speed of int4 packing, beside ExecuTorch's Vulkan packer and a plain copy of the same bytes.

    python benchmarks/packing.py --shapes 2048x2048 8192x2048 49152x576

Packing reads int8 ``[N, K]`` and writes uint8 ``[N, K/2]``; the copy clones the int8 tensor.
Calls are made in turn; GB/s is of the int8 bytes read, from the median; ratios are medians of the
ratios of one turn. Unpacking is timed by the int8 bytes that it writes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from edgepass.ops import pack_int4, unpack_int4
from measuring import in_turn, machine, paired_ratio, table

SHAPES = ("1536x576", "2048x2048", "8192x2048", "49152x576", "32768x2048")


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The call as a function that returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def compare(n: int, k: int, seconds: float) -> list[object]:
    """One row of the table."""
    from executorch.backends.vulkan.patterns.weight_packing_utils import pack_4bit_weight_tensor

    w = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    packed = pack_int4(w)
    if not torch.equal(packed, pack_4bit_weight_tensor(w)):
        raise SystemExit(f"the two packers disagree on {n} x {k}")
    contestants = {
        "copy": timed(w.clone),
        "edgepass": timed(lambda: pack_int4(w)),
        "stock": timed(lambda: pack_4bit_weight_tensor(w)),
        "unpack": timed(lambda: unpack_int4(packed, k)),
    }
    once = sum(run() for run in contestants.values())
    times = in_turn(contestants, max(5, min(300, int(seconds / once))))
    speeds = (n * k / statistics.median(samples) / 1e9 for samples in times.values())
    return [
        f"{n} x {k}",
        *speeds,
        paired_ratio(times["stock"], times["edgepass"]),
        paired_ratio(times["edgepass"], times["copy"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="NxK, K a multiple of 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for shape in arguments.shapes:
        n, k = (int(size) for size in shape.split("x"))
        rows.append(compare(n, k, arguments.seconds))
    header = ["N x K", "copy GB/s", "edgepass GB/s", "stock GB/s", "unpack GB/s"]
    print(f"{machine()}, {arguments.threads} threads\n")
    print(table([*header, "stock / edgepass", "edgepass / copy"], rows))


if __name__ == "__main__":
    main()
