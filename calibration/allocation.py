"""The best choice of a candidate for every site within a budget, with a proof of how near it is.

A mixed-integer program (scipy's HiGHS): one candidate a site, sites that must agree together, the
sum of what they cost least within so many bytes, or the bytes least within so much cost. A site
costs the growth of the text's loss, or the divergence from the float model, as one likes. Both add
up over sites to second order, as long as their errors are uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from edgepass.calibration.analysis import Analysis, Candidate, Site
from edgepass.calibration.recipe_sections import Backend
from edgepass.ops.errors import AllocationError, InvalidArgumentError
from edgepass.ops.native_output import native_output_captured

# What an allocation makes least: the growth of the loss of texts like the analysed one, or the
# divergence of the distributions from the float model's.
Cost = Literal["loss", "kl"]
COSTS: tuple[Cost, ...] = ("loss", "kl")
# Backends that store the table of a tied embedding and head once, so that both must agree.
_ONE_TABLE: tuple[Backend, ...] = ("vulkan", "qnn")
# Modules whose weights a runtime may compute as one: they can be made to agree.
MERGED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "gate_up": ("gate_proj", "up_proj"),
}
# HiGHS stops when the gap between what it has and what can be is below this part.
_RELATIVE_GAP = 1e-6
_TIME_LIMIT_S = 120.0
_ATTEMPTS = 5
# The budget in the solver's units: its tolerance of 1e-6 is then below a byte in a gigabyte.
_LIMIT = 1e3


@dataclass(frozen=True)
class Option:
    """One choice for the sites of a group: the candidate of each, what they cost, and bytes."""

    candidates: tuple[int, ...]
    cost: float
    bytes: int


@dataclass(frozen=True)
class Group:
    """Sites that take the same candidate, and the options that are worth choosing."""

    sites: tuple[Site, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """A candidate for each site that stores weights, by its name.

    ``cost``: what was made least. ``kl``: the summed divergence, nats a token, and ``loss`` the
    summed growth of the text's loss, None if the analysis has no slopes. ``bytes``: of the packed
    weights. ``values``: how many numbers they hold. ``gap``: by how much, as a part of it, the
    optimum may be better.
    """

    backend: Backend
    choice: dict[str, Candidate]
    cost: Cost
    kl: float
    loss: float | None
    bytes: int
    values: int
    gap: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.values

    @property
    def perplexity_increase(self) -> float:
        """The part by which the perplexity grows, if it grows by what was made least."""
        return math.expm1(self.kl if self.loss is None or self.cost == "kl" else self.loss)


class AllocationProblem:
    """The sites of an analysis that store weights on a backend, ready to be allocated."""

    def __init__(
        self,
        analysis: Analysis,
        backend: Backend,
        same: Iterable[str] = (),
        by: Cost | None = None,
    ) -> None:
        """``same`` names families of MERGED modules of one layer that must agree, too. ``by`` is
        what allocations make least: by default the loss, or the divergence without slopes.

        Raises InvalidArgumentError for an unknown family or for ``loss`` without slopes,
        AllocationError if no site has a candidate that the backend holds.
        """
        self.backend = backend
        families = _families(same)
        sites = [s for s in analysis.sites if _stores(s, backend)]
        if not sites:
            raise AllocationError(
                f"nothing to allocate: got an analysis without candidates for backend={backend}, "
                "accepted are analyses of a recipe that the backend holds"
            )
        self.sloped = all(c.slope is not None for site in sites for c in site.candidates)
        self.cost = _chosen_cost(by, self.sloped)
        groups = _agreeing(sites, families, backend in _ONE_TABLE)
        self.groups = [_group(each, backend, self.cost) for each in groups]
        self.values = sum(site.values for site in sites)

    @property
    def smallest(self) -> int:
        """The least bytes that any choice takes."""
        return sum(min(o.bytes for o in g.options) for g in self.groups)

    @property
    def largest(self) -> int:
        """The bytes of the choice of least cost."""
        return sum(min(g.options, key=lambda o: (o.cost, o.bytes)).bytes for g in self.groups)

    @property
    def least_cost(self) -> float:
        """The least cost that any choice has."""
        return sum(min(o.cost for o in g.options) for g in self.groups)

    def within_bytes(self, budget: int) -> Allocation:
        """The choice of least cost in ``budget`` bytes.

        Raises AllocationError, with the smallest possible budget, if there is none.
        """
        if budget < self.smallest:
            raise AllocationError(
                f"budget too small: got {budget} bytes ({_said(budget, self.values)}), the "
                f"smallest possible for backend={self.backend} is {self.smallest} bytes "
                f"({_said(self.smallest, self.values)})"
            )
        return self._solve(lambda o: o.cost, lambda o: o.bytes, budget)

    def within_cost(self, most: float) -> Allocation:
        """The choice of least bytes whose cost is at most ``most``.

        Raises AllocationError, with the least possible cost as a perplexity, if there is none.
        """
        if most < self.least_cost:
            raise AllocationError(
                f"budget too small: got a perplexity increase of {math.expm1(most):.4g}, the "
                f"smallest possible for backend={self.backend} is {math.expm1(self.least_cost):.4g}"
            )
        return self._solve(lambda o: o.bytes, lambda o: o.cost, most)

    def uniform(self, label: str) -> Allocation | None:
        """Every site by the candidate of that label, None if one has no such candidate."""
        chosen = []
        for group in self.groups:
            first = group.sites[0]
            found = [
                o
                for o in _all_options(group.sites, self.backend, self.cost)
                if first.candidates[o.candidates[0]].label == label
            ]
            if not found:
                return None
            chosen.append(found[0])
        return self.allocation(chosen, 0.0)

    def front(self, points: int = 24) -> list[Allocation]:
        """Best choices from the smallest to the largest bytes, each with its gap."""
        budgets = np.linspace(self.smallest, self.largest, points).round().astype(int)
        found: list[Allocation] = []
        for budget in budgets:
            each = self.within_bytes(int(budget))
            if not found or each.bytes > found[-1].bytes:
                found.append(each)
        return found

    def _solve(
        self, cost: Callable[[Option], float], weight: Callable[[Option], float], most: float
    ) -> Allocation:
        limit, bound = most, -math.inf
        for _ in range(_ATTEMPTS):
            chosen, found = self._milp(cost, weight, limit)
            # A tighter limit can only cost more: the first bound, of the limit itself, counts.
            bound = found if bound == -math.inf else bound
            over = sum(map(weight, chosen)) - most
            if over <= 0:
                break
            limit -= 2 * over  # the solver keeps limits to a tolerance only
        else:
            raise AllocationError(
                f"not solved: got a choice over the limit in {_ATTEMPTS} attempts, accepted are "
                "budgets further from the smallest"
            )
        total = sum(map(cost, chosen))
        gap = max(0.0, (total - bound) / total) if total > 0 else 0.0
        return self.allocation(chosen, gap)

    def _milp(
        self, cost: Callable[[Option], float], weight: Callable[[Option], float], limit: float
    ) -> tuple[list[Option], float]:
        """The solver's choice, and the least cost that it proved any choice to have."""
        options = [o for group in self.groups for o in group.options]
        costs = np.array([cost(o) for o in options], dtype=float)
        weights = np.array([weight(o) for o in options], dtype=float)
        sizes = [len(group.options) for group in self.groups]
        owner = np.repeat(np.arange(len(sizes)), sizes)
        one = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
        scale = costs.sum() / len(sizes) or 1.0  # numbers near 1, for the solver's tolerances
        part = max(limit, 1e-300) / _LIMIT
        with native_output_captured():  # HiGHS prints what it notices
            result = milp(
                costs / scale,
                constraints=[
                    LinearConstraint(one, 1, 1),
                    LinearConstraint((weights / part)[None], -np.inf, _LIMIT),
                ],
                bounds=Bounds(0, 1),
                integrality=np.ones(len(options)),
                options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _TIME_LIMIT_S},
            )
        if result.x is None:
            raise AllocationError(
                f"not solved ({result.message}): got {len(sizes)} sites and {len(options)} "
                "candidates, accepted are fewer, or a budget further from the smallest"
            )
        starts = np.cumsum([0, *sizes[:-1]])
        chosen = [
            group.options[int(np.argmax(result.x[start : start + len(group.options)]))]
            for group, start in zip(self.groups, starts, strict=True)
        ]
        return chosen, float(result.mip_dual_bound) * scale

    def allocation(self, chosen: Sequence[Option], gap: float) -> Allocation:
        """What a choice of one option a group comes to."""
        choice = {
            site.name: site.candidates[index]
            for group, option in zip(self.groups, chosen, strict=True)
            for site, index in zip(group.sites, option.candidates, strict=True)
        }
        return Allocation(
            self.backend,
            choice,
            self.cost,
            sum(c.best_kl for c in choice.values()),
            sum(c.text_loss for c in choice.values()) if self.sloped else None,
            sum(o.bytes for o in chosen),
            self.values,
            gap,
        )


def _chosen_cost(cost: Cost | None, sloped: bool) -> Cost:
    if cost not in (None, *COSTS):
        raise InvalidArgumentError(f"got by={cost!r}, accepted are {', '.join(COSTS)}")
    if cost == "loss" and not sloped:
        raise InvalidArgumentError(
            "got by='loss' for an analysis without the loss's slopes; accepted are by='kl' and "
            "an analysis that has them"
        )
    return cost or ("loss" if sloped else "kl")


def _said(size: int, values: int) -> str:
    return f"{size / 1e6:.2f} MB, {8 * size / values:.3f} bits a weight"


def _stores(site: Site, backend: Backend) -> bool:
    """Whether a site stores weights there, in a way that an allocation may choose."""
    return site.kind in ("weight", "embedding", "head") and any(
        backend in candidate.bytes for candidate in site.candidates
    )


def _families(same: Iterable[str]) -> dict[str, str]:
    """By role of a module the family that it must agree with."""
    roles: dict[str, str] = {}
    for family in same:
        if family not in MERGED:
            raise InvalidArgumentError(
                f"unknown family: got same={family!r}, accepted are {', '.join(MERGED)}"
            )
        roles |= dict.fromkeys(MERGED[family], family)
    return roles


def _agreeing(sites: Sequence[Site], families: dict[str, str], one_table: bool) -> list[list[Site]]:
    """The sites by what must take one candidate: what shares a table, and families of a module."""
    nodes: dict[object, int] = {}
    edges: list[tuple[int, int]] = []
    for index, site in enumerate(sites):
        reasons: list[object] = [site.agrees] if site.agrees and one_table else []
        if site.role in families:
            reasons.append((site.modules[0].rpartition(".")[0], families[site.role]))
        edges += [(index, len(sites) + nodes.setdefault(each, len(nodes))) for each in reasons]
    size = len(sites) + len(nodes)
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    graph = csr_array((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    groups: dict[int, list[Site]] = {}
    for site, component in zip(sites, connected_components(graph, directed=False)[1], strict=False):
        groups.setdefault(component, []).append(site)
    return list(groups.values())


def _group(sites: Sequence[Site], backend: Backend, cost: Cost) -> Group:
    options = _all_options(sites, backend, cost)
    if not options:
        raise AllocationError(
            f"{', '.join(s.name for s in sites)} must agree, but got no candidate that all have on "
            f"backend={backend}"
        )
    return Group(tuple(sites), tuple(_worthwhile(options)))


def _all_options(sites: Sequence[Site], backend: Backend, cost: Cost) -> list[Option]:
    """The candidates that every one of ``sites`` has on the backend, by their labels."""
    held = [
        {c.label: i for i, c in enumerate(site.candidates) if backend in c.bytes} for site in sites
    ]
    options = []
    for label in held[0]:
        if all(label in each for each in held):
            places = tuple(each[label] for each in held)
            taken = [s.candidates[i] for s, i in zip(sites, places, strict=True)]
            each = sum(c.best_kl if cost == "kl" else c.text_loss for c in taken)
            options.append(Option(places, each, sum(c.bytes[backend] for c in taken)))
    return options


def _worthwhile(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both cost and bytes, the smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept
