"""``edgepass recipes``, and recipe files given to the other commands."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from edgepass import api
from edgepass.calibration.recipe_file import find_recipe, parse_recipe, write_recipe
from edgepass.calibration.recipe_presets import ALIASES, PRESETS
from edgepass.lowering.recipe_legality import check_legality
from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.targets import argument, is_call
from edgepass.recipe_commands import list_recipes
from tests.models.tiny_models import tiny_model

MIXED = """
name: mixed
weights: {bits: 4, group_size: 32}
activations: {kind: dynamic}
overrides:
- {modules: "*.o_proj", weights: {group_size: 64}}
- {modules: model.layers.1.mlp.up_proj, weights: {bits: none}}
"""


@pytest.fixture
def mixed(tmp_path):
    return write_recipe(parse_recipe(MIXED), tmp_path / "mixed.yaml")


def test_list_names_every_recipe_with_its_backends(command) -> None:
    code, printed, _ = command("recipes", "list", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(printed)}
    assert list(rows) == [*PRESETS, *ALIASES]
    assert rows["8da4w"]["backends"] == ["xnnpack", "vulkan"]
    assert rows["16a4w_block"]["backends"] == ["qnn"]
    assert rows["16a4w_block"]["weights"] == "symmetric int4 by block of 32"
    assert rows["fp16a8w"]["kv_cache"] == "float"
    _, printed, _ = command("recipes", "list")
    assert all(name in printed for name in rows)


def test_show_prints_a_file_that_check_takes(command, tmp_path) -> None:
    code, printed, _ = command("recipes", "show", "16a4w_block")
    assert code == 0
    path = tmp_path / "shown.yaml"
    path.write_text(printed)
    assert find_recipe(path) == PRESETS["16a4w_block"]
    code, printed, _ = command("recipes", "check", path, "--json")
    assert (code, json.loads(printed)) == (0, {"recipe": "16a4w_block", "backends": {"qnn": []}})
    _, printed, _ = command("recipes", "show", "8da4w", "--json")
    assert json.loads(printed) == PRESETS["8da4w"].asked()


def test_check_without_a_backend_tells_of_each(command) -> None:
    _, printed, _ = command("recipes", "check", "4w")
    lines = printed.splitlines()
    assert lines[0].startswith("xnnpack: no, recipe=4w, which backend=xnnpack cannot hold: ")
    assert lines[1] == "vulkan: yes"


def test_check_with_a_model_counts_the_modules(command, mixed, checkpoint) -> None:
    options = ["--model", checkpoint, "--backend", "xnnpack", "--json"]
    code, printed, _ = command("recipes", "check", mixed, *options)
    assert code == 0
    assert json.loads(printed)["modules"] == {
        "symmetric int4 by group of 32, float": 1,
        "symmetric int4 by group of 32, dynamic int8 by token": 12,
        "symmetric int4 by group of 64, dynamic int8 by token": 2,
        "float, dynamic int8 by token": 1,
    }
    _, printed, _ = command("recipes", "check", mixed, *options[:-1])
    assert "12 modules: symmetric int4 by group of 32, dynamic int8 by token" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "unknown recipe: got recipe='nope'"),
        (["no.yaml"], "cannot read recipe=no.yaml"),
        (["8da4w", "--backend", "cuda"], "got backend='cuda', accepted are xnnpack, vulkan, qnn"),
        (["16a4w", "--backend", "vulkan"], "backend=qnn (nearest: vulkan)"),
        (["coreml_c4w"], "which is for Core ML"),
    ],
)
def test_check_refuses(refused, arguments, message) -> None:
    assert message in refused("recipes", "check", *arguments)


def test_check_refuses_a_recipe_that_no_backend_holds(refused, tmp_path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("{name: odd, weights: {bits: 16, granularity: channel}}")
    assert "recipe=odd, which backend=xnnpack cannot hold" in refused("recipes", "check", path)


def test_check_refuses_a_pattern_without_module(refused, tmp_path, checkpoint) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("{name: odd, overrides: [{modules: lm_haed, weights: {bits: 3}}]}")
    line = refused("recipes", "check", path, "--model", checkpoint)
    assert "overrides.0.modules='lm_haed', which matches no linear or embedding" in line
    assert "did you mean 'lm_head'?" in line


@pytest.mark.parametrize("backend", ["xnnpack", "vulkan"])
def test_a_file_is_lowered_as_it_says(command, mixed, checkpoint, tmp_path, backend) -> None:
    out = tmp_path / "out"
    options = ["--model", checkpoint, "--backend", backend, "--context", 32, "--out", out]
    code, printed, _ = command("lower", *options, "--recipe", mixed, "--check", "--json")
    assert code == 0
    report = json.loads(printed)
    assert report["recipe"] == "mixed"
    assert parse_recipe(json.dumps(report["quantization"])) == parse_recipe(MIXED)
    assert report["linears"]["fused"] == 14
    [unfused] = report["linears"]["unfused"]
    assert unfused["name"] == "model.model.layers.1.mlp.up_proj"
    assert report["numerics"]["device_sqnr_db"]["forward"] > 20


def test_explain_and_eval_take_a_file(command, mixed, checkpoint, tmp_path) -> None:
    options = ["--model", checkpoint, "--recipe", mixed, "--json"]
    code, printed, _ = command("explain", "--backend", "vulkan", *options)
    assert code == 0
    rows = {row["name"]: row["fused"] for row in json.loads(printed)["linears"]}
    assert [name for name, fused in rows.items() if not fused] == [
        "model.model.layers.1.mlp.up_proj"
    ]
    text = tmp_path / "text.txt"
    text.write_text("He said that the tiny model knows nothing at all. " * 3)
    code, printed, _ = command("eval", "--text", text, "--context", 32, *options)
    assert code == 0
    assert json.loads(printed)["perplexity"] > 1


@pytest.mark.parametrize("backend", ["xnnpack", "vulkan"])
def test_mixed_groups_reach_the_fused_operators(backend: str) -> None:
    lowered = api.lower(tiny_model(), backend=backend, recipe=parse_recipe(MIXED), context=32)
    sizes = Counter(
        argument(node, "group_size")
        for node in lowered.fused.graph.nodes
        if is_call(node, "edgepass.linear_qta8a_qga4w")
    )
    assert sizes == {32: 12, 64: 2}


def test_a_trained_model_is_lowered(tmp_path) -> None:
    seen: list[type] = []
    lowered = api.lower(
        tiny_model(),
        backend="xnnpack",
        recipe="8da4w_qat",
        context=32,
        train=lambda model: seen.append(type(model)),
    )
    assert len(seen) == 1
    assert lowered.report["linears"] == {"total": 15, "fused": 15, "unfused": []}


@pytest.mark.parametrize("command_name", ["lower", "eval", "explain"])
def test_the_command_line_trains_nothing(refused, tmp_path, checkpoint, command_name) -> None:
    options = {
        "lower": ["--backend", "xnnpack", "--out", tmp_path / "out"],
        "eval": ["--text", tmp_path],
        "explain": ["--backend", "xnnpack"],
    }[command_name]
    line = refused(command_name, "--model", checkpoint, "--recipe", "8da4w_qat", *options)
    assert "got recipe=8da4w_qat without train=" in line and "or recipe=8da4w" in line


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()


def test_the_page_s_example_is_a_recipe() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipe = parse_recipe(text)
    assert set(recipe.asked()) >= {"weights", "activations", "overrides", "head"}
    assert check_legality(recipe, "vulkan") == []


def test_the_page_s_table_is_the_list_of_recipes() -> None:
    for row in list_recipes():
        cells = [f"`{row['name']}`", row["weights"], row["activations"], row["kv_cache"]]
        assert f"| {' | '.join(cells)} | {', '.join(row['backends']) or 'none'} |" in PAGE


def test_the_page_s_refusal_is_what_is_said() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_legality(PRESETS["4w"], "xnnpack")
    assert f"edgepass: {caught.value}\n" in PAGE
