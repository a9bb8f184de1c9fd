"""Whether the sweep's probe stands for the model: thread counts on the probe and on the model.

    python benchmarks/threads.py --chunk 512 --calibration-tokens 16384 --rounds 3

The sweep runs first. Then the whole model runs a forward of one chunk with each candidate in turn,
and a step of one token behind a cache of one chunk. Both columns are the time to that of the count
that the sweep chose, as the median of the ratios of one round each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from edgepass.calibration.cpu_limits import cpu_limits
from edgepass.calibration.thread_candidates import thread_candidates
from edgepass.calibration.thread_sweep import ThreadChoice
from edgepass.calibration.tuned_threads import (
    choose_calibration_threads,
    choose_decode_threads,
)
from edgepass.models.load import load_model
from edgepass.ops.threads import torch_threads
from measuring import in_turn, machine, paired_ratio, table


def timed(run: Callable[[], Any], threads: int) -> Callable[[], float]:
    """Return what runs ``run`` twice with ``threads`` threads and times the second time."""

    def measure() -> float:
        torch.set_num_threads(threads)
        with torch.no_grad():
            run()
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

    return measure


def step_behind(model: Any, past: int) -> Callable[[], Any]:
    """Return a decode step behind ``past`` cached tokens, which leaves the cache as it was."""
    with torch.no_grad():
        cache = model(torch.zeros(1, past, dtype=torch.long), use_cache=True).past_key_values

    def step() -> None:
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def rows(choice: ThreadChoice, run: Callable[[], Any], rounds: int) -> list[list[str]]:
    """One row a candidate: threads, probe and model to the chosen count, and the model's time."""
    trials = {trial.threads: trial for trial in choice.sweep.trials} if choice.sweep else {}
    counts = thread_candidates(cpu_limits())
    with torch_threads():
        samples = in_turn({str(count): timed(run, count) for count in counts}, rounds)
    chosen = samples[str(choice.threads)]
    return [
        [
            f"{count}{' (chosen)' if count == choice.threads else ''}",
            f"{trials[count].relative:.2f}" if count in trials else "not swept",
            f"{paired_ratio(samples[str(count)], chosen):.2f}",
            f"{min(samples[str(count)]):.3g}",
        ]
        for count in counts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, _ = load_model(options.model, layers=options.layers)
    tokens, chunk = options.calibration_tokens, options.chunk
    ids = torch.zeros(1, chunk, dtype=torch.long)
    jobs: dict[str, tuple[ThreadChoice, Callable[[], Any]]] = {
        "calibration forward": (
            choose_calibration_threads(model, tokens, chunk),
            lambda: model(ids, use_cache=False),
        ),
        "decode step": (choose_decode_threads(model, tokens, chunk), step_behind(model, chunk)),
    }
    print(machine())
    for name, (choice, run) in jobs.items():
        cost = f"{choice.sweep.cost_s:.2f} s" if choice.sweep else choice.why
        print(f"\n{name}, sweep {cost}\n")
        head = ["threads", "probe", "model", "least s"]
        print(table(head, rows(choice, run, options.rounds)))


if __name__ == "__main__":
    main()
