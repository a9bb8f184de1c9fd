"""Analysing a model: every site and candidate measured, resumable, in one process or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.analysis import Analysis, Candidate, Site
from edgepass.calibration.candidates import Choice, Holds, choices_of, role_of_kind
from edgepass.calibration.checkpoint import Checkpoint
from edgepass.calibration.exact_divergence import ExactDivergence
from edgepass.calibration.identity import model_identity
from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_modules import plan_modules
from edgepass.calibration.recipe_section import suggest
from edgepass.calibration.recipe_sections import Backend
from edgepass.calibration.sensitivity import MEASURES, Measured, SensitivityProbe, prepare_sites
from edgepass.calibration.sites import SitePlace, find_sites
from edgepass.calibration.weight_rounding import NEED_STATISTICS
from edgepass.calibration.workers import Workers
from edgepass.ops.errors import CalibrationError, InvalidArgumentError
from edgepass.ops.threads import torch_threads

# Exact divergences are taken on so many chunks.
_EXACT_CHUNKS = 2
_MOST_DB = 300.0  # of a weight that its candidate holds exactly


@dataclass(frozen=True)
class AnalysisRun:
    """How to analyse, and who is told.

    ``backends`` and ``holds``: whose candidates. ``exact``: of so many of the most sensitive sites
    the divergence is computed, too. ``patterns``: only sites whose name one of these matches as a
    shell matches. ``checkpoint`` is a folder for the state, None to keep none.
    ``progress`` is called with a stage, what is done and all; ``log`` with a line on what this
    process did. ``workers`` are those that torchrun started.
    """

    backends: tuple[Backend, ...]
    holds: Holds
    exact: int = 0
    seed: int = 0
    patterns: tuple[str, ...] = ()
    checkpoint: Path | None = None
    progress: Callable[..., None] | None = None
    log: Callable[[str], None] | None = None
    workers: Workers = field(default_factory=Workers.here)

    def run(
        self, model: Any, recipe: Recipe, chunks: Tensor, *, name: str, layers: int | None = None
    ) -> Analysis:
        """Analyse a float ``model`` on token ids ``chunks`` int64 ``[C, T]``.

        An interrupted run with a checkpoint goes on where it was and ends with the same result, to
        the bit if it has as many threads; so do several processes.

        Raises InvalidArgumentError for a recipe that does not fit the model or a pattern that
        matches no site, CalibrationError for values that are not finite, a foreign checkpoint, or
        fewer chunks than processes.
        """
        plan_modules(model, recipe)
        if len(chunks) < self.workers.size:
            raise CalibrationError(
                f"too few chunks: got {len(chunks)} for {self.workers.size} processes, accepted is "
                "one for each and more"
            )
        places = _matching(find_sites(model), self.patterns)
        plan = {place: choices_of(place, recipe, self.backends, self.holds) for place in places}
        sites = prepare_sites(model, plan)
        labels = [(s.place.name, [c.label for c in s.choices]) for s in sites]
        identity = model_identity(
            model, chunks, recipe=recipe.asked(), candidates=labels, seed=self.seed
        )
        kept = _Kept(self, identity)
        with torch_threads(kept.threads), _without_gradients(model):
            table = self._measure(SensitivityProbe(model, sites, self.seed), chunks, kept)
            exact = self._exact(model, chunks, sites, table, recipe, kept)
        return Analysis(
            model=name,
            layers=layers,
            recipe=recipe.asked(),
            identity=identity,
            chunks=len(chunks),
            chunk_tokens=chunks.shape[1],
            seed=self.seed,
            patterns=self.patterns,
            sites=tuple(_results(sites, table, exact)),
        )

    def _measure(self, probe: SensitivityProbe, chunks: Tensor, kept: _Kept) -> Tensor:
        """The measures of all candidates on all chunks, float64 ``[C, candidates, 4]``."""
        share, before = self.workers.share(len(chunks)), len(kept.rows)
        started = time.perf_counter()
        for number in share[before:]:
            self._tell("analyze", len(kept.rows), len(share))
            kept.rows.append(probe.run(chunks[number], number))
            kept.save()
        self._tell("analyze", len(share), len(share))
        if self.log is not None and (self.workers.size > 1 or before):
            self.log(
                f"{self.workers}: measured {len(share) - before} of {len(chunks)} chunks in "
                f"{time.perf_counter() - started:.1f} s with {kept.threads} threads, took {before} "
                "from a checkpoint"
            )
        return self.workers.join(torch.stack(kept.rows), len(chunks))

    def _exact(
        self,
        model: nn.Module,
        chunks: Tensor,
        sites: Sequence[Measured],
        table: Tensor,
        recipe: Recipe,
        kept: _Kept,
    ) -> dict[tuple[str, int], float]:
        """The divergence of each candidate of the most sensitive sites, by site and candidate."""
        top = _most_sensitive(sites, table, recipe, self.exact)
        tasks = [(site, index) for site in top for index in range(len(site.choices))]
        parts = chunks[:_EXACT_CHUNKS]
        pairs = [(part, task) for part in range(len(parts)) for task in range(len(tasks))]
        share = self.workers.share(len(pairs))
        runner: tuple[int, ExactDivergence] | None = None
        for number in share[len(kept.exact) :]:
            self._tell("exact", len(kept.exact), len(share))
            part, task = pairs[number]
            if runner is None or runner[0] != part:
                runner = part, ExactDivergence(model, parts[part])
            site, index = tasks[task]
            kept.exact.append(runner[1].of(site, index))
            kept.save()
        if not pairs:
            return {}
        mine = torch.tensor(kept.exact, dtype=torch.float64)
        means = self.workers.join(mine, len(pairs)).reshape(len(parts), len(tasks)).mean(0)
        return {
            (site.place.name, index): float(mean)
            for (site, index), mean in zip(tasks, means, strict=True)
        }

    def _tell(self, stage: str, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, of)


def _matching(places: list[SitePlace], patterns: Sequence[str]) -> list[SitePlace]:
    """The sites whose name a pattern matches, all without patterns."""
    for pattern in patterns:
        if not any(fnmatchcase(place.name, pattern) for place in places):
            raise InvalidArgumentError(
                f"got sites={pattern!r}, which matches no site{suggest(pattern, _examples(places))}"
            )
    if not patterns:
        return places
    return [p for p in places if any(fnmatchcase(p.name, pattern) for pattern in patterns)]


def _examples(places: Sequence[SitePlace]) -> list[str]:
    """A name of each role."""
    by_role = {place.role: place.name for place in reversed(places)}
    return list(reversed(by_role.values()))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` is differentiated meanwhile."""
    asked = [each for each in model.parameters() if each.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for each in asked:
            each.requires_grad_(True)


class _Kept:
    """What one process has measured, and its file."""

    def __init__(self, options: AnalysisRun, identity: dict[str, str]) -> None:
        self.rows: list[Tensor] = []
        self.exact: list[float] = []
        self.exact_sites = options.exact
        self.threads = options.workers.agree(torch.get_num_threads())
        self.file: Checkpoint | None = None
        if options.checkpoint is None:
            return
        workers = options.workers
        path = options.checkpoint / f"{workers.rank}of{workers.size}.safetensors"
        self.file = Checkpoint(path, {**identity, "measures": " ".join(MEASURES)})
        saved = self.file.load()
        if saved is not None:
            tensors, facts = saved
            self.rows = list(tensors["rows"])
            # Rows serve any number of exact sites; which site an exact value is of depends on it.
            self.exact = tensors["exact"].tolist() if facts["exact"] == self.exact_sites else []
            self.threads = int(facts["threads"])

    def save(self) -> None:
        if self.file is not None:
            exact = torch.tensor(self.exact, dtype=torch.float64)
            state = {"rows": torch.stack(self.rows), "exact": exact}
            self.file.save_if_due(state, {"threads": self.threads, "exact": self.exact_sites})


def _most_sensitive(
    sites: Sequence[Measured], table: Tensor, recipe: Recipe, count: int
) -> list[Measured]:
    """The sites whose own candidate by the recipe, else their first, diverges most."""
    means = table[..., 0].mean(0)
    starts = accumulate([0, *(len(site.choices) for site in sites[:-1])])
    scored = [
        (-float(means[start + _own(site, recipe)]), index)
        for index, (site, start) in enumerate(zip(sites, starts, strict=True))
    ]
    return [sites[index] for _, index in sorted(scored)[:count]]


def _own(site: Measured, recipe: Recipe) -> int:
    module = recipe.for_module(site.place.module, role_of_kind(site.place.kind))
    for index, choice in enumerate(site.choices):
        if choice.spec is not None and choice.spec == module.weights:
            return index
    return 0


def _results(
    sites: Sequence[Measured], table: Tensor, exact: dict[tuple[str, int], float]
) -> list[Site]:
    """The sites with what was measured, averaged over the chunks: powers, not decibels."""
    powers = table[..., 1:3].sum(0)
    found, at = [], 0
    for site in sites:
        candidates = []
        for index, choice in enumerate(site.choices):
            kl, interval = _mean(table[:, at, 0])
            if interval is not None:
                interval = max(0.0, interval[0]), interval[1]
            slope, slopes = _mean(table[:, at, 3]) if _is_itself(choice) else (None, None)
            candidates.append(
                Candidate(
                    label=choice.label,
                    weights=choice.weights,
                    activations=choice.activations,
                    kv_cache=choice.kv_cache,
                    bytes=dict(choice.bytes),
                    sqnr_db=_decibels(powers[at]),
                    kl=kl,
                    kl_interval=interval,
                    exact_kl=exact.get((site.place.name, index)),
                    slope=slope,
                    slope_interval=slopes,
                )
            )
            at += 1
        place = site.place
        found.append(
            Site(
                name=place.name,
                kind=place.kind,
                modules=place.modules,
                layer=place.layer,
                role=place.role,
                shape=place.shape,
                values=place.shape[0] * place.shape[1] if len(place.shape) == 2 else 0,
                agrees=place.agrees,
                candidates=tuple(candidates),
            )
        )
    return found


def _is_itself(choice: Choice) -> bool:
    """Whether the errors measured have the directions of the candidate's own.

    An algorithm that needs calibration is stood in for by another: divergences tell what to expect
    of its errors, slopes do not.
    """
    return choice.spec is None or choice.spec.algorithm not in NEED_STATISTICS


def _mean(values: Tensor) -> tuple[float, tuple[float, float] | None]:
    """The mean over chunks, and 1.96 of its standard errors to either side if there are several."""
    mean = float(values.mean())
    if len(values) == 1:
        return mean, None
    spread = float(values.std()) * 1.96 / len(values) ** 0.5
    return mean, (mean - spread, mean + spread)


def _decibels(powers: Tensor) -> float:
    signal, error = powers.tolist()
    ratio = signal / error if error > 0 else 10 ** (_MOST_DB / 10)
    return min(10 * math.log10(max(ratio, 1e-30)), _MOST_DB)
