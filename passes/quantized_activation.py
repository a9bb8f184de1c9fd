"""Read the dynamic quantization of an activation, in either dialect, as int8 per token."""

from typing import Any

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.matching import Match
from edgepass.passes.pattern import Pattern, any_of, attr, named, ops
from edgepass.passes.rule import Refusal
from edgepass.passes.shapes import fake_tensor, same_size
from edgepass.passes.targets import argument, is_call, operator_name

torchao = ops("torchao")
quantized_decomposed = ops("quantized_decomposed")

QUANTIZE = "edgepass.quantize_per_token"
# quantized_decomposed's choose_qparams_per_token_asymmetric has this floor for every dtype.
_DECOMPOSED_FLOOR = torch.finfo(torch.float32).eps


def dynamic_quantization(x: Any) -> Pattern:
    """Match ``x`` quantized and dequantized per token.

    Binds ``choose``, ``quantize`` and ``dequantize``; check them with ``check_activation``.
    """
    return any_of(_torchao_form(x), _decomposed_form(x))


def _torchao_form(x: Any) -> Pattern:
    block = attr("block_size")
    choose = named("choose", torchao.choose_qparams_affine(x, attr("mapping"), block, ...))
    scale, zero = choose[0], choose[1]
    quantize = named("quantize", torchao.quantize_affine(x, block, scale, zero, ...))
    dequantize = torchao.dequantize_affine(quantize, block, scale, zero, ...)
    return named("dequantize", dequantize)


def _decomposed_form(x: Any) -> Pattern:
    asymmetric = quantized_decomposed.choose_qparams_per_token_asymmetric
    asymmetric |= quantized_decomposed._choose_qparams_per_token_asymmetric_impl
    choose = named("choose", asymmetric(x, ...))
    scale, zero = choose[0], choose[1]
    per_token = quantized_decomposed.quantize_per_token
    quantize = named("quantize", per_token(x, scale, zero, ...))
    inverse = quantized_decomposed.dequantize_per_token
    return named("dequantize", inverse(quantize, scale, zero, ...))


def check_activation(match: Match) -> Refusal | None:
    """Refuse all but asymmetric int8, -128..127, one encoding a token."""
    if is_call(match.choose, "torchao.choose_qparams_affine"):
        refusal = _check_torchao(match)
        if refusal is not None:
            return refusal
    for call in (match.quantize, match.dequantize):
        low, high = argument(call, "quant_min"), argument(call, "quant_max")
        if (low, high) not in ((-128, 127), (None, None)):
            return Refusal(f"{call.name} has the range {low}..{high}, expected -128..127", call)
    values = fake_tensor(match.quantize)
    if values is None or values.dtype != torch.int8:
        got = None if values is None else values.dtype
        return Refusal(f"the activation is quantized to {got}, expected int8", match.quantize)
    return None


def _check_torchao(match: Match) -> Refusal | None:
    choose, x = match.choose, fake_tensor(match.x)
    mapping = argument(choose, "mapping_type")
    if mapping != "ASYMMETRIC":
        return Refusal(f"the activation's mapping is {mapping}, expected ASYMMETRIC", choose)
    block = list(argument(choose, "block_size"))
    whole = x is not None and len(block) == x.dim() and same_size(block[-1], x.shape[-1])
    if not whole or any(size != 1 for size in block[:-1]):
        return Refusal(f"the activation's blocks are {block}, expected one a token", choose)
    bounds = (argument(choose, "quant_min"), argument(choose, "quant_max"))
    if bounds not in ((-128, 127), (None, None)):
        return Refusal(f"{choose.name} has the range {bounds}, expected -128..127", choose)
    scale = argument(choose, "scale_dtype")
    if scale is not None and x is not None and scale != x.dtype:
        return Refusal(f"the activation's scales are {scale}, the values {x.dtype}", choose)
    return None


def scale_floor(choose: Node) -> float | None:
    """Return the least scale that the choice allows; None for the default of the operator."""
    if operator_name(choose.target) == "torchao.choose_qparams_affine":
        return argument(choose, "eps")
    return _DECOMPOSED_FLOOR


def quantize_once(match: Match, editor: Editor) -> Node:
    """Return the ``edgepass::quantize_per_token`` call of the activation, made at first use."""
    floor = scale_floor(match.choose)
    arguments = (match.x,) if floor is None else (match.x, floor)
    if not editor.program.mutations.is_changed(match.x):
        for user in match.x.users:
            if is_call(user, QUANTIZE) and user.args == arguments and user < match.anchor:
                return user
    call = editor.call(torch.ops.edgepass.quantize_per_token, *arguments)
    known = _known_result(match)
    if known is not None:
        call.meta["val"] = known
    return call


def _known_result(match: Match) -> tuple[torch.Tensor, ...] | None:
    """Return the fake results if the replaced calls have them: torchao's have the same form."""
    x, q = fake_tensor(match.x), fake_tensor(match.quantize)
    scale, zero = match.choose.meta["val"]
    if x is None or q is None or zero.dtype != torch.int8:
        return None
    return (q, scale, zero) if scale.dim() == x.dim() - 1 and scale.dtype == x.dtype else None
