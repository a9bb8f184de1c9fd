"""Running a lowered decoder on the stock runtime: prefill in chunks, then token by token."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgepass.ops.errors import InvalidArgumentError, ProgramError
from edgepass.ops.threads import torch_threads

# Larger chunks gain nothing on a CPU and hold larger score matrices.
PREFILL_CHUNK = 128
HOST_BACKENDS = ("xnnpack",)
# These run on the CPU in edgepass's simulator of the device's runtime.
SIMULATED_BACKENDS = ("vulkan",)


class LoweredDecoder:
    """The program of an output folder (``model.pte``, ``report.json``, tokenizer), loaded.

    Attributes: ``report`` (the parsed ``report.json``), ``context`` (tokens that the cache holds),
    ``vocabulary`` (number of token ids) and ``simulated`` (a program for Vulkan, run by
    ``edgepass.simulator``).

    Raises ProgramError for a folder without a readable program, one that is no decoder, or one
    whose program needs a device that this host does not have.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.report = _read_report(self.folder)
        backend = self.report.get("backend")
        self.simulated = backend in SIMULATED_BACKENDS
        if not self.simulated and backend not in HOST_BACKENDS:
            accepted = ", ".join((*HOST_BACKENDS, *SIMULATED_BACKENDS))
            raise ProgramError(
                f"cannot run on this host: got {self.folder} with backend={backend}, which needs a "
                f"device; accepted are programs for {accepted}"
            )
        self.context = self._fact("context")
        self.vocabulary = self._fact("vocabulary")
        load = _load_simulated if self.simulated else _load
        self._run = load(self.folder / "model.pte")

    def __call__(self, tokens: list[int], position: int) -> torch.Tensor:
        """Run ``tokens``, the first of them at ``position``; at most ``context - 1`` at once.

        Returns logits float32 ``[V]`` of the last one, valid until the next call. Raises
        InvalidArgumentError for positions beyond the context and ids beyond the vocabulary: the
        runtime itself would go on with wrong numbers.
        """
        most = min(self.context - max(position, 0), self.context - 1)
        if position < 0 or not 1 <= len(tokens) <= most:
            raise InvalidArgumentError(
                f"tokens beyond the context: got {len(tokens)} tokens at position={position}, "
                f"accepted are 1 to {most} tokens at positions 0 to {self.context - 1}"
            )
        check_vocabulary(tokens, self.vocabulary)
        inputs = [torch.tensor([tokens]), torch.tensor([position])]
        return self._run(inputs)[0].reshape(-1)

    def prefill(self, tokens: list[int], chunk: int = PREFILL_CHUNK) -> torch.Tensor:
        """Run ``tokens``, which begin a text, ``chunk`` at a time: logits as of ``__call__``."""
        logits = torch.empty(0)
        chunk = min(chunk, self.context - 1)
        for start in range(0, len(tokens), chunk):
            logits = self(tokens[start : start + chunk], start)
        return logits

    def _fact(self, name: str) -> int:
        value = self.report.get(name)
        if not isinstance(value, int) or value < 2:
            raise ProgramError(
                f"no decoder: got {self.folder / 'report.json'} with {name}={value}; accepted are "
                "folders that `edgepass lower --out` wrote"
            )
        return value


def check_vocabulary(tokens: list[int], vocabulary: int) -> None:
    """Raise InvalidArgumentError for an id that is not one of the ``vocabulary`` ids from 0 on."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidArgumentError(
                f"token beyond the vocabulary: got token={token}, accepted are 0 to "
                f"{vocabulary - 1}"
            )


def load_decoder(folder: str | Path) -> Any:
    """Load a folder that ``lower`` wrote for a backend that this host runs.

    Returns a :class:`LoweredDecoder`, or for QNN one that runs in the HTP simulator and is called
    alike. Raises ProgramError as LoweredDecoder does, LibraryError without the simulator.
    """
    report = _read_report(Path(folder))
    if report.get("backend") != "qnn":
        return LoweredDecoder(folder)
    from edgepass.qnn_generation import SimulatedDecoder

    return SimulatedDecoder(folder, report)


@dataclass(frozen=True)
class Generation:
    """A continuation, without the prompt, and how fast it came, in tokens per second."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def generate(
    decoder: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    chunk: int = PREFILL_CHUNK,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt`` greedily until the model ends the text, ``max_new_tokens`` at most.

    ``chunk``: tokens of the prompt run at once. ``on_text`` is told each piece of text as it
    comes. Raises InvalidArgumentError for an empty prompt, one that does not leave room in the
    context for ``max_new_tokens``, or a count or chunk below 1.
    """
    ids = tokenizer(prompt)["input_ids"]
    _check_lengths(len(ids), max_new_tokens, chunk, decoder.context)
    started = time.perf_counter()
    token = _likeliest(decoder.prefill(ids, chunk))
    prefill_seconds = time.perf_counter() - started
    ends = _end_tokens(decoder, tokenizer)
    new: list[int] = []
    shown, steps, decode_seconds = "", 0, 0.0
    while token not in ends:
        new.append(token)
        shown += _tell(tokenizer, new, shown, on_text)
        if len(new) == max_new_tokens:
            break
        started = time.perf_counter()
        token = _likeliest(decoder([token], len(ids) + steps))
        decode_seconds += time.perf_counter() - started
        steps += 1
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=len(ids),
        generated_tokens=len(new),
        prefill_tokens_per_second=round(len(ids) / prefill_seconds, 2),
        decode_tokens_per_second=round(steps / decode_seconds, 2) if steps else 0.0,
    )


def _likeliest(logits: torch.Tensor) -> int:
    # By numpy: torch would start its workers for so long a vector (see _load).
    return int(logits.numpy().argmax())


def _tell(tokenizer: Any, new: list[int], shown: str, on_text: Callable[[str], None] | None) -> str:
    """Tell ``on_text`` what the last token added to ``shown``, and return it."""
    if on_text is None:
        return ""
    text = tokenizer.decode(new, skip_special_tokens=True)
    # A character cut by the token's end shows as U+FFFD until its other bytes have come.
    piece = text[len(shown) :].rstrip("\ufffd")
    if piece:
        on_text(piece)
    return piece


def _end_tokens(decoder: Any, tokenizer: Any) -> set[int]:
    return {tokenizer.eos_token_id, *decoder.report.get("end_tokens", ())}


def _check_lengths(prompt: int, new: int, chunk: int, context: int) -> None:
    for name, value in (("max_new_tokens", new), ("chunk", chunk)):
        if value < 1:
            raise InvalidArgumentError(f"too small: got {name}={value}, accepted are 1 and more")
    if prompt < 1:
        raise InvalidArgumentError("empty prompt: got 0 tokens, accepted are 1 and more")
    # The last new token is not run, so it needs no room.
    if prompt + new - 1 > context:
        raise InvalidArgumentError(
            f"prompt too long: got {prompt} tokens and max_new_tokens={new}, accepted are at most "
            f"{context + 1} together (context={context})"
        )


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProgramError(
            f"no lowered model: got {folder} without a readable report.json; accepted are folders "
            "that `edgepass lower --out` wrote"
        ) from error
    if not isinstance(report, dict):
        raise ProgramError(f"no lowered model: got {path}, accepted is one JSON object")
    return report


def load_program(path: Path, backend: str) -> Callable[[list[torch.Tensor]], Any]:
    """Return a function that runs the ``forward`` of a ``.pte``: a list of inputs to outputs.

    On the stock runtime, or in the simulator of the device's. Raises ProgramError for a file that
    cannot be loaded, or a backend that needs a device.
    """
    if backend not in (*HOST_BACKENDS, *SIMULATED_BACKENDS):
        accepted = ", ".join((*HOST_BACKENDS, *SIMULATED_BACKENDS))
        raise ProgramError(
            f"cannot run on this host: got backend={backend}, accepted are programs for {accepted}"
        )
    return _load_simulated(path) if backend in SIMULATED_BACKENDS else _load(path)


def _load(path: Path) -> Callable[[list[torch.Tensor]], Any]:
    # These bring the operators that run outside the delegates.
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.runtime import Runtime

    if not path.is_file():
        raise ProgramError(f"no such file: got {path}, accepted is the .pte that `lower` wrote")
    try:
        with _quiet_runtime():
            program = Runtime.get().load_program(path)
            method = program.load_method("forward")
    except RuntimeError as error:
        raise ProgramError(
            f"truncated or foreign file: got {path}, which the runtime cannot load ({error}); "
            "accepted are .pte files that `lower` wrote"
        ) from error

    def run(inputs: list[torch.Tensor], _program: Any = program) -> Any:
        # The method points into the program: both must live.
        # The binding copies the logits with torch, whose workers then spin on the runtime's cores:
        # on two cores that costs a quarter of a step.
        with torch_threads(1):
            return method.execute(inputs)

    return run


def _load_simulated(path: Path) -> Callable[[list[torch.Tensor]], Any]:
    from edgepass.simulator.simulate import SimulatedProgram

    program = SimulatedProgram(path)
    program.method()  # what cannot be run is told when it is loaded
    return program.run


@contextmanager
def _quiet_runtime() -> Iterator[None]:
    """Keep the native runtime's remarks on the CPU and on refused files off standard error."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
