"""The public functions that find where the bits should go: ``analyze`` and ``allocate``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from edgepass.calibration.allocation import Allocation, AllocationProblem, Cost
from edgepass.calibration.analysis import Analysis, read_analysis
from edgepass.calibration.analyze import AnalysisRun
from edgepass.calibration.recipe import Recipe, Role
from edgepass.calibration.recipe_file import AnyRecipe, find_recipe
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.calibration.recipe_sections import BACKENDS, Backend
from edgepass.lowering.recipe_rules import RULES
from edgepass.ops.errors import InvalidArgumentError


def analyze(
    model: Any,
    recipe: AnyRecipe,
    chunks: Tensor,
    *,
    exact: int = 0,
    seed: int = 0,
    sites: Sequence[str] = (),
    name: str = "model",
    layers: int | None = None,
    checkpoint: Path | None = None,
    progress: Callable[..., None] | None = None,
    log: Callable[[str], None] | None = None,
) -> Analysis:
    """Measure how much quantizing each site of a float decoder alone changes its logits.

    ``model``: a ``transformers`` causal language model. ``recipe``: what the candidates are taken
    from, and what an allocation leaves as it is. ``chunks``: token ids int64 ``[C, T]``. ``exact``:
    of so many of the most sensitive sites the divergence is computed by running the model, too.
    ``sites``: only those whose name one of these patterns matches.
    The other arguments are those of :class:`edgepass.calibration.analyze.AnalysisRun`.

    Raises InvalidArgumentError for a recipe that no backend holds or that does not fit the model,
    CalibrationError for values that are not finite or a foreign checkpoint.
    """
    chosen = find_recipe(recipe)
    if exact < 0:
        raise InvalidArgumentError(f"got exact={exact}, accepted are 0 and more")
    run = AnalysisRun(
        backends_of(chosen), holds, exact, seed, tuple(sites), checkpoint, progress, log
    )
    return run.run(model, chosen, chunks, name=name, layers=layers)


def allocate(
    analysis: Analysis | str | os.PathLike[str],
    *,
    backend: str | None = None,
    target_mb: float | None = None,
    target_bpw: float | None = None,
    max_perplexity_increase: float | None = None,
    same: Sequence[str] = (),
    by: Cost | None = None,
) -> Allocation:
    """Choose a candidate for every site that stores weights: the best within one budget.

    The budget is one of: ``target_mb`` (10**6 bytes of packed weights), ``target_bpw`` (bits a
    weight, scales and padding included) and ``max_perplexity_increase`` (as a part: 0.05 is 5 %),
    which is met at the smallest size. ``backend``: whose bytes and candidates, needed if several
    hold the recipe. ``same``: ``qkv`` and ``gate_up`` make these agree within a layer. ``by``: what
    is made least, the growth of the text's ``loss`` (the default) or the divergence ``kl``.

    Raises InvalidArgumentError for another number of budgets, AllocationError (with the smallest
    possible budget) for one that no choice keeps to.
    """
    found = analysis if isinstance(analysis, Analysis) else read_analysis(analysis)
    problem = AllocationProblem(found, choose_backend(found, backend), same, by)
    return allocate_within(
        problem,
        target_mb=target_mb,
        target_bpw=target_bpw,
        max_perplexity_increase=max_perplexity_increase,
    )


def allocate_within(problem: AllocationProblem, **budgets: float | None) -> Allocation:
    """The best choice within the one of ``budgets`` that is given, as :func:`allocate` names them.

    Raises what :func:`allocate` raises.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise InvalidArgumentError(
            f"one budget: got {', '.join(given) or 'none'}, accepted is one of {', '.join(budgets)}"
        )
    ((name, value),) = given.items()
    if not (math.isfinite(value) and value > 0):
        raise InvalidArgumentError(f"got {name}={value}, accepted are finite numbers above 0")
    if name == "target_mb":
        return problem.within_bytes(int(value * 1e6))
    if name == "target_bpw":
        return problem.within_bytes(int(value * problem.values / 8))
    return problem.within_cost(math.log1p(value))


def choose_backend(analysis: Analysis, backend: str | None) -> Backend:
    """The backend that is meant: the given one, else the only one that holds the recipe."""
    held = backends_of(Recipe.model_validate(analysis.recipe))
    if backend is None and len(held) == 1:
        return held[0]
    for each in held:
        if each == backend:
            return each
    raise InvalidArgumentError(f"got backend={backend}, accepted are {', '.join(held)}")


def backends_of(recipe: Recipe) -> tuple[Backend, ...]:
    """The backends that hold what a recipe gives linears.

    Raises InvalidArgumentError if there is none.
    """
    held = tuple(
        backend
        for backend in BACKENDS
        if recipe.backend in (None, backend) and holds(backend, recipe.for_module(""), "linear")
    )
    if not held:
        raise InvalidArgumentError(
            f"got recipe={recipe.name}, which no backend holds; accepted are those of "
            "`edgepass recipes list` with a backend"
        )
    return held


def holds(backend: Backend, module: ModuleRecipe, role: Role) -> bool:
    """Whether a backend computes what a module gets, and not in float."""
    return not any(RULES[backend](module, role))
