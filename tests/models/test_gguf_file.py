"""The GGUF container: what was written is read, and any cut or foreign file is refused."""

from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.models.gguf_file import read_gguf
from edgepass.ops.errors import CheckpointError
from tests.models.gguf_files import write_gguf
from tests.models.tiny_models import tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model())


def test_reads_what_the_gguf_package_reads(path: Path) -> None:
    reader, file = gguf.GGUFReader(path), read_gguf(path)
    assert {t.name: tuple(reversed(t.shape)) for t in reader.tensors} == {
        name: tensor.shape for name, tensor in file.tensors.items()
    }
    for tensor in reader.tensors:
        assert torch.equal(file.dequantize(tensor.name), torch.tensor(tensor.data.copy()))


def test_metadata_are_typed_and_a_vocabulary_is_only_counted(path: Path) -> None:
    metadata = read_gguf(path).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert metadata["llama.unused_numbers"] == [0, 1, 2, 3]
    assert metadata["tokenizer.ggml.tokens"] == 96


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_stored_types_are_dequantized_as_the_gguf_package_does(tmp_path: Path, kind: str) -> None:
    kind = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "quantized.gguf", tiny_model(), kind)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    expected = torch.tensor(gguf.dequantize(stored.data, kind)).float()
    assert torch.equal(read_gguf(path).dequantize("blk.1.ffn_down.weight"), expected)


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=40)
def test_a_file_cut_anywhere_is_refused(path: Path, part: float) -> None:
    whole = path.read_bytes()
    cut = path.with_name("cut.gguf")
    cut.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match=r"truncated GGUF file: got path=.*cut.gguf"):
        read_gguf(cut)


@given(st.binary(max_size=200))
def test_a_foreign_file_is_refused(tmp_path_factory, content: bytes) -> None:
    foreign = tmp_path_factory.getbasetemp() / "foreign.gguf"
    foreign.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"got path=.*foreign.gguf"):
        read_gguf(foreign)


@given(st.integers(4, 3000), st.binary(min_size=1, max_size=12))
@settings(max_examples=60)
def test_a_corrupted_header_never_raises_anything_else(path: Path, at: int, junk: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(junk)] = junk
    corrupted = path.with_name("corrupted.gguf")
    corrupted.write_bytes(content)
    try:
        read_gguf(corrupted)
    except CheckpointError as error:
        assert "\n" not in str(error)
