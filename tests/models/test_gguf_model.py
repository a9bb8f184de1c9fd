"""A model read from GGUF is the model that was written; what cannot be exact is refused."""

from pathlib import Path

import gguf
import pytest
import torch
from torch.testing import assert_close

from edgepass.models.load import load_model
from edgepass.ops.errors import CheckpointError
from tests.models.gguf_files import write_gguf
from tests.models.tiny_models import tiny_model

ARCHITECTURES = {
    "llama": {},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {"head_dim": 32},
}


def logits(model) -> torch.Tensor:
    return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_comes_back(tmp_path: Path, architecture: str, tied: bool) -> None:
    options = ARCHITECTURES[architecture] | {"tie_word_embeddings": tied}
    model = tiny_model(architecture, **options)
    loaded, _ = load_model(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    _, tokenizer = load_model(str(write_gguf(tmp_path / "tiny.gguf", tiny_model())))
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "abc"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_only_the_first_layers_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    path = write_gguf(tmp_path / "tiny.gguf", model)
    loaded, _ = load_model(str(path), layers=1)
    model.model.layers = model.model.layers[:1]
    assert loaded.config.num_hidden_layers == 1
    assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_half_precision_rounds_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    loaded, _ = load_model(str(write_gguf(tmp_path / "a.gguf", model)), dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half())


def test_rotary_factors_divide_the_frequencies(tmp_path: Path) -> None:
    factors = torch.linspace(1.0, 4.0, 8)
    path = write_gguf(tmp_path / "a.gguf", tiny_model(), extra={"rope_freqs.weight": factors})
    loaded, _ = load_model(str(path))
    expected = tiny_model().model.rotary_emb.inv_freq / factors
    assert_close(loaded.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_model(), leave_out="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"without the tensor blk\.1\.ffn_up\.weight"):
        load_model(str(path))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(95, 64))
    path = write_gguf(tmp_path / "a.gguf", model)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight shape=\[95, 64\]"):
        load_model(str(path))


@pytest.mark.parametrize("number", [{"expert_count": 4}, {"rope.dimension_count": 8}])
def test_what_the_config_cannot_say_is_refused(tmp_path: Path, number: dict) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_model(), **number)
    with pytest.raises(CheckpointError, match="unsupported"):
        load_model(str(path))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"architecture=mamba.*llama, qwen2, qwen3"):
        load_model(str(tmp_path / "mamba.gguf"))
