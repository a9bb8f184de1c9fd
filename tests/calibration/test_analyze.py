"""An analysis as a whole: its sites, resuming it, sharing it out, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgepass.calibration.allocation import AllocationProblem
from edgepass.calibration.analysis import format_analysis
from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.sites import find_sites
from edgepass.ops.errors import CalibrationError, InvalidArgumentError
from tests.calibration.analysis_worker import CHUNKS, analysed
from tests.models.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    return analysed()


def test_every_part_of_a_decoder_is_a_site() -> None:
    sites = find_sites(tiny_model())
    kinds = [site.kind for site in sites]
    assert (kinds.count("embedding"), kinds.count("head")) == (1, 1)
    assert kinds.count("weight") == 2 * 7
    # What Q, K and V read is one value, and so is what gate and up read; the head reads one.
    assert kinds.count("activation") == 2 * 4 + 1
    assert (kinds.count("attention"), kinds.count("kv_cache")) == (2 * 2, 2 * 2)
    by_name = {site.name: site for site in sites}
    assert len(by_name) == len(sites)
    layer = "model.layers.1.self_attn"
    assert by_name[f"{layer}.q_proj:input"].modules == tuple(f"{layer}.{n}_proj" for n in "qkv")
    assert {s.agrees for s in sites if s.kind == "kv_cache"} == {"caches"}


def test_tied_tables_agree() -> None:
    sites = find_sites(tiny_model(tie_word_embeddings=True))
    assert {s.agrees for s in sites if s.kind in ("embedding", "head")} == {"tied table"}


def test_each_candidate_has_its_figures(found) -> None:
    for site in found.sites:
        for candidate in site.candidates:
            low, high = candidate.kl_interval
            assert 0 <= low <= candidate.kl <= high
        if site.kind == "weight":
            fine, coarse = site.candidates[-1], site.candidates[0]
            assert fine.label == "int8-channel"
            assert fine.kl < coarse.kl
            assert fine.sqnr_db > coarse.sqnr_db + 12
            assert fine.bytes["xnnpack"] > coarse.bytes["xnnpack"]
    exact = [s.name for s in found.sites if s.candidates[0].exact_kl is not None]
    assert len(exact) == 2


def test_an_interrupted_analysis_goes_on_and_ends_alike(found, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    for stage, at in (("analyze", 2), ("analyze", 4), ("exact", 3)):

        def progress(now: str, done: int, total: int, stage=stage, at=at) -> None:
            if (now, done) == (stage, at):
                raise Stop

        with pytest.raises(Stop):
            analysed(checkpoint=tmp_path / "state", progress=progress)
    with pytest.raises(Stop):  # another number of exact sites: the rows serve, exact values do not
        analysed(checkpoint=tmp_path / "state", progress=progress, exact=1)
    told: list[str] = []
    again = analysed(told.append, checkpoint=tmp_path / "state")
    assert format_analysis(again) == format_analysis(found)
    assert "from a checkpoint" in told[0]
    with pytest.raises(CalibrationError, match=r"checkpoint of another .* \(model="):
        analysed(checkpoint=tmp_path / "state", model=tiny_model(seed=7))
    with pytest.raises(CalibrationError, match=r"\(seed="):
        analysed(checkpoint=tmp_path / "state", seed=3)


def test_two_processes_find_what_one_finds(found, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("analysis_worker.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(worker), str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, count in ((0, 3), (1, 2)):
        assert (tmp_path / f"{rank}.json").read_text() == format_analysis(found)
        log = (tmp_path / f"{rank}.log").read_text()
        assert log.startswith(f"rank {rank} of 2: measured {count} of {len(CHUNKS)} chunks")


def test_only_some_sites_are_measured_as_among_all(found) -> None:
    some = analysed(patterns=("*.1.mlp.down_proj", "*:keys"))
    names = [site.name for site in some.sites]
    assert names == [
        *(f"model.layers.{layer}.self_attn:keys" for layer in (0, 1)),
        "model.layers.1.mlp.down_proj",
    ]
    all_of_them = {site.name: site for site in found.sites}
    for site in some.sites:
        for one, other in zip(site.candidates, all_of_them[site.name].candidates, strict=True):
            assert one.kl == pytest.approx(other.kl, rel=1e-5, abs=1e-12)
    with pytest.raises(InvalidArgumentError, match="sites='x', which matches no site"):
        analysed(patterns=("x",))


def test_what_stands_in_for_another_algorithm_has_no_slope() -> None:
    found = analysed(recipe=find_recipe("8da4w").with_algorithm("gptq"))
    stored = [site for site in found.sites if site.values]
    assert all(c.slope is None and c.slope_interval is None for s in stored for c in s.candidates)
    assert all(c.slope is not None for s in found.sites if not s.values for c in s.candidates)
    assert AllocationProblem(found, "xnnpack").cost == "kl"


def test_the_model_keeps_its_gradients() -> None:
    model = tiny_model()
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)
    before = [each.requires_grad for each in model.parameters()]
    analysed(model=model)
    assert [each.requires_grad for each in model.parameters()] == before


def test_values_that_are_not_finite_end_it() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(
        CalibrationError, match=r"in the weight of model\.layers\.1\.mlp\.down_proj"
    ):
        analysed(model=model)
