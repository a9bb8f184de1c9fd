"""The state of a calibration in a file that is whole at every moment."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edgepass.ops.errors import CalibrationError, OutputError

_FORMAT = "edgepass calibration 1"


class Checkpoint:
    """One file of safetensors, whose header says which calibration it is of.

    ``identity`` are named digests: a file in which one of them differs is refused. A new state
    replaces the file in one step, after it has reached the disk, so that a kill or a loss of power
    at any moment leaves the old state or the new one. ``share`` is the part of the time that saving
    may take: :meth:`save_if_due` saves as seldom as that needs.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], share: float = 0.05) -> None:
        self.path, self.identity, self.share = path, dict(identity), share
        self._due = 0.0

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the saved tensors and facts, None if there is no file.

        Raises CalibrationError for a file of another calibration or version, or a damaged one; the
        file is left as it is.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kind = header.get("format")
            identity, facts = json.loads(header["identity"]), json.loads(header["facts"])
            whole = header["digest"] == _digest(tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise self._refused("it is damaged or of another kind") from error
        if kind != _FORMAT or not whole:
            raise self._refused(f"format={kind}" if whole else "its data is damaged")
        for name, own in self.identity.items():
            if identity.get(name) != own:
                raise self._refused(f"{name}={identity.get(name)}, accepted is {name}={own}")
        return tensors, facts

    def save_if_due(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
        """Save if that keeps to the share of the time; return whether it was done."""
        if time.monotonic() < self._due:
            return False
        self.save(tensors, facts)
        return True

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file. Raises OutputError if it cannot be written."""
        started = time.monotonic()
        header = {
            "format": _FORMAT,
            "identity": json.dumps(self.identity),
            "facts": json.dumps(dict(facts)),
            "digest": _digest(tensors),
        }
        content = save({name: each.contiguous() for name, each in tensors.items()}, header)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, content)
        except OSError as error:
            raise OutputError(
                f"cannot write checkpoint={self.path}: {error.strerror or error}; give a folder "
                "that can be written"
            ) from error
        now = time.monotonic()
        self._due = now + (now - started) * (1 / self.share - 1)

    def discard(self) -> None:
        """Remove the file, and what a killed process left of one."""
        for path in (self.path, _staging(self.path)):
            path.unlink(missing_ok=True)

    def _refused(self, why: str) -> CalibrationError:
        return CalibrationError(
            f"checkpoint of another calibration: got {self.path} ({why}); finish that calibration, "
            "or remove the file"
        )


def discard_states(folder: Path) -> None:
    """Remove the files of all processes in ``folder``, and the folder if nothing else is there."""
    for path in folder.glob("*of*.safetensors"):
        Checkpoint(path, {}).discard()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _replace(path: Path, content: bytes) -> None:
    staging = _staging(path)
    with staging.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        hashed.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        hashed.update(value.reshape(-1).numpy().tobytes())
    return hashed.hexdigest()
