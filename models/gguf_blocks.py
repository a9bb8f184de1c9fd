"""The 4-bit blocks of a GGUF file as they are, without dequantizing and quantizing again.

Formats of https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h: a block is 32 values of a
row. Q4_0: a half d, then 16 bytes; byte j holds value j in its low half and j + 16 in its high
half; a value is ``d * (q - 8)``. Q4_1: halves d and m, then the same bytes; ``d * q + m``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgepass.models.gguf_file import GgufFile
from edgepass.models.gguf_model import halves_from_pairs, name_map, stores_pairs
from edgepass.ops.errors import CheckpointError

Q4_0, Q4_1 = 2, 3
BLOCK = 32


class BlockWeight(NamedTuple):
    """Integers int8 ``[N, K]`` of -8..7, scales float32 ``[N, K/32]``, zero points or None.

    A value is ``scale * (integer - zero point)``: exactly the file's for Q4_0 (no zero points); for
    Q4_1, with float32 zero points, up to their rounding.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None


def read_blocks(file: GgufFile, model: Any) -> dict[str, BlockWeight]:
    """The 4-bit weights of ``file`` by the path of the module of ``model`` that has them.

    ``model`` is what was loaded from ``file``; layers that it does not have are not read. Weights
    of other types (llama.cpp keeps some at more bits) are left out. Rows of Q and K are put into
    the order of ``transformers``.

    Raises CheckpointError if no linear or embedding is stored in 4-bit blocks.
    """
    stored = name_map(file, model.config)
    found: dict[str, BlockWeight] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            name = stored(f"{path}.weight")
            if name not in file.tensors and model.config.tie_word_embeddings:
                name = "token_embd.weight"
            if name in file.tensors and file.tensors[name].kind in (Q4_0, Q4_1):
                found[path] = _weight(file, name, path, model.config)
    if not found:
        raise CheckpointError(
            f"no 4-bit blocks: got path={file.path}, none of whose weights is Q4_0 or Q4_1; "
            "accepted are files that have some, or a recipe that quantizes them"
        )
    return found


def _weight(file: GgufFile, name: str, path: str, config: Any) -> BlockWeight:
    tensor = file.tensors[name]
    weight = unpack_blocks(file.read(name), tensor.shape, tensor.kind)
    if not stores_pairs(config, path):
        return weight
    parts = (None if each is None else halves_from_pairs(each, config.head_dim) for each in weight)
    return BlockWeight(*parts)  # type: ignore[arg-type]


def unpack_blocks(raw: np.ndarray, shape: tuple[int, ...], kind: int) -> BlockWeight:
    """Unpack the bytes of a tensor ``[N, K]`` of kind ``Q4_0`` or ``Q4_1``."""
    rows, columns = shape
    headers = 1 if kind == Q4_0 else 2
    blocks = raw.reshape(rows, columns // BLOCK, 2 * headers + BLOCK // 2)
    halves = np.ascontiguousarray(blocks[..., : 2 * headers]).view("<f2").astype(np.float32)
    packed = torch.from_numpy(np.ascontiguousarray(blocks[..., 2 * headers :]))
    values = torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8
    scale = torch.from_numpy(halves[..., 0].copy())
    if kind == Q4_0:
        return BlockWeight(values.reshape(rows, columns), scale, None)
    minimum = torch.from_numpy(halves[..., 1].copy())
    # A block of one value: its scale is 0, and any integer will do.
    flat = scale == 0
    values = values.masked_fill(flat.unsqueeze(-1), 0)
    scale = torch.where(flat, minimum.abs().clamp(min=2**-24), scale)
    zero = -minimum / scale - torch.where(flat, 0.0, 8.0)
    return BlockWeight(values.reshape(rows, columns), scale, zero)
