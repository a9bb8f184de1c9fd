"""Time of the fused int4 linear in eager mode, beside fp32 ``F.linear`` and torchao's module.

    python benchmarks/linear.py --tokens 1 8 32 128 512

The three have the same shape and take the same activation, call after call in turn; times are
medians, ratios are medians of the ratios of one turn. With one thread the CPU time is counted, so
that a busy machine may run it. torchao's module is a ``Linear`` under
``Int8DynamicActivationIntxWeightConfig`` (8da4w), whose weight it dequantizes at each call.
The last column is edgepass's agreement with exact integer arithmetic on the first tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from edgepass.ops import dequantize_int4, pack_int4, reference
from measuring import in_turn, machine, paired_ratio, table

SHAPES = ((2048, 2048), (2048, 8192), (576, 1536), (1536, 576), (576, 49152))
CHECKED_TOKENS, CHECKED_OUTPUTS = 4, 512


def torchao_module(k: int, n: int, group_size: int) -> torch.nn.Module:
    """A Linear of random weights, quantized by torchao to 8da4w."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    module = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False))
    recipe = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(group_size)
    )
    quantize_(module, recipe)
    return module


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The call as a function that returns its milliseconds."""

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def run() -> float:
        start = clock()
        call()
        return 1000 * (clock() - start)

    return run


def agreement_db(
    x: torch.Tensor,
    out: torch.Tensor,
    operands: tuple[torch.Tensor, int, torch.Tensor, torch.Tensor],
) -> float:
    """Signal to error, in dB, of the first outputs against exact integer sums."""
    packed, group_size, scales, zeros = operands
    x, out = x[:CHECKED_TOKENS], out[:CHECKED_TOKENS, :CHECKED_OUTPUTS].double()
    quantized = torch.ops.edgepass.quantize_per_token(x)
    part = slice(CHECKED_OUTPUTS)
    exact = reference.linear_qta8a_qga4w(
        *quantized, packed[part], group_size, scales[part], zeros[part]
    )
    return 10 * math.log10(float(exact.square().sum() / (out - exact).square().sum()))


def compare(k: int, n: int, tokens: list[int], group_size: int, seconds: float) -> list[list]:
    """One row of the table for each number of tokens."""
    module = torchao_module(k, n, group_size)
    weight = module[0].weight
    scales, zeros = weight.scale.reshape(n, -1), weight.zero_point.reshape(n, -1)
    operands = (pack_int4(weight.qdata), group_size, scales, zeros.to(torch.int8))
    plain = dequantize_int4(operands[0], scales, operands[3], group_size)
    rows = []
    for m in tokens:
        x = torch.randn(m, k)
        contestants = {
            "fp32": timed(lambda x=x: F.linear(x, plain)),
            "edgepass": timed(
                lambda x=x: torch.ops.edgepass.linear_qta8a_qga4w.dynamic(x, *operands)
            ),
            "torchao": timed(lambda x=x: module(x)),
        }
        once = sum(statistics.mean(run() for _ in range(3)) for run in contestants.values())
        rounds = max(5, min(500, int(seconds * 1000 / once)))
        times = in_turn(contestants, rounds)
        out = torch.ops.edgepass.linear_qta8a_qga4w.dynamic(x, *operands)
        rows.append(
            [
                f"{k} x {n}",
                m,
                *(statistics.median(samples) for samples in times.values()),
                paired_ratio(times["edgepass"], times["fp32"]),
                paired_ratio(times["torchao"], times["edgepass"]),
                round(agreement_db(x, out, operands)),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES], help="KxN, e.g. 2048x8192"
    )
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for shape in arguments.shapes:
            k, n = (int(size) for size in shape.split("x"))
            rows += compare(k, n, arguments.tokens, arguments.group_size, arguments.seconds)
    header = ["K x N", "M", "fp32 ms", "edgepass ms", "torchao ms"]
    print(f"{machine()}, {arguments.threads} threads, group {arguments.group_size}\n")
    print(table([*header, "edgepass / fp32", "torchao / edgepass", "dB"], rows))


if __name__ == "__main__":
    main()
