"""Rows of tables. The runtime reads whatever lies at an id; here ids are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.ops.packing import unpack_embedding_int4, unpack_int4
from edgepass.simulator.checks import check_ids
from edgepass.simulator.registry import Kernel, Site, prepared


@prepared("aten.embedding.default")
def embedding(site: Site) -> Kernel:
    table = site.constant(0)

    def kernel(_: None, ids: Tensor, *rest: object) -> Tensor:
        check_ids("table", ids, table.shape[0])
        return table[ids.long()].float()

    return kernel


@prepared("et_vk.embedding_q4gsw.default")
def embedding_q4gsw(site: Site) -> Kernel:
    """impl/EmbeddingQ4gsw.cpp: a table packed for a linear (even column in the low nibble), or one
    of its own (even column in the high nibble); scales ``[V, groups]`` read as a flat buffer."""
    packed, scales = site.constant(0), site.constant(1).reshape(-1).float()
    group, is_linear_weight = site.integer(2, 1), bool(site.argument(4))
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] % 16:
        raise site.error(f"a table {packed.dtype} {list(packed.shape)}: not in rows of 32 values")
    unpack = unpack_int4 if is_linear_weight else unpack_embedding_int4
    width = 2 * packed.shape[1]
    if scales.numel() < packed.shape[0] * (width // group) or group % 4:
        raise site.error(f"{scales.numel()} scales in groups of {group} for {list(packed.shape)}")
    # Four columns share the scale of the first of them.
    groups = torch.arange(width) // 4 * 4 // group

    def kernel(_: None, __: None, ___: int, ids: Tensor, *rest: object) -> Tensor:
        check_ids("table", ids, packed.shape[0])
        rows = ids.reshape(-1).long()
        values = unpack(packed[rows], width).float()
        places = rows.unsqueeze(1) * (width // group) + groups
        return (values * scales[places.clamp(max=scales.numel() - 1)]).view(*ids.shape, width)

    return kernel


@prepared("aten.index_select.default")
def index_select(site: Site) -> Kernel:
    def kernel(x: Tensor, dim: int, index: Tensor) -> Tensor:
        check_ids("tensor", index, x.shape[dim])
        return x.index_select(dim, index.long())

    return kernel


@prepared("aten.index.Tensor")
def index_tensor(site: Site) -> Kernel:
    def kernel(x: Tensor, indices: list[Tensor | None]) -> Tensor:
        if len(indices) != 1 or indices[0] is None:
            raise site.error(f"{len(indices)} indices; the runtime takes one, of dimension 0")
        check_ids("tensor", indices[0], x.shape[0])
        return x[indices[0].long()]

    return kernel


@prepared("aten.gather.default")
def gather(site: Site) -> Kernel:
    def kernel(x: Tensor, dim: int, index: Tensor, *_: object) -> Tensor:
        check_ids("tensor", index, x.shape[dim])
        return x.gather(dim, index.long())

    return kernel
