"""A checkpoint is whole, of one calibration, and refused untouched when it is another's."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgepass.calibration import checkpoint
from edgepass.calibration.checkpoint import Checkpoint
from edgepass.ops.errors import CalibrationError, OutputError

IDENTITY = {"edgepass": "1", "model": "abc", "text": "def"}
STATE = {"rows": torch.randn(3, 5, 2), "a.counts": torch.arange(7), "a.exponent": torch.tensor(-3)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "0of1.safetensors"


def test_what_is_saved_is_loaded(path) -> None:
    kept = Checkpoint(path, IDENTITY)
    assert kept.load() is None
    kept.save(STATE, {"chunks": 3})
    tensors, facts = Checkpoint(path, IDENTITY).load()
    assert facts == {"chunks": 3} and set(tensors) == set(STATE)
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    kept.discard()
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("name", IDENTITY)
def test_another_calibration_s_is_refused_and_left(path, name) -> None:
    Checkpoint(path, IDENTITY).save(STATE, {})
    before = path.read_bytes()
    with pytest.raises(CalibrationError) as caught:
        Checkpoint(path, IDENTITY | {name: "other"}).load()
    assert f"{path} ({name}={IDENTITY[name]}, accepted is {name}=other)" in str(caught.value)
    assert path.read_bytes() == before


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        return content[: len(content) // 2]
    if how == "flipped":
        content[-3] ^= 4
        return content
    return {"empty": b"", "text": b"no tensors here", "json": json.dumps(IDENTITY).encode()}[how]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "json"])
def test_a_damaged_file_is_refused_and_left(path, how) -> None:
    Checkpoint(path, IDENTITY).save(STATE, {})
    content = damaged(path, how)
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="damaged") as caught:
        Checkpoint(path, IDENTITY).load()
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_tensors_of_another_program_are_refused(path) -> None:
    path.parent.mkdir()
    save_file(STATE, path)
    with pytest.raises(CalibrationError, match="damaged or of another kind"):
        Checkpoint(path, IDENTITY).load()


def test_another_format_is_refused(path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", "edgepass calibration 0")
    Checkpoint(path, IDENTITY).save(STATE, {})
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="format=edgepass calibration 0"):
        Checkpoint(path, IDENTITY).load()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_state(path, monkeypatch, call) -> None:
    Checkpoint(path, IDENTITY).save(STATE, {"chunks": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{call}", fail)
    with pytest.raises(OutputError, match=r"cannot write checkpoint=.* No space left"):
        Checkpoint(path, IDENTITY).save(STATE, {"chunks": 2})
    monkeypatch.undo()
    assert Checkpoint(path, IDENTITY).load()[1] == {"chunks": 1}


def test_saving_keeps_to_its_share_of_the_time(path, monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    kept = Checkpoint(path, IDENTITY, share=0.05)
    replace = checkpoint._replace

    def slow(*arguments):
        clock[0] += 2.0
        replace(*arguments)

    monkeypatch.setattr(checkpoint, "_replace", slow)
    assert kept.save_if_due(STATE, {})
    clock[0] += 37.9
    assert not kept.save_if_due(STATE, {})
    clock[0] += 0.2
    assert kept.save_if_due(STATE, {})


def test_the_header_is_readable_by_anyone(path) -> None:
    Checkpoint(path, IDENTITY).save(STATE, {"chunks": 3})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert json.loads(header["identity"]) == IDENTITY and json.loads(header["facts"]) == {
        "chunks": 3
    }
