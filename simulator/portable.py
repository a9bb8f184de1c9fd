"""Kernels outside the delegates, as ExecuTorch's portable library computes them: torch's own.

Only names that ``kernels/portable/functions.yaml`` and ``kernels/prim_ops`` list are known. A
program could name any operator of torch, some of which open files.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgepass.ops.errors import EdgepassError, SimulatorError
from edgepass.simulator.checks import check_size
from edgepass.simulator.flatbuffer import Record
from edgepass.simulator.plan import References
from edgepass.simulator.slots import Slots

_ATEN = """
_log_softmax.out _softmax.out _to_copy.out abs.out acos.out acosh.out add.out add.Scalar_out
addmm.out alias_copy.out amax.out amin.out any.all_out any.dims_out any.out arange.out
arange.start_out argmax.out argmin.out asin.out asinh.out atan.out atan2.out atanh.out
bitwise_and.Scalar_out bitwise_and.Tensor_out bitwise_not.out bitwise_or.Scalar_out
bitwise_or.Tensor_out bitwise_xor.Scalar_out bitwise_xor.Tensor_out bmm.out cat.out ceil.out
clamp.out clamp.Tensor_out clone.out constant_pad_nd.out copy.out copy_ cos.out cosh.out cumsum.out
detach_copy.out div.out div.Scalar_mode_out div.Scalar_out div.out_mode embedding.out empty.out
eq.Scalar_out eq.Tensor_out elu.out erf.out exp.out expand_copy.out expm1.out fill.Scalar_out
fill.Tensor_out flip.out floor.out floor_divide.out fmod.Tensor_out fmod.Scalar_out full.out
full_like.out gather.out ge.Scalar_out ge.Tensor_out gelu.out glu.out gt.Scalar_out gt.Tensor_out
hardtanh.out index.Tensor_out index_copy.out index_put.out index_put_ index_select.out isinf.out
isnan.out le.Scalar_out le.Tensor_out leaky_relu.out lift_fresh_copy.out log.out log10.out log1p.out
log2.out logical_and.out logical_not.out logical_or.out logical_xor.out lt.Scalar_out lt.Tensor_out
masked_fill.Scalar_out max.dim_max max.unary_out maximum.out mean.out min.dim_min min.unary_out
minimum.out mm.out mul.out mul.Scalar_out narrow_copy.out native_group_norm.out
native_layer_norm.out ne.Scalar_out ne.Tensor_out neg.out ones.out permute_copy.out pow.Scalar_out
pow.Tensor_Scalar_out pow.Tensor_Tensor_out prod.int_out prod.out reciprocal.out relu.out
remainder.Tensor_out remainder.Scalar_out repeat.out roll.out round.out rsqrt.out rsub.Scalar_out
scalar_tensor.out scatter.src_out scatter.value_out scatter_add.out select_copy.int_out
select_scatter.out sigmoid.out sign.out sin.out sinh.out slice_copy.Tensor_out slice_scatter.out
split_copy.Tensor_out split_with_sizes_copy.out sqrt.out squeeze_copy.dim_out squeeze_copy.dims_out
stack.out sub.out sub.Scalar_out sum.IntList_out t_copy.out tan.out tanh.out topk.values
transpose_copy.int_out tril.out trunc.out unbind_copy.int_out unsqueeze_copy.out var.correction_out
var.out view_copy.out where.self_out zeros.out
"""
_KNOWN_ATEN = frozenset(name if "." in name else name + ".default" for name in _ATEN.split())


_PRIMITIVES: dict[str, Callable[..., Any]] = {
    "aten::sym_size.int": lambda x, dim: x.shape[dim],
    "aten::sym_numel": lambda x: x.numel(),
    "aten::_local_scalar_dense": lambda x: x.item(),
    "executorch_prim::add.Scalar": operator.add,
    "executorch_prim::ceil.Scalar": math.ceil,
    "executorch_prim::eq.Scalar": operator.eq,
    "executorch_prim::floordiv.Scalar": operator.floordiv,
    "executorch_prim::floordiv.int": operator.floordiv,
    "executorch_prim::ge.Scalar": operator.ge,
    "executorch_prim::gt.Scalar": operator.gt,
    "executorch_prim::le.Scalar": operator.le,
    "executorch_prim::lt.Scalar": operator.lt,
    "executorch_prim::mod.Scalar": operator.mod,
    "executorch_prim::mod.int": operator.mod,
    "executorch_prim::mul.Scalar": operator.mul,
    "executorch_prim::neg.Scalar": operator.neg,
    "executorch_prim::round.Scalar": round,
    "executorch_prim::sub.Scalar": operator.sub,
    "executorch_prim::sym_float.Scalar": float,
    "executorch_prim::sym_int.Scalar": int,
    "executorch_prim::sym_ite.Scalar": lambda which, yes, no: yes if which else no,
    "executorch_prim::sym_max.Scalar": max,
    "executorch_prim::sym_min.Scalar": min,
    "executorch_prim::sym_not.Scalar": operator.not_,
    "executorch_prim::truediv.Scalar": operator.truediv,
    "executorch_prim::trunc.Scalar": math.trunc,
    # A view of the same values: what is written to either later is not seen by the other, which
    # the planner rules out by views of values that are not written any more.
    "executorch_prim::et_view.default": lambda x, sizes: x.reshape(sizes),
}
# Names of edge dialects for copies; they give the source's values in the result's dtype.
_COPIES = ("dim_order_ops::_to_dim_order_copy.out", "dim_order_ops::_clone_dim_order.out")
# Where the sizes of what they make come from, of operators that make more than they are given.
_SIZES: dict[str, Callable[..., Sequence[int]]] = {
    "full": lambda size, *_: size,
    "zeros": lambda size, *_: size,
    "ones": lambda size, *_: size,
    "empty": lambda size, *_: size,
    "expand_copy": lambda x, size, *_: x.expand(size).shape,
    "repeat": lambda x, repeats, *_: [x.numel(), *repeats],
    "arange": lambda *ends: [len(range(*map(int, ends)))],
    "constant_pad_nd": lambda x, pad, *_: [size + sum(map(abs, pad)) for size in x.shape],
}


class PortableKernel:
    """One operator of a program's table, ready to be called."""

    def __init__(self, name: str) -> None:
        """Find the operator. Raises SimulatorError that names it when it is not known."""
        self.name = name
        space, _, rest = name.partition("::")
        self._primitive = _PRIMITIVES.get(name)
        self._overload: Any = None
        if self._primitive is None and name not in _COPIES:
            base, _, overload = rest.partition(".")
            if space != "aten" or f"{base}.{overload or 'default'}" not in _KNOWN_ATEN:
                raise SimulatorError(
                    f"unknown operator: got {name} outside the delegates; known are those of "
                    "ExecuTorch's portable kernels"
                )
            self._overload = getattr(getattr(torch.ops.aten, base), overload or "default")
            self._sizes = _SIZES.get(base)

    def call(self, slots: Slots, arguments: list[int]) -> None:
        """Compute from the values of ``arguments`` and write to the last of them."""
        try:
            if self._overload is not None:
                self._call_aten(slots, arguments)
            elif self._primitive is not None:
                values = [slots.read(number) for number in arguments[:-1]]
                slots.write(arguments[-1], self._primitive(*values))
            else:
                slots.write(arguments[-1], slots.read(arguments[0]).clone())
        except EdgepassError:
            raise
        except Exception as error:  # whatever torch says of arguments that an altered file names
            reason = str(error).partition("\n")[0]
            raise SimulatorError(
                f"{self.name}: its arguments do not go together ({reason}); accepted are calls as "
                "ExecuTorch writes them"
            ) from error

    def _call_aten(self, slots: Slots, arguments: list[int]) -> None:
        schema = self._overload._schema.arguments
        if len(arguments) < len(schema):
            raise SimulatorError(f"{self.name}: got {len(arguments)} arguments of {len(schema)}")
        positional, named, results = [], {}, []
        for number, argument in zip(arguments, schema, strict=False):
            if argument.is_out:
                value = self._empty(slots, number)
                results.append((number, value))
            else:
                value = slots.read(number)
            if argument.kwarg_only:
                named[argument.name] = value
            else:
                positional.append(value)
        if self._sizes is not None:
            largest = slots.plans[results[0][0]].shape
            check_size(self._sizes(*positional), largest, self.name)
        self._overload(*positional, **named)
        for number, value in results:
            self._write(slots, number, value)

    def _empty(self, slots: Slots, number: int) -> Any:
        plan = slots.plans[number]
        if isinstance(plan, References):
            return [self._empty(slots, each) for each in plan.ids]
        return torch.empty(0, dtype=plan.dtype)

    def _write(self, slots: Slots, number: int, value: Any) -> None:
        if isinstance(value, list):
            for each, part in zip(slots.plans[number].ids, value, strict=True):
                self._write(slots, each, part)
        else:
            slots.write(number, value)


def portable_kernel(record: Record) -> PortableKernel:
    """Return the kernel for an ``Operator`` of a program's table."""
    name = record.name or ""
    return PortableKernel(f"{name}.{record.overload}" if record.overload else name)
