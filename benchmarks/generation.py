"""Prefill and decode speed of decoder ``.pte`` files on the stock ExecuTorch runtime, in turn.

    python benchmarks/generation.py ours=out/xnnpack/model.pte peer=peer/model.pte

Any two or more files whose ``forward`` takes int64 token ids ``[1, S]`` and their positions: one
start position ``[1]`` (edgepass) or a position for each token ``[S]`` (optimum-executorch). The
first file is compared with each of the others, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measuring import in_turn, machine, paired_ratio, table


class Decoder:
    """A decoder ``.pte``, loaded; called with token ids and the position of the first of them."""

    def __init__(self, path: Path) -> None:
        """Load ``path``.

        Raises:
            ValueError: its ``forward`` does not have the inputs of a decoder.
        """
        # Their import registers the operators that exporters leave outside of delegates.
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime

        self.path = path
        self.program = Runtime.get().load_program(str(path))  # must outlive its methods
        self.method = self.program.load_method("forward")
        if self.method is None or self.method.metadata.num_inputs() != 2:
            raise ValueError(f"not a decoder: got {path}, accepted is forward(ids, positions)")
        positions = self.method.metadata.input_tensor_meta(1).sizes()
        self.position_for_each_token = positions[0] > 1
        self.longest_call = self.method.metadata.input_tensor_meta(0).sizes()[1]
        self.vocabulary = self.method.metadata.output_tensor_meta(0).sizes()[-1]

    def __call__(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Run ids int64 ``[1, S]`` at positions ``start`` and on; return the logits."""
        positions = torch.tensor([start])
        if self.position_for_each_token:
            positions = torch.arange(start, start + ids.shape[1])
        return self.method.execute([ids, positions])[0]

    def prefill(self, ids: torch.Tensor, chunk: int) -> float:
        """Return the tokens per second of running ids ``[1, S]`` from position 0 in chunks."""
        begin = time.perf_counter()
        for start in range(0, ids.shape[1], chunk):
            self(ids[:, start : start + chunk], start)
        return ids.shape[1] / (time.perf_counter() - begin)

    def decode(self, ids: torch.Tensor, start: int) -> float:
        """Return the tokens per second of running ids ``[1, S]`` one by one from ``start`` on."""
        steps = ids.T.contiguous()
        begin = time.perf_counter()
        for index in range(len(steps)):
            self(steps[index : index + 1], start + index)
        return len(steps) / (time.perf_counter() - begin)


def random_ids(count: int, vocabulary: int) -> torch.Tensor:
    numbers = random.Random(0)
    return torch.tensor([[numbers.randrange(vocabulary) for _ in range(count)]])


def phases(
    decoders: dict[str, Decoder], options: argparse.Namespace
) -> dict[str, dict[str, Callable[[], float]]]:
    """Return, phase by phase, what each decoder runs: prefill in each chunk size, then decode."""
    vocabulary = min(decoder.vocabulary for decoder in decoders.values())
    prompt = random_ids(options.prompt, vocabulary)
    behind = random_ids(options.tokens, vocabulary)
    runs: dict[str, dict[str, Callable[[], float]]] = {}
    for chunk in options.chunks:
        runs[f"prefill {options.prompt} by {chunk}"] = {
            name: partial(decoder.prefill, prompt, chunk)
            for name, decoder in decoders.items()
            if chunk <= decoder.longest_call
        }
    # Each decode runs behind its own prompt, which the last prefill left in the cache.
    runs[f"decode behind {options.prompt}"] = {
        name: partial(decoder.decode, behind, options.prompt) for name, decoder in decoders.items()
    }
    return runs


def measure(decoders: dict[str, Decoder], options: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens per second of every round, by phase and file."""
    samples = {}
    for phase, runs in phases(decoders, options).items():
        in_turn(runs, 1)  # warm-up: pages the weights in
        contestants = {name: with_best_threads(run) for name, run in runs.items()}
        samples[phase] = in_turn(contestants, options.rounds)
    return samples


def with_best_threads(run: Callable[[], float]) -> Callable[[], float]:
    """Return ``run`` with the number of torch's threads that serves it best: one or all.

    Operators outside of delegates may compute on torch's threads (``custom_sdpa`` does); where
    they only copy logits, their spinning takes cores from the runtime's own.
    """

    def with_threads(threads: int) -> float:
        torch.set_num_threads(threads)
        return run()

    choices = {str(threads): partial(with_threads, threads) for threads in {1, os.cpu_count() or 1}}
    tried = in_turn(choices, 3)
    return choices[max(tried, key=lambda name: statistics.median(tried[name]))]


def best_prefill(samples: dict[str, Any], name: str) -> list[float]:
    """Return the rounds of the chunk size that served the file ``name`` best."""
    rounds = [runs[name] for phase, runs in samples.items() if "prefill" in phase and name in runs]
    return max(rounds, key=statistics.median)


def summary(samples: dict[str, Any], names: list[str]) -> str:
    """Return the table of medians (tokens per second) with the first file's ratio to each other."""
    best = {"prefill, each at its best": {name: best_prefill(samples, name) for name in names}}
    header = ["tokens per second", *names, *(f"{names[0]} / {other}" for other in names[1:])]
    rows = [
        [
            phase,
            *(statistics.median(runs[name]) if name in runs else "-" for name in names),
            *(
                paired_ratio(runs[names[0]], runs[other]) if {names[0], other} <= set(runs) else "-"
                for other in names[1:]
            ),
        ]
        for phase, runs in (samples | best).items()
    ]
    return table(header, rows)


def named_file(argument: str) -> tuple[str, Path]:
    """Read ``name=path`` or ``path``, whose folder is then the name."""
    name, equals, path = argument.partition("=")
    return (name, Path(path)) if equals else (Path(argument).parent.name, Path(argument))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=named_file, metavar="[name=]model.pte")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the decode")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the raw measurements here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    decoders = {name: Decoder(path) for name, path in options.files}
    samples = measure(decoders, options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "samples": samples}, indent=1))
    print(f"{machine()}\n\n{summary(samples, list(decoders))}")


if __name__ == "__main__":
    main()
