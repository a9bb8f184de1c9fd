"""A tiny checkpoint and the folder that it is lowered into, made once for the room's tests."""

import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgepass import api, cli
from tests.models.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer

CONTEXT = 24


@pytest.fixture
def command(monkeypatch, capfd):
    """Run one command in this process: exit code, standard output, standard error."""
    disabled = logging.root.manager.disable

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepass", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    yield run
    logging.disable(disabled)


@pytest.fixture
def refused(command):
    """Run one command that must fail: its one line, after the lines of progress."""

    def run(*arguments: object) -> str:
        code, out, err = command(*arguments, "--json")
        assert (code, out) == (2, "")
        *stages, line = err.splitlines()
        assert line.startswith("edgepass: ")
        assert all(len(stage.split()) <= 5 for stage in stages), err
        return line.removeprefix("edgepass: ")

    return run


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
