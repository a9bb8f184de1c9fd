"""What an analysis costs, and how true its cheap scores are.

    edgepass analyze --model smollm2-135m --calibration calibration.txt --out analysis
    python benchmarks/sensitivity.py --analysis analysis --text calibration.txt

Cost: measuring all candidates of all sites on ``--chunks`` chunks, preparing them included, against
a plain forward and backward pass (gradients of all weights) of the same chunks, in turn in one run.
Truth: for every ``--every``-th layer, the head and the embedding, the divergence of each site
quantized alone, by running the model on ``--exact-chunks`` chunks, against the analysis' score:
Spearman's rank correlation, and the ratio.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from edgepass.analysis import backends_of, holds
from edgepass.calibration.analysis import Analysis, read_analysis
from edgepass.calibration.candidates import choices_of
from edgepass.calibration.exact_divergence import ExactDivergence
from edgepass.calibration.recipe import Recipe
from edgepass.calibration.sensitivity import SensitivityProbe, prepare_sites
from edgepass.calibration.sites import find_sites
from edgepass.models.load import load_model
from measuring import machine, table

# The candidate of each kind of site that is run.
_SHOWN = ("int4-g32", "int4-b32", "dynamic int8", "static int8", "int8")


def plain(model: Any, chunk: Tensor) -> None:
    """One step of training without the step."""
    model.requires_grad_(True)
    logits = model(chunk[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], chunk[1:]).backward()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def cost(model: Any, plan: Any, chunks: Tensor) -> tuple[Any, str]:
    wall, cpu = {"plain": 0.0, "analysis": 0.0}, {"plain": 0.0, "analysis": 0.0}

    def timed(name: str, run: Any) -> Any:
        started, used = time.perf_counter(), time.process_time()
        result = run()
        wall[name] += time.perf_counter() - started
        cpu[name] += time.process_time() - used
        return result

    plain(model, chunks[0])  # warm
    sites = timed("analysis", lambda: prepare_sites(model, plan))
    probe = SensitivityProbe(model, sites, 0)
    for number, chunk in enumerate(chunks):
        timed("plain", lambda chunk=chunk: plain(model, chunk))
        timed("analysis", lambda chunk=chunk, number=number: probe.run(chunk, number))
    rows = [[name, f"{wall[name]:.1f}", f"{cpu[name]:.1f}"] for name in wall]
    rows.append(
        [
            "ratio",
            f"{wall['analysis'] / wall['plain']:.2f}",
            f"{cpu['analysis'] / cpu['plain']:.2f}",
        ]
    )
    return sites, table(["", "wall s", "CPU s"], rows)


def truth(model: Any, analysis: Analysis, sites: Any, chunks: Tensor, every: int) -> str:
    scores = {s.name: {c.label: c.kl for c in s.candidates} for s in analysis.sites}
    tasks = []
    for site in sites:
        layer = site.place.layer
        labels = [choice.label for choice in site.choices]
        shown = [label for label in _SHOWN if label in labels]
        if shown and (layer is None or layer % every == 1):
            tasks.append((site, labels.index(shown[0]), shown[0]))
    exact = [0.0] * len(tasks)
    for chunk in chunks:
        run = ExactDivergence(model, chunk)
        for index, (site, candidate, _) in enumerate(tasks):
            exact[index] += run.of(site, candidate) / len(chunks)
    cheap = [scores[site.place.name][label] for site, _, label in tasks]
    kinds = [site.place.kind for site, _, _ in tasks]
    rows = []
    for kind in ("weight", "activation", "attention", "kv_cache", "all"):
        picked = [i for i, own in enumerate(kinds) if kind in (own, "all")]
        if kind == "weight":  # the tables are weights, too
            picked = [i for i, own in enumerate(kinds) if own in ("weight", "head", "embedding")]
        one, other = [cheap[i] for i in picked], [exact[i] for i in picked]
        ratios = sorted(a / b for a, b in zip(one, other, strict=True) if b > 0)
        rank = spearmanr(one, other).statistic
        rows.append(
            [
                kind,
                len(picked),
                f"{rank:.3f}",
                f"{ratios[len(ratios) // 2]:.2f}",
                f"{sum(one):.4f}",
                f"{sum(other):.4f}",
            ]
        )
    return table(["sites", "number", "Spearman", "median ratio", "sum of scores", "exact"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--analysis", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="what was analysed")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--exact-chunks", type=int, default=2)
    parser.add_argument("--every", type=int, default=3)
    options = parser.parse_args()
    analysis = read_analysis(options.analysis)
    model, tokenizer = load_model(analysis.model, layers=analysis.layers)
    model.requires_grad_(False)
    ids = tokenizer(options.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    length = analysis.chunk_tokens
    chunks = torch.tensor(ids[: options.chunks * length]).reshape(-1, length)
    recipe = Recipe.model_validate(analysis.recipe)
    places = find_sites(model)
    plan = {place: choices_of(place, recipe, backends_of(recipe), holds) for place in places}
    sites, costs = cost(model, plan, chunks)
    print(f"{machine()}; {len(places)} sites, {sum(map(len, plan.values()))} candidates\n")
    print(f"{costs}\n", flush=True)
    exact = chunks[: options.exact_chunks]
    print(truth(model, analysis, sites, exact, options.every))


if __name__ == "__main__":
    main()
