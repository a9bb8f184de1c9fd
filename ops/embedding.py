"""Group-quantized embedding table: int4 in the linear layout, or int8."""

import torch

from edgepass.ops.checks import FLOAT_DTYPES, ZERO_DTYPES, check_dtype, check_shape, refuse
from edgepass.ops.library import register_operator
from edgepass.ops.packing import dequantize_groups, unpack_int4

_NAME = "embedding_qg"


def embedding_qg(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bits: int,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Look up rows of a quantized table: ``(weight[ids] - zero) * scale`` by groups.

    weight: uint8 ``[V, ceil(K/2)]`` in the linear layout (bits=4) or int8 ``[V, K]`` (bits=8);
    scales: float ``[V, K/group_size]``; zeros: int8 or float of that shape, or None;
    ids: int32 or int64. Returns ``ids.shape + [K]`` in the dtype of ``scales``.
    """
    k = _check_embedding(weight, scales, zeros, group_size, bits, ids)
    rows = ids.reshape(-1)
    _check_ids(rows, weight.shape[0])
    picked = weight.index_select(0, rows)
    w = unpack_int4(picked, k) if bits == 4 else picked
    z = None if zeros is None else zeros.index_select(0, rows)
    out = dequantize_groups(w, scales.index_select(0, rows), z, group_size)
    return out.to(scales.dtype).reshape(*ids.shape, k)


def _embedding_qg_fake(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bits: int,
    ids: torch.Tensor,
) -> torch.Tensor:
    k = _check_embedding(weight, scales, zeros, group_size, bits, ids)
    return scales.new_empty((*ids.shape, k))


def _check_embedding(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bits: int,
    ids: torch.Tensor,
) -> int:
    """Check shapes and dtypes; return K."""
    if bits not in (4, 8):
        refuse(_NAME, "bits", bits, "4 or 8")
    if group_size < 1:
        refuse(_NAME, "group_size", group_size, "1 or more")
    check_dtype(_NAME, "weight", weight, (torch.uint8 if bits == 4 else torch.int8,))
    check_dtype(_NAME, "scales", scales, FLOAT_DTYPES)
    check_dtype(_NAME, "ids", ids, (torch.int64, torch.int32))
    if scales.dim() != 2:
        refuse(_NAME, "scales.shape", list(scales.shape), "[V, K/group_size]")
    k = scales.shape[1] * group_size
    columns = (k + 1) // 2 if bits == 4 else k
    check_shape(_NAME, "weight", weight, (scales.shape[0], columns), "V, bytes of K columns")
    if zeros is not None:
        check_dtype(_NAME, "zeros", zeros, ZERO_DTYPES)
        check_shape(_NAME, "zeros", zeros, scales.shape, "the shape of scales")
    return k


def _check_ids(rows: torch.Tensor, vocabulary: int) -> None:
    if rows.numel():
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= vocabulary:
            refuse(_NAME, "ids", f"{low}..{high}", f"ids in 0..{vocabulary - 1}")


register_operator(
    "embedding_qg(Tensor weight, Tensor scales, Tensor? zeros, int group_size, int bits,"
    " Tensor ids) -> Tensor",
    embedding_qg,
    _embedding_qg_fake,
)
