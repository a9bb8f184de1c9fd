"""What an allocation is worth: perplexity at equal bytes of weights.

    edgepass analyze --model smollm2-135m --calibration calibration.txt --out analysis
    python benchmarks/mixed_precision.py --analysis analysis --text other.txt

Beside edgepass's allocation, at the same budget and on the same text (which must not be the one
that was analysed): the uniform recipe of the nearest size; a fixed rule as the stock sensitivity
analyzer has (8 bits below 10 dB, the budget left over given to those next above); two greedy
choices by the same scores, the most sensitive site first and the best step a byte first. Every
contestant's weights are rounded by one algorithm, then computed in float32 with 8-bit activations a
token. "loss" is the part of the uniform 4-bit recipe's loss in nats against float.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from computed import compute_in_float

from edgepass.calibration.allocated_recipe import allocated_recipe
from edgepass.calibration.allocation import Allocation, AllocationProblem, Cost, Option
from edgepass.calibration.analysis import Analysis, Candidate, read_analysis
from edgepass.calibration.recipe_sections import Backend
from edgepass.calibration.recipes import quantize_model
from edgepass.calibration.weight_rounding import NEED_STATISTICS
from edgepass.models.load import load_model
from edgepass.perplexity import of_model, perplexity
from measuring import machine, table

_CHUNK = 512
_THRESHOLD_DB = 10.0


def greedy(problem: AllocationProblem, budget: int) -> Allocation:
    """From the smallest on, the step that saves most divergence a byte, while one fits."""
    chosen = [group.options[0] for group in problem.groups]
    left = budget - sum(option.bytes for option in chosen)
    while True:
        steps = [
            ((now.cost - other.cost) / (other.bytes - now.bytes), index, other)
            for index, (now, group) in enumerate(zip(chosen, problem.groups, strict=True))
            for other in group.options
            if 0 < other.bytes - now.bytes <= left and other.cost < now.cost
        ]
        if not steps:
            return problem.allocation(chosen, math.nan)
        _, index, other = max(steps, key=lambda step: step[0])
        left -= other.bytes - chosen[index].bytes
        chosen[index] = other


def by_threshold(problem: AllocationProblem, budget: int) -> Allocation:
    """8 bits for the sites of the least SQNR while they fit, below 10 dB in any case."""
    return _upgraded(problem, budget, lambda c: c.sqnr_db, _THRESHOLD_DB)


def most_sensitive_first(problem: AllocationProblem, budget: int) -> Allocation:
    """8 bits for the sites of the greatest cost while they fit."""
    loss = problem.cost == "loss"
    return _upgraded(problem, budget, lambda c: -(c.text_loss if loss else c.best_kl), -math.inf)


def _upgraded(
    problem: AllocationProblem, budget: int, rank: Callable[[Candidate], float], always: float
) -> Allocation:
    """4 bits by groups of 32, and 8 bits in the order of ``rank``: if it fits or is below."""
    fine, coarse = problem.uniform("int8-channel"), problem.uniform("int4-g32")
    if fine is None or coarse is None:
        raise SystemExit("the rule needs int4-g32 and int8-channel candidates of every site")
    names = [tuple(site.name for site in group.sites) for group in problem.groups]
    ranks = [min(rank(coarse.choice[name]) for name in each) for each in names]
    chosen = [_option(problem, coarse, each) for each in names]
    left = budget - sum(option.bytes for option in chosen)
    for index in sorted(range(len(names)), key=lambda i: ranks[i]):
        better = _option(problem, fine, names[index])
        more = better.bytes - chosen[index].bytes
        if ranks[index] < always or more <= left:
            chosen[index], left = better, left - more
    return problem.allocation(chosen, math.nan)


def _option(problem: AllocationProblem, uniform: Allocation, names: tuple[str, ...]) -> Option:
    picked = [uniform.choice[name] for name in names]
    group = next(g for g in problem.groups if g.sites[0].name == names[0])
    places = tuple(s.candidates.index(c) for s, c in zip(group.sites, picked, strict=True))
    size = sum(c.bytes[problem.backend] for c in picked)
    return Option(places, math.nan, size)


def contestants(
    analysis: Analysis, backend: Backend, bpw: float, by: Cost | None
) -> Iterator[tuple[str, Allocation]]:
    problem = AllocationProblem(analysis, backend, by=by)
    budget = int(bpw * problem.values / 8)
    labels = {c.label for group in problem.groups for s in group.sites for c in s.candidates}
    uniform = [u for label in labels if (u := problem.uniform(label)) is not None]
    nearest = min(uniform, key=lambda u: abs(u.bytes - budget))
    base = problem.uniform("int4-g32")
    assert base is not None, "every site has int4-g32"
    yield "uniform int4-g32", base
    if nearest.bytes != base.bytes:
        yield f"uniform nearest ({next(iter(nearest.choice.values())).label})", nearest
    yield "10 dB rule", by_threshold(problem, budget)
    yield "greedy, the most sensitive first", most_sensitive_first(problem, budget)
    yield "greedy, the best step a byte first", greedy(problem, budget)
    yield "edgepass", problem.within_bytes(budget)
    yield "edgepass, bytes of uniform", problem.within_bytes(base.bytes)
    by_kl = AllocationProblem(analysis, backend, by="kl")
    yield "edgepass, by divergence", by_kl.within_bytes(budget)


def measure(
    analysis: Analysis, chosen: Allocation | None, options: argparse.Namespace
) -> tuple[float, float]:
    """The perplexity, and the seconds that rounding the weights took."""
    model, tokenizer = load_model(analysis.model, layers=analysis.layers)
    ids = tokenizer(options.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    started = time.perf_counter()
    if chosen is not None:
        recipe = allocated_recipe(analysis, chosen, "x").with_algorithm(options.algorithm)
        chunks = None
        if options.algorithm in NEED_STATISTICS:
            text = options.calibration.read_text("utf-8")
            given = tokenizer(text, add_special_tokens=False)["input_ids"]
            chunks = torch.tensor(given[: options.calibration_tokens]).reshape(-1, _CHUNK)
        model: Any = compute_in_float(quantize_model(model, recipe, chunks=chunks))
    seconds = time.perf_counter() - started
    value = perplexity(ids[: options.tokens], options.context, of_model(model)).perplexity
    del model
    gc.collect()
    return value, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--analysis", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="not the text that was analysed")
    parser.add_argument("--backend", default="xnnpack")
    parser.add_argument("--bpw", type=float, default=4.75)
    parser.add_argument("--algorithm", default="rtn")
    parser.add_argument("--calibration", type=Path, help="of seqmse and gptq")
    parser.add_argument("--calibration-tokens", type=int, default=64 * _CHUNK)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="*", help="names of contestants")
    options = parser.parse_args()
    analysis = read_analysis(options.analysis)
    known, _ = measure(analysis, None, options)
    rows: list[list[object]] = [["float32", 32.0, "", "", "", f"{known:.2f}", "", ""]]
    base = math.nan
    # What an algorithm makes of calibration has no slopes: `edgepass analyze` gives it none.
    by: Cost | None = "kl" if options.algorithm in NEED_STATISTICS else None
    for name, chosen in contestants(analysis, options.backend, options.bpw, by):
        if options.only and name not in options.only:
            continue
        value, seconds = measure(analysis, chosen, options)
        loss = math.log(value / known)
        base = loss if name == "uniform int4-g32" else base
        rows.append(
            [
                name,
                f"{chosen.bits_per_weight:.3f}",
                f"{chosen.bytes / 1e6:.2f}",
                f"{chosen.kl:.4f}",
                "" if chosen.loss is None else f"{chosen.loss:.4f}",
                f"{value:.2f}",
                f"{loss / base:.0%}",
                f"{seconds:.0f}",
            ]
        )
        print(rows[-1], flush=True)
    print(f"\n{machine()}; {options.algorithm}, {options.backend}\n")
    header = [
        "",
        "bits a weight",
        "MB",
        "summed KL",
        "summed loss",
        "perplexity",
        "loss",
        "rounding s",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
