"""Writes XNNPACK subgraph nodes and values into the delegate's serialized graph.

One fused edgepass operator becomes several XNNPACK nodes. The stock visitors write one node for
one FX node; this emitter adds the values that exist only between the nodes of one operator.
Format: executorch ``backends/xnnpack/serialization/xnnpack_graph_schema.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    PerChannelGroupQuant,
    PerChannelQuant,
    PerTokenDynamicQuant,
    XNNBatchMatrixMultiply,
    XNNConcatenate2,
    XNNConvert,
    XNNDatatype,
    XNNFullyConnected,
    XNNGraph,
    XNNQuantizedTensorValue,
    XNNQuantParams,
    XNNStaticReshape,
    XNNStaticSlice,
    XNNStaticTranspose,
    XNNTensorValue,
    XNode,
    XNodeUnion,
    XValue,
)
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_FLAG_TRANSPOSE_B,
    XNN_INVALID_VALUE_ID,
)
from executorch.exir._serialize._named_data_store import NamedDataStore

DATATYPES = {
    torch.float32: XNNDatatype.xnn_datatype_fp32,
    torch.float16: XNNDatatype.xnn_datatype_fp16,
}


class Emitter:
    """Appends values and nodes to ``graph``; every method that makes a value returns its id.

    Dims are upper bounds where the size is dynamic: the runtime infers the real sizes.
    """

    def __init__(self, graph: XNNGraph, store: NamedDataStore, debug_handle: int) -> None:
        self.graph = graph
        self.store = store
        self.debug_handle = debug_handle

    def dims(self, value: int) -> list[int]:
        """The upper-bound sizes of a value that is already in the graph."""
        union = self.graph.xvalues[value].xvalue_union
        tensor = union.tensor_value if isinstance(union, XNNQuantizedTensorValue) else union
        return list(tensor.dims)

    def value(
        self,
        dims: Sequence[int],
        datatype: XNNDatatype = XNNDatatype.xnn_datatype_fp32,
        buffer: int = 0,
        quantization: XNNQuantParams | None = None,
    ) -> int:
        value = len(self.graph.xvalues)
        tensor = XNNTensorValue(
            datatype=datatype,
            num_dims=len(dims),
            dims=list(dims),
            external_id=XNN_INVALID_VALUE_ID,
            constant_buffer_idx=buffer,
            flags=0,
            id_out=value,
        )
        union = (
            tensor
            if quantization is None
            else XNNQuantizedTensorValue(tensor_value=tensor, quant_params=quantization)
        )
        self.graph.xvalues.append(XValue(xvalue_union=union))
        return value

    def data(self, tensor: torch.Tensor, prefix: str = "") -> int:
        """Stores a tensor's bytes (equal bytes once in the file); returns the buffer's index."""
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        key = prefix + hashlib.sha256(raw).hexdigest()
        self.store.add_named_data(key, raw, alignment=CONSTANT_TENSOR_ALIGNMENT)
        self.graph.constant_data.append(
            ConstantDataOffset(offset=UINT64_MAX, size=len(raw), named_key=key)
        )
        return len(self.graph.constant_data) - 1

    def constant(self, tensor: torch.Tensor) -> int:
        """A static float32 value."""
        return self.value(tensor.shape, buffer=self.data(tensor.to(torch.float32)))

    def int4_filter(self, packed: torch.Tensor, scales: torch.Tensor, group_size: int) -> int:
        """A blockwise int4 weight: packed uint8 ``[N, K/2]``, scales ``[N, K/group_size]``.

        XNNPACK keeps the scales of this kind in bfloat16: they are rounded here.
        """
        scale_buffer = self.data(scales.to(torch.bfloat16), prefix="scale_")
        quantization = PerChannelGroupQuant(
            scale=[],
            channel_dim=0,
            group_size=group_size,
            scale_buffer_idx=scale_buffer,
            num_scales=scales.numel(),
        )
        dims = [scales.shape[0], scales.shape[1] * group_size]
        return self.value(dims, XNNDatatype.xnn_datatype_qbint4, self.data(packed), quantization)

    def int8_filter(self, weight: torch.Tensor, scales: torch.Tensor) -> int:
        """An int8 weight ``[N, K]`` with float32 scales ``[N]``, one a channel."""
        quantization = PerChannelQuant(
            scale=[],
            channel_dim=0,
            scale_buffer_idx=self.data(scales.to(torch.float32), prefix="scale_"),
            num_scales=scales.numel(),
        )
        data = self.data(weight)
        return self.value(weight.shape, XNNDatatype.xnn_datatype_qcint8, data, quantization)

    def node(self, union: XNodeUnion) -> None:
        self.graph.xnodes.append(XNode(xnode_union=union, debug_handle=self.debug_handle))

    def unary(self, kind: type, x: int, out: int | None = None) -> int:
        out = self.value(self.dims(x)) if out is None else out
        self.node(kind(input_id=x, output_id=out, flags=0))
        return out

    def binary(self, kind: type, a: int, b: int, out: int | None = None) -> int:
        if out is None:
            out = self.value(broadcast(self.dims(a), self.dims(b)))
        self.node(kind(input1_id=a, input2_id=b, output_id=out, flags=0))
        return out

    def quantize_rows(self, x: int) -> int:
        """Per-token dynamic int8: one scale and zero point for each row of the last dimension."""
        out = self.value(
            self.dims(x),
            XNNDatatype.xnn_datatype_qdint8,
            quantization=PerTokenDynamicQuant(num_nonbatch_dims=1),
        )
        self.node(XNNConvert(input_id=x, output_id=out, flags=0))
        return out

    def fully_connected(self, x: int, weight: int, bias: int | None, out: int | None = None) -> int:
        if out is None:
            out = self.value([*self.dims(x)[:-1], self.dims(weight)[0]])
        self.node(
            XNNFullyConnected(
                input1_id=x,
                filter_id=weight,
                bias_id=XNN_INVALID_VALUE_ID if bias is None else bias,
                output_id=out,
                flags=0,
            )
        )
        return out

    def matmul(self, a: int, b: int, *, transpose_b: bool) -> int:
        """Batch matrix product; batch dimensions broadcast."""
        left, right = self.dims(a), self.dims(b)
        columns = right[-2] if transpose_b else right[-1]
        out = self.value([*broadcast(left[:-2], right[:-2]), left[-2], columns])
        flags = XNN_FLAG_TRANSPOSE_B if transpose_b else 0
        self.node(XNNBatchMatrixMultiply(input1_id=a, input2_id=b, output_id=out, flags=flags))
        return out

    def reshape(self, x: int, shape: Sequence[int], dims: Sequence[int], out: int | None = None):
        """``shape`` holds 0 for the one dimension to infer; ``dims`` are the upper bounds."""
        out = self.value(dims) if out is None else out
        self.node(
            XNNStaticReshape(
                num_dims=len(shape), new_shape=list(shape), input_id=x, output_id=out, flags=0
            )
        )
        return out

    def transpose(self, x: int, perm: Sequence[int], out: int | None = None) -> int:
        dims = self.dims(x)
        out = self.value([dims[i] for i in perm]) if out is None else out
        self.node(
            XNNStaticTranspose(
                num_dims=len(perm), perm=list(perm), input_id=x, output_id=out, flags=0
            )
        )
        return out

    def slice_last(self, x: int, start: int, stop: int, out: int | None = None) -> int:
        dims = self.dims(x)
        sizes = [*dims[:-1], stop - start]
        out = self.value(sizes) if out is None else out
        self.node(
            XNNStaticSlice(
                num_dims=len(dims),
                offsets=[0] * (len(dims) - 1) + [start],
                sizes=sizes,
                input_id=x,
                output_id=out,
                flags=0,
            )
        )
        return out

    def concatenate_last(self, a: int, b: int, out: int | None = None) -> int:
        left, right = self.dims(a), self.dims(b)
        out = self.value([*left[:-1], left[-1] + right[-1]]) if out is None else out
        invalid = XNN_INVALID_VALUE_ID
        self.node(
            XNNConcatenate2(
                axis=len(left) - 1,
                input1_id=a,
                input2_id=b,
                input3_id=invalid,
                input4_id=invalid,
                input5_id=invalid,
                output_id=out,
                flags=0,
            )
        )
        return out


def broadcast(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The broadcast of two shapes of static sizes."""
    return list(torch.broadcast_shapes(tuple(a), tuple(b)))
