"""How long a proven allocation takes, by the number of sites and candidates.

    python benchmarks/allocation.py --sizes 211x8 2000x12

Random sites with the sizes and divergences of a decoder's: divergences fall about fourfold a bit
and vary over three decades between sites. Ten budgets between the smallest and the largest, and the
gap that the solver proved.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from edgepass.calibration.allocation import AllocationProblem
from edgepass.calibration.analysis import Analysis, Candidate, Site
from edgepass.calibration.recipe_sections import Weights
from measuring import machine, table


def random_analysis(sites: int, candidates: int, seed: int = 0) -> Analysis:
    random = np.random.default_rng(seed)
    found = []
    for index in range(sites):
        values = int(random.choice([576 * 192, 576 * 576, 1536 * 576]))
        hurt = 10 ** random.uniform(-4, -1)
        options = []
        for step in range(candidates):
            bits = 4.1 + 4.4 * step / (candidates - 1)
            options.append(
                Candidate(
                    label=f"c{step}",
                    weights=Weights(bits=4),
                    bytes={"xnnpack": int(values * bits / 8 * random.uniform(0.99, 1.01))},
                    sqnr_db=20.0,
                    kl=float(hurt * 4 ** -(bits - 4) * random.uniform(0.8, 1.25)),
                )
            )
        found.append(
            Site(
                name=f"s{index}",
                kind="weight",
                modules=(f"s{index}",),
                role="s",
                shape=(1, values),
                values=values,
                candidates=tuple(options),
            )
        )
    return Analysis(
        model="random",
        recipe={"name": "8da4w"},
        identity={},
        chunks=1,
        chunk_tokens=2,
        seed=seed,
        sites=tuple(found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["211x8", "2000x12"])
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        sites, candidates = map(int, size.split("x"))
        problem = AllocationProblem(random_analysis(sites, candidates), "xnnpack")
        seconds, gaps = [], []
        for part in np.linspace(0.05, 0.95, 10):
            budget = int(problem.smallest + part * (problem.largest - problem.smallest))
            started = time.perf_counter()
            gaps.append(problem.within_bytes(budget).gap)
            seconds.append(time.perf_counter() - started)
        rows.append([size, f"{np.median(seconds):.2f}", f"{max(seconds):.2f}", f"{max(gaps):.1e}"])
    print(f"{machine()}\n")
    print(table(["sites x candidates", "median s", "slowest s", "largest gap"], rows))


if __name__ == "__main__":
    main()
