"""Allocations against trying every choice, and what is said of budgets that cannot be met."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.calibration.allocated_recipe import allocated_recipe
from edgepass.calibration.allocation import AllocationProblem
from edgepass.calibration.analysis import Analysis, Candidate, Site
from edgepass.calibration.recipe_modules import check_patterns
from edgepass.calibration.recipe_sections import Weights
from edgepass.ops.errors import AllocationError, InvalidArgumentError

LABELS = {
    "int4-g64": Weights(bits=4, granularity="group", group_size=64),
    "int4-g32": Weights(bits=4, granularity="group", group_size=32),
    "int8-channel": Weights(bits=8, granularity="channel"),
}
ROLES = ("q_proj", "k_proj", "v_proj", "up_proj")


def analysis(seed: int, layers: int = 2, slopes: bool = False, **fields) -> Analysis:
    random = np.random.default_rng(seed)
    sites = []
    for layer, role in itertools.product(range(layers), ROLES):
        name = f"model.layers.{layer}.{role}"
        candidates = tuple(
            Candidate(
                label=label,
                weights=weights,
                bytes={"xnnpack": int(size * random.uniform(90, 110))},
                sqnr_db=20.0,
                kl=float(random.uniform(0.5, 2) * 4.0**-size),
                slope=float(random.normal() * 2.0**-size) if slopes else None,
            )
            for size, (label, weights) in enumerate(LABELS.items(), 1)
        )
        sites.append(
            Site(
                name=name,
                kind="weight",
                modules=(name,),
                layer=layer,
                role=role,
                shape=(4, 64),
                values=256,
                candidates=candidates,
                **fields,
            )
        )
    return Analysis(
        model="tiny",
        recipe={"name": "8da4w", "activations": {"kind": "dynamic"}},
        identity={},
        chunks=1,
        chunk_tokens=8,
        seed=0,
        sites=tuple(sites),
    )


def every_choice(found: Analysis):
    for picked in itertools.product(*(site.candidates for site in found.sites)):
        yield sum(c.text_loss for c in picked), sum(c.bytes["xnnpack"] for c in picked)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), part=st.floats(0, 1), slopes=st.booleans())
def test_no_choice_is_better(seed: int, part: float, slopes: bool) -> None:
    found = analysis(seed, slopes=slopes)
    problem = AllocationProblem(found, "xnnpack")
    budget = round(problem.smallest + part * (problem.largest - problem.smallest))
    best = problem.within_bytes(budget)
    wanted = min(kl for kl, size in every_choice(found) if size <= budget)
    assert best.bytes <= budget
    cost = best.loss if slopes else best.kl
    assert cost == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert best.gap < 1e-5
    most = cost + 1e-9 * abs(cost)
    least = problem.within_cost(most)
    assert least.bytes <= best.bytes
    assert (least.loss if slopes else least.kl) <= most + 1e-8 * abs(cost)


def test_the_loss_is_made_least_unless_the_divergence_is_asked_for() -> None:
    found = analysis(5, slopes=True)
    by_loss, by_kl = (
        AllocationProblem(found, "xnnpack"),
        AllocationProblem(found, "xnnpack", (), "kl"),
    )
    budget = (by_loss.smallest + by_loss.largest) // 2
    first, second = by_loss.within_bytes(budget), by_kl.within_bytes(budget)
    assert (first.cost, second.cost) == ("loss", "kl")
    assert first.loss < second.loss
    assert second.kl < first.kl
    assert first.perplexity_increase == pytest.approx(math.expm1(first.loss))
    # A limit of the perplexity is one of what is made least: what is said keeps to it.
    for problem in (by_loss, by_kl):
        most = (problem.least_cost + problem.within_bytes(problem.smallest).kl) / 2
        assert problem.within_cost(most).perplexity_increase <= math.expm1(most)
    assert second.perplexity_increase == pytest.approx(math.expm1(second.kl))
    with pytest.raises(InvalidArgumentError, match="accepted are by='kl'"):
        AllocationProblem(analysis(5), "xnnpack", (), "loss")
    with pytest.raises(InvalidArgumentError, match="accepted are loss, kl"):
        AllocationProblem(found, "xnnpack", (), "x")


@pytest.mark.parametrize(
    ("interval", "counted"),
    [(None, -0.3), ((-0.3, -0.3), -0.3), ((-0.594, -0.006), -0.225), ((-1.0, 0.4), 0.0)],
)
def test_of_a_slope_only_what_its_interval_vouches_for_counts(interval, counted: float) -> None:
    # (-0.594, -0.006): 1.96 standard errors of 0.15 around -0.3, whose square is a quarter noise.
    candidate = analysis(0).sites[0].candidates[0]
    asked = {"slope": -0.3, "slope_interval": interval}
    found = candidate.model_copy(update={**asked, "kl": 0.9})
    assert found.text_loss == pytest.approx(0.9 + counted / 4)
    # No error is worth more than none.
    found = candidate.model_copy(update={**asked, "kl": 0.01})
    assert found.text_loss == pytest.approx(0.0 if counted else 0.01)


def test_tied_sites_agree_where_their_table_is_stored_once() -> None:
    found = analysis(1, agrees="all")
    problem = AllocationProblem(found, "xnnpack")
    assert len(problem.groups) == len(found.sites)
    stored = [
        site.model_copy(
            update={
                "candidates": tuple(
                    c.model_copy(update={"bytes": {"vulkan": c.bytes["xnnpack"]}})
                    for c in site.candidates
                )
            }
        )
        for site in found.sites
    ]
    problem = AllocationProblem(found.model_copy(update={"sites": tuple(stored)}), "vulkan")
    assert len(problem.groups) == 1
    for budget in (problem.smallest, problem.largest):
        labels = {c.label for c in problem.within_bytes(budget).choice.values()}
        assert len(labels) == 1


def test_families_agree_within_a_layer_if_asked() -> None:
    problem = AllocationProblem(analysis(2), "xnnpack", ["qkv"])
    middle = problem.within_bytes((problem.smallest + problem.largest) // 2)
    for layer in range(2):
        names = [f"model.layers.{layer}.{role}" for role in ("q_proj", "k_proj", "v_proj")]
        assert len({middle.choice[name].label for name in names}) == 1
    with pytest.raises(InvalidArgumentError, match="accepted are qkv, gate_up"):
        AllocationProblem(analysis(2), "xnnpack", ["x"])


def test_families_join_what_agrees_already_and_keep_experts_apart() -> None:
    found = analysis(6)
    sites = []
    for site in found.sites:
        # q of layer 0 and of layer 1 are one table, and each layer has two experts.
        name = site.name.replace("up_proj", "experts.0.up_proj")
        sites.append(site.model_copy(update={"name": name, "modules": (name,)}))
        if site.role == "up_proj":
            name = site.name.replace("up_proj", "experts.1.gate_proj")
            sites.append(
                site.model_copy(update={"name": name, "modules": (name,), "role": "gate_proj"})
            )
    sites = [
        s.model_copy(
            update={
                "agrees": "q" if s.role == "q_proj" else None,
                "candidates": tuple(
                    c.model_copy(update={"bytes": {"vulkan": c.bytes["xnnpack"]}})
                    for c in s.candidates
                ),
            }
        )
        for s in sites
    ]
    problem = AllocationProblem(
        found.model_copy(update={"sites": tuple(sites)}), "vulkan", ["qkv", "gate_up"]
    )
    sizes = sorted(len(group.sites) for group in problem.groups)
    assert sizes == [1, 1, 1, 1, 6]


def test_an_impossible_budget_says_the_smallest_possible_one() -> None:
    problem = AllocationProblem(analysis(3), "xnnpack")
    with pytest.raises(AllocationError, match=f"is {problem.smallest} bytes"):
        problem.within_bytes(problem.smallest - 1)
    assert problem.within_bytes(problem.smallest).bytes == problem.smallest
    least = math.expm1(problem.least_cost)
    with pytest.raises(AllocationError, match=f"is {least:.4g}"):
        problem.within_cost(problem.least_cost * 0.9)
    with pytest.raises(AllocationError, match="backend=qnn"):
        AllocationProblem(analysis(3), "qnn")


def test_the_front_falls_and_ends_at_the_ends() -> None:
    problem = AllocationProblem(analysis(4), "xnnpack")
    front = problem.front(9)
    sizes, divergences = [each.bytes for each in front], [each.kl for each in front]
    assert sizes == sorted(set(sizes))
    assert divergences == sorted(divergences, reverse=True)
    assert (sizes[0], divergences[-1]) == (problem.smallest, pytest.approx(problem.least_cost))
    uniform = problem.uniform("int4-g32")
    assert uniform is not None
    assert problem.within_bytes(uniform.bytes).kl <= uniform.kl


@given(seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_recipe_asks_for_what_was_chosen(seed: int) -> None:
    found = analysis(seed)
    problem = AllocationProblem(found, "xnnpack")
    chosen = problem.within_bytes((problem.smallest + problem.largest) // 2)
    recipe = allocated_recipe(found, chosen, "chosen")
    assert recipe.backend == "xnnpack"
    for name, candidate in chosen.choice.items():
        weights = recipe.for_module(name).weights
        assert (weights.bits, weights.granularity) == (
            candidate.weights.bits,
            candidate.weights.granularity,
        )
        assert weights.group_size == candidate.weights.group_size


def test_overrides_that_are_there_stay_unless_they_name_a_site() -> None:
    found = analysis(6)
    asked = [
        {"modules": "*.o_proj", "weights": {"bits": 8, "granularity": "channel"}},
        {"modules": found.sites[0].name, "weights": {"group_size": 128}},
    ]
    found = found.changed(recipe={**found.recipe, "overrides": asked})
    chosen = AllocationProblem(found, "xnnpack").uniform("int8-channel")
    recipe = allocated_recipe(found, chosen, "chosen")
    assert recipe.for_module("model.layers.0.o_proj").weights.bits == 8
    assert recipe.for_module(found.sites[0].name).weights.granularity == "channel"
    check_patterns(recipe, {s.name: "linear" for s in found.sites} | {"x.o_proj": "linear"})


def test_what_was_not_analysed_stays_as_it_is() -> None:
    found = analysis(7).changed(patterns=("model.layers.[01].*",))
    chosen = AllocationProblem(found, "xnnpack").uniform("int8-channel")
    recipe = allocated_recipe(found, chosen, "partial")
    assert recipe.for_module("model.layers.1.q_proj").weights.bits == 8
    assert recipe.for_module("model.layers.7.q_proj").weights.bits == 4
    # A site of the role that another backend alone holds is not chosen for, either.
    first, *others = analysis(7).sites
    elsewhere = tuple(c.changed(bytes={"qnn": 1}) for c in first.candidates)
    found = analysis(7).changed(sites=(first.changed(candidates=elsewhere), *others))
    chosen = AllocationProblem(found, "xnnpack").uniform("int8-channel")
    recipe = allocated_recipe(found, chosen, "held")
    assert recipe.for_module(first.name).weights.bits == 4
    assert recipe.for_module("model.layers.1.q_proj").weights.bits == 8


def test_one_choice_for_all_of_a_role_is_one_pattern() -> None:
    problem = AllocationProblem(analysis(5), "xnnpack")
    uniform = problem.uniform("int8-channel")
    recipe = allocated_recipe(analysis(5), uniform, "wide")
    assert sorted(each.modules for each in recipe.overrides) == sorted(f"*.{r}" for r in ROLES)
