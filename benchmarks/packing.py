"""Speed of int4 packing, beside ExecuTorch's Vulkan packer and a plain copy of the same bytes.

    python benchmarks/packing.py --threads 1 --shapes 2048x2048 8192x2048 49152x576
    python benchmarks/packing.py --threads 1 --model

Packing reads int8 ``[N, K]`` and writes uint8 ``[N, K/2]``; the copy clones the int8 tensor.
Calls are made in turn; GB/s is of the int8 bytes read, from the best call. With one thread the CPU
seconds are counted, so that a busy machine may run it. Unpacking is timed by the bytes it writes.

``--model`` is the work of a lowering: the 211 weights of SmolLM2-135M in sequence, each once, from
memory that is in no cache to memory that is new (what an earlier turn freed is given back to the
system first). Each contestant does them all, in turn, and keeps the results until its turn ends.
"system ms" are the kernel's part: it zeroes each new page. Figures are medians. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import time
from collections.abc import Callable

import torch

from edgepass.ops import pack_int4, unpack_int4
from measuring import in_turn, machine, paired_ratio, table

SHAPES = ("1536x576", "2048x2048", "8192x2048", "49152x576", "32768x2048")
# SmolLM2-135M: q, o, k, v, gate, up and down of each layer, then the head.
LAYER = (*2 * [(576, 576)], *2 * [(192, 576)], *2 * [(1536, 576)], (576, 1536))
MODEL = (*30 * LAYER, (49152, 576))


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The call as a function that returns its seconds."""

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def run() -> float:
        start = clock()
        call()
        return clock() - start

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
    best = {name: min(samples) for name, samples in times.items()}
    return [
        f"{n} x {k}",
        *(n * k / each / 1e9 for each in best.values()),
        best["stock"] / best["edgepass"],
        best["edgepass"] / best["copy"],
    ]


def compare_model(seconds: float) -> list[list[object]]:
    """One row a contestant: milliseconds for all weights, GB/s, and the ratio to edgepass's."""
    from executorch.backends.vulkan.patterns.weight_packing_utils import pack_4bit_weight_tensor

    weights = [torch.randint(-8, 8, shape, dtype=torch.int8) for shape in MODEL]
    if not all(torch.equal(pack_int4(w), pack_4bit_weight_tensor(w)) for w in weights):
        raise SystemExit("the two packers disagree")
    packers = {"copy": torch.clone, "edgepass": pack_int4, "stock": pack_4bit_weight_tensor}
    times: dict[str, list[float]] = {name: [] for name in packers}
    system: dict[str, list[float]] = {name: [] for name in packers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["stock"]) < 5:
        for name, pack in packers.items():
            ctypes.CDLL(None).malloc_trim(0)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
            times[name].append(timed(lambda pack=pack: [pack(w) for w in weights])())
            system[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_stime - before)
    values = sum(n * k for n, k in MODEL)
    return [
        [
            name,
            1000 * statistics.median(times[name]),
            1000 * statistics.median(system[name]),
            values / statistics.median(times[name]) / 1e9,
            paired_ratio(times[name], times["edgepass"]),
        ]
        for name in packers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="NxK, K a multiple of 8")
    parser.add_argument("--model", action="store_true", help="all weights of SmolLM2-135M instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}, {arguments.threads} threads\n")
    if arguments.model:
        rows = compare_model(arguments.seconds)
        print(table(["packer", "ms", "system ms", "GB/s", "time / edgepass"], rows))
        return
    rows = []
    for shape in arguments.shapes:
        n, k = (int(size) for size in shape.split("x"))
        rows.append(compare(n, k, arguments.seconds))
    header = ["N x K", "copy GB/s", "edgepass GB/s", "stock GB/s", "unpack GB/s"]
    print(table([*header, "stock / edgepass", "edgepass / copy"], rows))


if __name__ == "__main__":
    main()
