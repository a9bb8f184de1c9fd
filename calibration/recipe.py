"""A recipe: how a model is quantized, for every backend."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from edgepass.calibration.recipe_observers import MinMax, Observer
from edgepass.calibration.recipe_resolution import (
    Algorithm,
    ModuleRecipe,
    resolve_activations,
    resolve_weights,
)
from edgepass.calibration.recipe_section import Section, suggest
from edgepass.calibration.recipe_sections import (
    Activations,
    Backend,
    Head,
    KvCache,
    Override,
    Weights,
)
from edgepass.ops.errors import InvalidArgumentError

Role = Literal["linear", "embedding", "head"]


class Recipe(Section):
    """Defaults, then what embedding, head and single modules get instead.

    Later sections win, field by field: ``weights`` and ``activations``, then ``embedding`` or
    ``head``, then ``overrides`` in their order; an observer is replaced whole. ``backend``: the
    only one that the recipe is for. ``qat``: for quantization-aware training, by a function of the
    user's.
    """

    name: Annotated[str, Field(min_length=1)]
    backend: Backend | None = None
    weights: Weights = Weights()
    activations: Activations = Activations()
    embedding: Weights = Weights()
    head: Head = Head()
    kv_cache: KvCache = KvCache()
    observer: Observer = MinMax(kind="min_max")
    rotation: Literal["none", "spinquant"] = "none"
    qat: bool = False
    # A file gives a list, which strict mode alone would refuse.
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _resolve_each_section(self) -> Recipe:
        """Refuse sections that do not go together where they are written, not when they are met."""
        places: list[tuple[str, Role, tuple[Override, ...]]] = [("weights", "linear", ())]
        places += [("embedding", "embedding", ()), ("head", "head", ())]
        places += [(f"overrides.{i}", "linear", (o,)) for i, o in enumerate(self.overrides)]
        for place, role, overrides in places:
            try:
                self._resolve(role, overrides)
            except InvalidArgumentError as error:
                raise ValueError(f"{place}: {error}") from error
        return self

    def for_module(self, name: str, role: Role = "linear") -> ModuleRecipe:
        """What the module of path ``name`` gets; ``role`` tells the embedding and the head apart.

        Raises InvalidArgumentError if the overrides that match it do not go together.
        """
        return self._resolve(role, self.matching(name))

    def matching(self, name: str) -> tuple[Override, ...]:
        """The overrides whose pattern matches the path ``name``, in their order."""
        return tuple(each for each in self.overrides if fnmatchcase(name, each.modules))

    @property
    def kv_bits(self) -> int | None:
        """Bits of the KV cache; None for float."""
        return self.kv_cache.bits if isinstance(self.kv_cache.bits, int) else None

    def with_group_size(self, group_size: int) -> Recipe:
        """The recipe with another group size by default; what overrides ask for stays.

        Raises InvalidArgumentError if its weights are not quantized by groups, or for a size below
        2.
        """
        if group_size < 2:
            raise InvalidArgumentError(f"got group_size={group_size}, accepted are 2 and more")
        granularity = self.for_module("").weights.granularity
        if granularity != "group":
            raise InvalidArgumentError(
                f"got group_size={group_size} for recipe={self.name}, whose weights have one scale "
                f"a {granularity}; accepted are recipes by groups, such as 8da4w"
            )
        return self.changed(weights=self.weights.changed(group_size=group_size))

    def with_algorithm(self, algorithm: str) -> Recipe:
        """The recipe with another weight algorithm by default; what overrides ask for stays.

        Raises InvalidArgumentError for an unknown one.
        """
        accepted = get_args(Algorithm)
        if algorithm not in accepted:
            raise InvalidArgumentError(
                f"got weight_algorithm={algorithm!r}{suggest(algorithm, accepted)}"
            )
        return self.changed(weights=self.weights.changed(algorithm=algorithm))

    def algorithms(self) -> set[str]:
        """Every weight algorithm that some module may get."""
        places: list[tuple[Role, tuple[Override, ...]]] = [("linear", ()), ("head", ())]
        places += [("embedding", ()), *(("linear", (each,)) for each in self.overrides)]
        return {self._resolve(*place).weights.algorithm for place in places}

    def asked(self) -> dict[str, Any]:
        """What the recipe asks for, as plain values without defaults: what its file holds."""
        return self.model_dump(exclude_defaults=True, mode="json")

    def _resolve(self, role: Role, overrides: tuple[Override, ...]) -> ModuleRecipe:
        weights, activations = [self.weights], [self.activations]
        observer = self.observer
        if role == "embedding":
            weights.append(self.embedding)
            activations = []
        heads = (self.head,) if role == "head" else ()
        for section in (*heads, *overrides):
            weights.append(section.weights)
            activations += [] if role == "embedding" else [section.activations]
            observer = section.observer or observer
        return ModuleRecipe(resolve_weights(weights), resolve_activations(activations), observer)
