"""4-bit blocks of a GGUF file: the same values as dequantized, and the same model."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.calibration.recipes import quantize_model
from edgepass.models.gguf_blocks import Q4_0, Q4_1, unpack_blocks
from edgepass.models.load import load_blocks, load_model
from edgepass.ops.errors import CheckpointError, InvalidArgumentError
from tests.models.gguf_files import write_gguf
from tests.models.tiny_models import tiny_model

KINDS = {"Q4_0": Q4_0, "Q4_1": Q4_1}


def exact(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """``scale * (integer - zero point)`` in float64."""
    groups = values.double().unflatten(1, (scale.shape[1], -1))
    groups = groups if zero is None else groups - zero.double().unsqueeze(-1)
    return (groups * scale.double().unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("name", KINDS)
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 100), offset=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_blocks_stand_for_what_the_gguf_package_reads(name, seed, size, offset) -> None:
    weight = np.random.default_rng(seed).normal(offset, size, (6, 96)).astype(np.float32)
    weight[0, :32] = offset  # a block of one value
    weight[1, 32:64] = 0
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
    expected = torch.from_numpy(
        gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    ).double()
    block = unpack_blocks(raw, (6, 96), KINDS[name])
    assert block.values.min() >= -8 and block.values.max() <= 7
    found = exact(*block)
    if name == "Q4_0":
        assert block.zero_point is None
        assert torch.equal(found, expected)
    else:
        assert (found - expected).abs().max() <= 2**-22 * float(expected.abs().max() + size)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_blocks_computes_as_the_dequantized_one(tmp_path: Path, name: str) -> None:
    """Q and K too, whose rows the file has in another order."""
    model = tiny_model("llama", tie_word_embeddings=True)
    path = str(write_gguf(tmp_path / "blocks.gguf", model, gguf.GGMLQuantizationType[name]))
    loaded, _ = load_model(path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = loaded(ids).logits
        blocks = load_blocks(path, loaded)
        assert "model.layers.0.self_attn.k_proj" in blocks and "lm_head" in blocks
        quantize_model(loaded, "4w", blocks=blocks)
        assert (loaded(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_mixed_file_falls_to_the_recipe(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = str(write_gguf(tmp_path / "half.gguf", model, gguf.GGMLQuantizationType.F16))
    loaded, _ = load_model(path)
    with pytest.raises(CheckpointError, match="none of whose weights is Q4_0 or Q4_1"):
        load_blocks(path, loaded)


def test_other_bits_than_the_blocks_are_refused(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "q.gguf", tiny_model("llama"), gguf.GGMLQuantizationType.Q4_0))
    loaded, _ = load_model(path)
    with pytest.raises(InvalidArgumentError, match="bits=4 and group_size=16 for model"):
        quantize_model(loaded, "8da4w", 16, blocks=load_blocks(path, loaded))


def test_what_is_no_gguf_file_has_no_blocks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="no blocks to keep"):
        load_blocks(str(tmp_path), None)
