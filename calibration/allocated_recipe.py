"""An allocation as a recipe of edgepass, with as few overrides as say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from edgepass.calibration.allocation import Allocation
from edgepass.calibration.analysis import Analysis, Site
from edgepass.calibration.candidates import role_of_kind
from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_sections import Override, Weights


def allocated_recipe(analysis: Analysis, allocation: Allocation, name: str) -> Recipe:
    """The analysed recipe, for one backend, with an override for whatever is chosen otherwise.

    Modules of one role that all get the same share a pattern.
    """
    sites = [site for site in analysis.sites if site.name in allocation.choice]
    base = _without_weights_of(Recipe.model_validate(analysis.recipe), sites)
    wanted = {site.name: _section(allocation, site) for site in sites}
    by_role: dict[str, list[Site]] = {}
    for site in sites:
        if wanted[site.name] != _resolved(base, site):
            by_role.setdefault(site.role, []).append(site)
    # A pattern of ours might not be narrower than one that is there already: names always are.
    patterns = not any(each.weights.model_fields_set for each in base.overrides)
    # Nor may it match what was not analysed, or is not chosen for.
    patterns = patterns and not analysis.patterns
    weights = [site for site in analysis.sites if site.kind in ("weight", "embedding", "head")]
    overrides: list[Override] = []
    for role, changed in by_role.items():
        overrides += _overrides(role, changed, weights if patterns else (), wanted)
    return base.changed(
        name=name, backend=allocation.backend, overrides=(*base.overrides, *overrides)
    )


def _without_weights_of(recipe: Recipe, sites: Sequence[Site]) -> Recipe:
    """The recipe without what its overrides ask of the weights of single ``sites``."""
    names = {path for site in sites for path in site.modules}
    kept = []
    for each in recipe.overrides:
        if each.modules in names:
            asked = each.model_dump(exclude={"modules", "weights"}, exclude_defaults=True)
            if not asked:
                continue
            each = Override.model_validate({**asked, "modules": each.modules})
        kept.append(each)
    return recipe.changed(overrides=tuple(kept))


def _overrides(
    role: str, changed: Sequence[Site], sites: Sequence[Site], wanted: Mapping[str, Weights]
) -> list[Override]:
    """Overrides for ``changed``: one pattern if it fits all of ``sites`` that it matches."""
    pattern = f"*.{role}"
    matched = [site for site in sites if fnmatchcase(site.modules[0], pattern)]
    same = len({wanted[site.name].model_dump_json() for site in changed}) == 1
    names = {site.name for site in changed}
    if same and len(matched) > 1 and {site.name for site in matched} == names:
        return [Override(modules=pattern, weights=wanted[changed[0].name])]
    return [Override(modules=site.modules[0], weights=wanted[site.name]) for site in changed]


def _section(allocation: Allocation, site: Site) -> Weights:
    weights = allocation.choice[site.name].weights
    assert weights is not None, "only sites that store weights are allocated"
    return weights


def _resolved(base: Recipe, site: Site) -> Weights:
    """What the analysed recipe gives a site already, in the form of a candidate's section."""
    spec = base.for_module(site.modules[0], role_of_kind(site.kind)).weights
    fields: dict[str, object] = {"bits": spec.bits, "granularity": spec.granularity}
    if spec.group_size is not None:
        fields[f"{spec.granularity}_size"] = spec.group_size
    return Weights.model_validate(fields)
