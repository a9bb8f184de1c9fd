"""The cheap score of every site against running the model with that site quantized."""

import gc
import itertools
import weakref

import pytest
import torch
from scipy.stats import spearmanr

from edgepass.calibration.candidates import choices_of
from edgepass.calibration.exact_divergence import ExactDivergence
from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.rounding_error import rounding_of, weight_error
from edgepass.calibration.sensitivity import (
    SensitivityProbe,
    fisher_direction,
    prepare_sites,
)
from edgepass.calibration.sites import find_sites
from edgepass.ops.errors import CalibrationError
from tests.models.tiny_models import tiny_model

CHUNKS = torch.randint(0, 96, (6, 64), generator=torch.Generator().manual_seed(5))


def measured(family: str = "llama", recipe: str = "8da4w"):
    model = tiny_model(family, seed=1)
    chosen = find_recipe(recipe)
    plan = {
        s: choices_of(s, chosen, ("xnnpack", "qnn"), lambda *_: True) for s in find_sites(model)
    }
    return model, prepare_sites(model, plan)


def test_the_direction_has_the_covariance_of_the_fisher_information() -> None:
    p = torch.softmax(torch.randn(6, dtype=torch.float64, generator=torch.manual_seed(0)), 0)
    found = torch.zeros(6, 6, dtype=torch.float64)
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        v = fisher_direction(p[None], torch.tensor([signs], dtype=torch.float64))[0]
        found += torch.outer(v, v) / 2**6
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_the_score_ranks_sites_as_running_the_model_does(family: str) -> None:
    model, sites = measured(family)
    probe = SensitivityProbe(model, sites, seed=0)
    table = torch.stack([probe.run(c, i) for i, c in enumerate(CHUNKS)])[..., 0].mean(0)
    runs = [ExactDivergence(model, c) for c in CHUNKS]
    cheap, exact, at = [], [], 0
    for site in sites:
        # Four bits of weights, eight of values: errors large enough to stand above float32's.
        cheap.append(float(table[at]))
        exact.append(sum(run.of(site, 0) for run in runs) / len(runs))
        at += len(site.choices)
    assert spearmanr(cheap, exact).statistic >= 0.9
    # To second order only: the embedding of a random model of 96 tokens is beyond it.
    ratios = sorted(one / other for one, other in zip(cheap, exact, strict=True))
    assert 0.8 < ratios[len(ratios) // 2] < 1.25


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_slope_is_how_the_loss_changes_with_a_small_part_of_the_error(family: str) -> None:
    model, sites = measured(family)
    found = SensitivityProbe(model, sites, seed=0).run(CHUNKS[0], 0)[:, 3]
    exact = model.double()

    def loss() -> float:
        logits = exact(CHUNKS[0][None]).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[:-1], CHUNKS[0][1:]))

    at, part, seen = 0, 2e-2, 0
    for site in sites:
        if site.place.kind in ("weight", "embedding", "head") and site.place.layer != 0:
            module = exact.get_submodule(site.place.module)
            before = module.weight
            for index, rounded in enumerate(site.rounded[:2]):
                error = weight_error(rounded, before.float()).double()
                ends = []
                for sign in (part, -part):
                    # Of a tied table this module's part alone.
                    module.weight = torch.nn.Parameter(before + sign * error, requires_grad=False)
                    ends.append(loss())
                module.weight = before
                wanted = (ends[0] - ends[1]) / (2 * part)
                assert float(found[at + index]) == pytest.approx(wanted, rel=2e-2, abs=1e-5)
                seen += abs(wanted) > 1e-3
        at += len(site.choices)
    assert seen > 8


def test_the_slopes_of_values_are_those_of_their_rounding() -> None:
    model, sites = measured()
    found = SensitivityProbe(model, sites, seed=0).run(CHUNKS[0], 0)[:, 3]
    at = 0
    for site in sites:
        if site.place.kind == "activation" and site.place.layer == 1:
            rounding = site.roundings[0]
            ends = []
            for sign in (1.0, -1.0):

                def move(_, args, sign=sign, rounding=rounding):
                    return (args[0] + 1e-1 * sign * (rounding(args[0]) - args[0]),)

                modules = [model.get_submodule(path) for path in site.place.modules]
                hooks = [module.register_forward_pre_hook(move) for module in modules]
                logits = model(CHUNKS[0][None]).logits[0].double()
                ends.append(torch.nn.functional.cross_entropy(logits[:-1], CHUNKS[0][1:]).item())
                for hook in hooks:
                    hook.remove()
            wanted = (ends[0] - ends[1]) / 2e-1
            assert float(found[at]) == pytest.approx(wanted, rel=0.05, abs=2e-6)
        at += len(site.choices)


def test_the_head_is_not_estimated() -> None:
    model, sites = measured()
    table, head = [s for s in sites if s.place.kind in ("embedding", "head")]
    found = SensitivityProbe(model, [table, head], seed=0).run(CHUNKS[0], 0)
    found = found[len(table.choices) :]
    hidden: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    known = model(CHUNKS[0][None]).logits[0].double()
    hook.remove()
    for index, rounded in enumerate(head.rounded):
        changed = model.lm_head.weight + weight_error(rounded, model.lm_head.weight)
        other = hidden[0].double() @ changed.double().t()
        kl = torch.nn.functional.kl_div(
            other.log_softmax(-1), known.log_softmax(-1), log_target=True, reduction="none"
        )
        wanted = float(kl.sum(-1)[::4].mean())
        assert float(found[index, 0]) == pytest.approx(wanted, rel=1e-2, abs=1e-9)


def test_the_exact_divergence_leaves_the_model_as_it_was() -> None:
    model, sites = measured()
    before = model(CHUNKS[0][None]).logits
    run = ExactDivergence(model, CHUNKS[0])
    by_name = {site.place.name: site for site in sites}
    down = by_name["model.layers.1.mlp.down_proj"]
    found = run.of(down, 0)
    for site in sites:
        run.of(site, 0)
    assert torch.equal(model(CHUNKS[0][None]).logits, before)
    module = model.model.layers[1].mlp.down_proj
    module.weight = torch.nn.Parameter(down.rounded[0].dequantize())
    other = model(CHUNKS[0][None]).logits[0].log_softmax(-1)
    known = before[0].log_softmax(-1)
    assert found == pytest.approx(float((known.exp() * (known - other)).sum(-1).mean()), rel=1e-3)


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    model, sites = measured()
    first, second, other = (SensitivityProbe(model, sites, s).run(CHUNKS[0], 3) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_chunk_leaves_nothing_behind() -> None:
    model, sites = measured()
    seen: list[weakref.ref] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, args, out: seen.append(weakref.ref(out)) if torch.is_tensor(out) else None
        )
    SensitivityProbe(model, sites, 0).run(CHUNKS[0], 0)
    gc.collect()
    assert len(seen) > 20
    assert not any(each() is not None for each in seen)


def test_a_value_that_is_not_finite_names_its_place() -> None:
    model, sites = measured()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    name = r"not finite: .* in model\.layers\.1\.mlp\.up_proj during"
    with pytest.raises(CalibrationError, match=name):
        SensitivityProbe(model, sites, 0).run(CHUNKS[0], 0)


def test_a_site_that_no_token_reaches_is_named() -> None:
    model, sites = measured()
    layer = model.model.layers[1]
    layer.forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(CalibrationError, match=r"no data: got no value of model\.layers\.1"):
        SensitivityProbe(model, sites, 0).run(CHUNKS[0], 0)


def test_a_module_that_is_called_twice_is_refused() -> None:
    model, sites = measured()
    mlp = model.model.layers[0].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + once(x)
    with pytest.raises(CalibrationError, match=r"computed twice: got model\.layers\.0\.mlp"):
        SensitivityProbe(model, sites, 0).run(CHUNKS[0], 0)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_roundings_are_within_half_a_step(bits: int, kind: str) -> None:
    value = torch.randn(5, 7, 32, generator=torch.manual_seed(1)) + 0.5
    error = (rounding_of(bits, kind)(value) - value).abs()
    whole = value.amax(-1, keepdim=True).clamp(min=0) - value.amin(-1, keepdim=True).clamp(max=0)
    steps = (whole if kind == "dynamic" else value.max() - value.min()) / (2**bits - 1)
    # The zero point is rounded, too, so that the ends may lie half a step further out.
    assert bool((error <= 1.01 * steps).all())
    assert float(error.mean()) > 0
