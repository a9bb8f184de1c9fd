"""Running a decoder lowered for QNN in the HTP simulator, with its caches on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepass.generation import check_vocabulary
from edgepass.ops.errors import InvalidArgumentError, ProgramError

_DTYPES = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "float32": torch.float32,
}


class SimulatedDecoder:
    """A folder that ``lower --backend qnn`` wrote, loaded in the simulator.

    It is called as ``LoweredDecoder`` is, and has its attributes ``report``, ``context`` and
    ``vocabulary``: ``decoder(tokens, position)`` gives the logits of the last token. The caches
    pass from call to call as the integers that the program returns. A program that was lowered for
    embeddings takes vectors float ``[S, H]`` in the place of ``tokens``.

    Raises LibraryError without the QNN libraries, ProgramError for a folder that is not one.
    """

    simulated = True

    def __init__(self, folder: str | Path, report: dict[str, Any]) -> None:
        from edgepass.lowering.qnn_simulator import SimulatedProgram

        self.folder, self.report = Path(folder), report
        try:
            self.context, self.vocabulary = int(report["context"]), int(report["vocabulary"])
            self._hidden = report["hidden"] if report.get("inputs") == "embeddings" else None
            self.chunk, self._layers = int(report["prefill_chunk"]), int(report["layers"])
            self._io = dict(report["io"])
            self._windows = [int(each) for each in self._io["windows"]]
            self._mask, self._logits = self._io["mask"], self._io["logits"]
            self._caches = self._empty_caches()
        except (KeyError, TypeError, ValueError) as error:
            raise ProgramError(
                f"no decoder: got {self.folder / 'report.json'} without {error}; accepted are "
                "folders that `edgepass lower --backend qnn` wrote"
            ) from error
        self._filled = 0
        self._program = SimulatedProgram(self.folder / "model.pte")

    def __call__(self, tokens: list[int] | Tensor, position: int) -> Tensor:
        """Run ``tokens``, the first of them at ``position``: logits float32 ``[V]`` of the last.

        Raises InvalidArgumentError for positions that no earlier call has reached or that lie
        beyond the context, for ids beyond the vocabulary, and for ids where vectors are wanted.
        """
        count = len(tokens)
        # The last position has no row in the cache of AR-1: nothing could read it.
        if not 0 <= position <= self._filled or position + count > self.context or not count:
            raise InvalidArgumentError(
                f"tokens beyond the context: got {count} tokens at position={position}, "
                f"accepted are 1 and more at positions 0 to {self._filled}, up to {self.context}"
            )
        given = self._checked(tokens)
        logits = torch.empty(0)
        while len(given):
            # A padded chunk must fit the cache that the prefill form has.
            whole = len(given) > 1 and position <= self.context - self.chunk
            count = min(len(given), self.chunk) if whole else 1
            logits = self._run(given[:count], position, self.chunk if whole else 1)
            given, position = given[count:], position + count
        return logits

    def _checked(self, tokens: list[int] | Tensor) -> Tensor:
        """Token ids int32 ``[S]`` or vectors float32 ``[S, H]``, whichever the program takes."""
        if self._hidden is not None:
            if not isinstance(tokens, Tensor) or tokens.shape[1:] != (self._hidden,):
                raise InvalidArgumentError(
                    f"no embeddings: got {self.folder}, which was lowered for them, with "
                    f"{len(tokens)} token ids, accepted are vectors float [S, {self._hidden}]"
                )
            return tokens.float()
        if isinstance(tokens, Tensor):
            raise InvalidArgumentError(
                f"no token ids: got {self.folder}, which was lowered for them, with a tensor, "
                "accepted is a list of ids"
            )
        check_vocabulary(tokens, self.vocabulary)
        return torch.tensor(tokens, dtype=torch.int32)

    def prefill(self, tokens: list[int] | Tensor, chunk: int | None = None) -> Tensor:
        """Run ``tokens``, which begin a text; ``chunk`` is the program's own."""
        self._filled = 0
        return self(tokens, 0)

    def _run(self, given: Tensor, start: int, size: int) -> Tensor:
        past, count = self.context - size, len(given)
        padded = given.new_zeros(1, size, *given.shape[1:])
        padded[0, :count] = given
        positions = (start + torch.arange(size)).clamp(max=self.context - 1).to(torch.int32)
        masks = [self._quantized_mask(size, past, start, count, w) for w in self._windows]
        caches = [cache.narrow(self._axis(i), 0, past) for i, cache in enumerate(self._caches)]
        method = "kv_forward" if size == 1 else "prefill_forward"
        logits, *rows = self._program.run(method, [padded, *masks, positions[None], *caches])
        for index, (cache, new) in enumerate(zip(self._caches, rows, strict=True)):
            axis = self._axis(index)
            cache.narrow(axis, start, count).copy_(new.narrow(axis, 0, count))
        self._filled = start + count
        return self._real(logits[0, count - 1])

    def _axis(self, index: int) -> int:
        return 3 if index < self._layers else 2

    def _quantized_mask(self, *arguments: int) -> Tensor:
        from edgepass.models.cache_mask import cache_mask

        mask = cache_mask(*arguments)
        values = torch.where(mask == 0, self._mask["visible"], self._mask["hidden"])
        return values.to(_DTYPES[self._mask["dtype"]])

    def _empty_caches(self) -> list[Tensor]:
        heads, width = int(self._io["kv_heads"]), int(self._io["head_dim"])
        cache = self._io["cache"]
        shapes = [(1, heads, width, self.context), (1, heads, self.context, width)]
        dtype = _DTYPES[cache["dtype"]]
        return [
            torch.full(shape, cache["zero"], dtype=torch.float32).to(dtype)
            for shape in shapes
            for _ in range(self._layers)
        ]

    def _real(self, logits: Tensor) -> Tensor:
        if self._logits is None:
            return logits
        shifted = logits.to(torch.int32) - self._logits["zero_point"]
        return shifted.to(torch.float32) * self._logits["scale"]
