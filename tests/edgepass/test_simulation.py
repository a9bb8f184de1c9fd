"""`edgepass simulate`, and `run` and `eval` on a folder for Vulkan."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgepass import api
from edgepass.console import group_constants
from edgepass.generation import LoweredDecoder
from edgepass.ops.errors import InvalidArgumentError
from edgepass.simulation import _read_arrays
from tests.edgepass.conftest import CONTEXT
from tests.models.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Widths of 8n and of 32 are what the runtime takes.
    model = tiny_model("llama", tie_word_embeddings=True)
    result = api.lower(model, backend="vulkan", context=CONTEXT, model_name="tiny")
    return result.save(tmp_path_factory.mktemp("lowered") / "vulkan", tiny_tokenizer())


def test_lists_as_json_and_for_people(command, folder: Path) -> None:
    code, printed, err = command("simulate", folder / "model.pte", "--json")
    listed = json.loads(printed)
    assert (code, err) == (0, "")
    assert listed["inputs"][0] == {"dtype": "int64", "shape": [1, CONTEXT - 1], "dynamic": True}
    assert "calls" not in listed["delegates"][0]
    assert "results" not in listed
    _, printed, _ = command("simulate", folder / "model.pte", "--ops", "--json")
    assert json.loads(printed)["delegates"][0]["calls"]
    _, printed, _ = command("simulate", folder / "model.pte", "--ops")
    for words in ("input 0: int64 at most [1, 23]", "et_vk.rms_norm.default", "weights", "memory"):
        assert words in printed


def test_alike_constants_are_one_row_and_memory_comes_first(command, folder: Path) -> None:
    _, printed, _ = command("simulate", folder / "model.pte", "--json")
    (delegate,) = json.loads(printed)["delegates"]
    groups = group_constants(delegate["constants"])
    assert len(groups) < len(delegate["constants"])
    for key in ("nbytes", "uses"):
        total = sum(entry[key] for entry in delegate["constants"])
        assert sum(group[key] for group in groups) == total
    assert sum(group["count"] for group in groups) == len(delegate["constants"])
    sizes = [group["nbytes"] for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    _, printed, _ = command("simulate", folder / "model.pte")
    places = [printed.index(title) for title in ("memory", "0: operators", "0: constants")]
    assert places == sorted(places)


def test_runs_arrays_of_a_file(command, folder: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(given, np.array([[5, 6, 7]]), np.array([0]))
    options = ["--inputs", given, "--out", out, "--json"]
    code, printed, _ = command("simulate", folder / "model.pte", *options)
    (result,) = json.loads(printed)["results"]
    assert (code, result["dtype"], result["shape"]) == (0, "float32", [1, 1, 96])
    with np.load(out) as written:
        found = written["output_0"]
    expected = LoweredDecoder(folder)([5, 6, 7], 0).numpy()
    assert np.array_equal(found.reshape(-1), expected)
    assert result["values"] == pytest.approx(found.reshape(-1)[:8].tolist())


def test_run_and_eval_say_that_they_simulate(command, folder: Path, tmp_path: Path) -> None:
    options = ["--prompt", "He said", "--max-new-tokens", 3, "--json"]
    code, printed, err = command("run", folder, *options)
    assert (code, json.loads(printed)["prompt_tokens"]) == (0, 6)
    assert err.splitlines() == ["edgepass: simulated on the CPU"]
    text = tmp_path / "text.txt"
    text.write_text("He said that the tiny model knows nothing at all.")
    code, printed, err = command("eval", folder, "--text", text, "--context", 16, "--json")
    assert code == 0
    assert json.loads(printed)["perplexity"] > 1
    assert "edgepass: simulated on the CPU" in err.splitlines()


def test_bad_input_is_one_line(refused, folder: Path, tmp_path: Path) -> None:
    pte = folder / "model.pte"
    cut = tmp_path / "cut.pte"
    cut.write_bytes(pte.read_bytes()[:1000])
    assert "damaged file" in refused("simulate", cut)
    assert "unreadable file" in refused("simulate", tmp_path / "none.pte")
    assert "method='decode', accepted are forward" in refused("simulate", pte, "--method", "decode")
    assert "out=x.npz without inputs" in refused("simulate", pte, "--out", "x.npz")
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, np.array([[5]]), np.array([CONTEXT]))
    assert f"position={CONTEXT} with 1 tokens" in refused("simulate", pte, "--inputs", wrong)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, np.array([object()], dtype=object))
    with pytest.raises(InvalidArgumentError, match="unreadable inputs"):
        _read_arrays(path)
    plain = tmp_path / "plain.npy"
    np.save(plain, np.zeros(3))
    with pytest.raises(InvalidArgumentError, match="unreadable inputs"):
        _read_arrays(plain)
