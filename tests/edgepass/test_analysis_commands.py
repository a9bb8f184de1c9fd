"""`edgepass analyze` and `allocate`, from a checkpoint to a program and a page."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgepass.calibration.analysis import Site, read_analysis


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Hello HeHe worlds! " * 40)
    return path


@pytest.fixture
def folder(command, checkpoint, text, tmp_path: Path) -> Path:
    out = tmp_path / "state" / "out"
    options = ["--calibration", text, "--calibration-tokens", 64, "--chunk-tokens", 16]
    code, printed, err = command("analyze", "--model", checkpoint, *options, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(printed) == json.loads((out / "analysis.json").read_text())
    assert [each.name for each in out.parent.iterdir()] == ["out"]
    return out


@pytest.mark.parametrize("backend", ["xnnpack", "vulkan"])
def test_an_allocation_lowers_to_the_bytes_that_it_says(
    command, checkpoint, folder: Path, tmp_path: Path, backend: str
) -> None:
    sizes, programs = [], []
    for budget in (4.6, 5.5) if backend == "xnnpack" else (5.6, 7.0):
        code, printed, err = command(
            *("allocate", folder, "--backend", backend, "--target-bpw", budget, "--json"),
            *("--by", "kl"),  # by loss a random model may have no use for more bytes
        )
        assert code == 0, err
        result = json.loads(printed)
        assert result == json.loads((folder / "allocation.json").read_text())
        assert result["bits_per_weight"] <= budget
        assert result["gap"] < 1e-5
        assert len({site["candidate"] for site in result["sites"].values()}) > 1
        out = tmp_path / f"{budget}"
        code, printed, err = command(
            *("lower", "--model", checkpoint, "--backend", backend, "--context", 24),
            *("--recipe", folder / "recipe.yaml", "--out", out, "--json"),
        )
        assert code == 0, err
        report = json.loads(printed)
        assert report["linears"]["fused"] == report["linears"]["total"]
        sizes.append(result["bytes"])
        programs.append(report["pte_bytes"])
    # Beside the weights nothing differs but padding: a few bytes each.
    difference, wanted = programs[1] - programs[0], sizes[1] - sizes[0]
    assert wanted > 1000
    assert abs(difference - wanted) < 0.15 * wanted + 1024
    code, printed, _ = command("run", out, "--prompt", "He", "--max-new-tokens", 3, "--json")
    assert code == 0 and json.loads(printed)["generated_tokens"] > 0


def test_a_tied_head_may_differ_from_its_embedding_on_xnnpack(
    command, checkpoint, folder: Path, text, tmp_path: Path
) -> None:
    analysis, found = read_analysis(folder), {}
    assert len({site.agrees for site in analysis.sites if site.kind in ("embedding", "head")}) == 1
    for budget in (4.6, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5):
        command("allocate", folder, "--backend", "xnnpack", "--target-bpw", budget)
        sites = json.loads((folder / "allocation.json").read_text())["sites"]
        found = {site.kind: sites[site.name]["candidate"] for site in analysis.sites if site.values}
        if found["embedding"] != found["head"]:
            break
    assert found["embedding"] != found["head"]
    recipe = ("--recipe", folder / "recipe.yaml")
    out = tmp_path / "program"
    command(
        *("lower", "--model", checkpoint, "--backend", "xnnpack", "--context", 24, *recipe),
        *("--out", out),
    )
    score = ("--text", text, "--context", 24, "--max-tokens", 240, "--json")
    lowered = json.loads(command("eval", out, *score)[1])["perplexity"]
    eager = json.loads(command("eval", "--model", checkpoint, *recipe, *score)[1])["perplexity"]
    assert lowered == pytest.approx(eager, rel=0.01)


def test_a_perplexity_is_met_at_the_smallest_size(command, folder: Path) -> None:
    options = ["allocate", folder, "--backend", "xnnpack", "--json"]
    results = [
        json.loads(command(*options, "--max-perplexity-increase", most)[1]) for most in (0.3, 0.1)
    ]
    assert results[0]["perplexity_increase"] <= 0.3
    assert results[1]["perplexity_increase"] <= 0.1
    assert results[0]["bytes"] <= results[1]["bytes"]


def test_files_of_an_earlier_allocation_do_not_stay(command, folder: Path) -> None:
    options = ["allocate", folder, "--backend", "xnnpack", "--target-bpw"]
    assert command(*options, 6, "--html")[0] == 0
    assert (folder / "allocation.html").exists()
    assert command(*options, 5)[0] == 0
    assert sorted(each.name for each in folder.iterdir()) == [
        "allocation.json",
        "analysis.json",
        "recipe.yaml",
    ]
    (folder / "allocation.json").unlink()
    (folder / "recipe.yaml").unlink()
    (folder / "allocation.json").mkdir()
    code, _, err = command(*options, 5)
    assert code == 2 and "cannot write" in err
    assert not (folder / "recipe.yaml").exists()


def test_what_is_refused(refused, folder: Path, checkpoint, text, tmp_path: Path) -> None:
    allocate = ["allocate", folder, "--backend", "xnnpack"]
    assert "the smallest possible for backend=xnnpack is" in refused(
        *allocate, "--target-mb", 0.001
    )
    assert "one budget: got none" in refused(*allocate)
    assert "one budget" in refused(*allocate, "--target-mb", 1, "--target-bpw", 5)
    assert "target_bpw=-1" in refused(*allocate, "--target-bpw", -1)
    assert "accepted are qkv, gate_up" in refused(*allocate, "--target-bpw", 5, "--same", "x")
    assert "backend=None" in refused("allocate", folder, "--target-bpw", 5)
    assert "edgepass analyze" in refused("allocate", tmp_path / "none", "--target-bpw", 5)
    assert not (folder / "recipe.yaml").exists()
    analyze = ["analyze", "--model", checkpoint, "--calibration", text, "--out", tmp_path / "a"]
    assert "too short" in refused(*analyze, "--calibration-tokens", 10**6)
    assert "exact=-1" in refused(*analyze, "--calibration-tokens", 32, "--exact", -1)
    named = [*analyze, "--calibration-tokens", 32, "--sites", "down_proj"]
    assert "sites='down_proj', which matches no site" in refused(*named)
    assert "no backend" in refused(*analyze, "--recipe", _unheld(tmp_path))
    assert not (tmp_path / "a").exists()


def _unheld(folder: Path) -> Path:
    path = folder / "unheld.yaml"
    path.write_text("{name: unheld, weights: {bits: 16, granularity: tensor}}")
    return path


def test_without_json_the_worst_sites_are_told(command, checkpoint, text, tmp_path: Path) -> None:
    options = ["--calibration", text, "--calibration-tokens", 32, "--chunk-tokens", 16]
    out = tmp_path / "a"
    code, printed, _ = command("analyze", "--model", checkpoint, *options, "--out", out)
    assert code == 0
    assert "model.layers.0.mlp.down_proj" in printed
    code, printed, _ = command("allocate", out, "--backend", "xnnpack", "--target-bpw", 6)
    assert code == 0
    assert "summed KL" in printed
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["backend"] == "xnnpack"


def test_the_page_draws_itself_in_a_browser(command, folder: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium: install Debian's package of that name")
    code, _, err = command(
        "allocate", folder, "--backend", "xnnpack", "--target-bpw", 5, "--html", "--json"
    )
    assert code == 0, err
    page = folder / "allocation.html"
    assert "http://" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    drawn, analysis = _drawn(browser, page), read_analysis(folder)
    assert 'data-ready="yes"' in drawn
    assert drawn.count("<polyline") == 1
    assert drawn.count('class="uniform"') >= 3
    assert sorted(_listed(drawn)) == sorted(site.name for site in analysis.sites)
    # A click on the head of a column sorts by it, another click the other way around.
    clicks = 'const head = document.querySelectorAll("#sites th button")[4]; head.click();'
    shown = {
        s.name: _shown(s, json.loads((folder / "allocation.json").read_text()))
        for s in analysis.sites
    }
    for text, down in ((clicks, True), (clicks + "head.click();", False)):
        clicked = folder / "clicked.html"
        source = page.read_text().replace("</body>", f"<script>{text}</script></body>")
        clicked.write_text(source)
        found = [shown[name] for name in _listed(_drawn(browser, clicked))]
        assert found == sorted(found, reverse=down)
        assert found[0] != found[-1]


def _drawn(browser: str, page: Path) -> str:
    """The document as a browser leaves it."""
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr[-2000:]
    return done.stdout


def _listed(drawn: str) -> list[str]:
    """The sites of the table, from top to bottom."""
    table = drawn[drawn.index('<table class="list"') :]
    return re.findall(r"<tr><td>([^<]+)</td>", table)


def _shown(site: Site, result: dict[str, Any]) -> float:
    """The divergence that the table has of a site: of what was chosen, else the first."""
    chosen = result["sites"].get(site.name, {}).get("candidate", site.candidates[0].label)
    return next(c.best_kl for c in site.candidates if c.label == chosen)
