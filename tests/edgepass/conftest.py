"""A tiny checkpoint and the folder that it is lowered into, made once for the room's tests."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from edgepass import api
from tests.models.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer

CONTEXT = 24


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_checkpoint(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def lowered(tmp_path_factory) -> SimpleNamespace:
    """``folder``: a lowered model; ``eager``: the same weights, quantized; its ``tokenizer``."""
    model = tiny_model("llama", tie_word_embeddings=True)
    tokenizer = tiny_tokenizer()
    result = api.lower(model, backend="xnnpack", context=CONTEXT, model_name="tiny")
    folder = result.save(tmp_path_factory.mktemp("lowered") / "xnnpack", tokenizer)
    return SimpleNamespace(folder=folder, eager=model, tokenizer=tokenizer)
