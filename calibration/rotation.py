"""SpinQuant's rotations R1 and R2, folded into the weights: the same model on smoother values.

Liu et al., "SpinQuant: LLM Quantization with Learned Rotations" (2024). R1 turns the residual
stream, R2 the values of each head; both cancel out, because every linear that reads a turned value
is turned back. ExecuTorch applies them the same way to matrices that come with a checkpoint
(``examples/models/llama/source_transformation/apply_spin_quant_r1_r2.py``); here they are random
orthogonal matrices, which spread outliers over all channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.decoder_layers import find_layers
from edgepass.ops.errors import InvalidArgumentError

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@torch.no_grad()
def rotate(model: Any, seed: int = 0) -> None:
    """Turn ``model`` in place; its logits stay equal up to rounding.

    The norms' weights go into the linears behind them, so that a head that was tied to the
    embedding is tied no more.

    Raises InvalidArgumentError for a model whose layers are not those of Llama: attention and a
    gated MLP, each behind one RMSNorm.
    """
    layers, final = _checked(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(seed)
    turn = _orthogonal(table.weight.shape[1], generator)
    _store(table.weight, table.weight.double() @ turn)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        _read_turned(layer.input_layernorm, readers, turn)
        _read_turned(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), turn)
        _write_turned(attention.o_proj, turn)
        _write_turned(mlp.down_proj, turn)
        _turn_heads(attention, _orthogonal(attention.head_dim, generator))
    _read_turned(final, (head,), turn)


def _checked(model: Any) -> tuple[list[Any], nn.Module]:
    """The layers and the last norm, if all have the form that the rotations need."""
    layers = [layer for _, layer in find_layers(model)]
    final: Any = getattr(model.get_decoder(), "norm", None)
    norms = [final]
    for layer in layers:
        children = {name for name, _ in layer.named_children()}
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        known = all(hasattr(attention, f"{each}_proj") for each in "qkvo")
        known &= all(hasattr(mlp, f"{each}_proj") for each in ("gate", "up", "down"))
        if children != _PARTS or not known:
            raise _refused(model, f"layers of {', '.join(sorted(children))}")
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        if norm is None or not _is_rms_norm(norm):
            raise _refused(model, f"a norm of {type(norm).__name__}")
    return layers, final


def _is_rms_norm(norm: Any) -> bool:
    """Whether ``norm`` scales x / rms(x) by its weight alone."""
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None:
        return False
    x = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype)[None]
    expected = x.float() * (x.float().square().mean() + 1e-6).rsqrt() * weight.float()
    return bool((norm(x).float() - expected).abs().max() <= 1e-2 * expected.abs().max())


def _refused(model: Any, found: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"rotation=spinquant does not fit: got model={type(model).__name__} with {found}; accepted "
        "are layers as Llama's, an RMSNorm before attention and one before a gated MLP"
    )


def _read_turned(norm: Any, readers: tuple[Any, ...], turn: Tensor) -> None:
    """Let linears behind a norm read turned values, with the norm's weight in them."""
    scale = norm.weight.double()
    for linear in readers:
        _store(linear.weight, linear.weight.double() * scale @ turn)
    norm.weight.fill_(1.0)


def _write_turned(linear: Any, turn: Tensor) -> None:
    _store(linear.weight, turn.t() @ linear.weight.double())
    if linear.bias is not None:
        _store(linear.bias, linear.bias.double() @ turn)


def _turn_heads(attention: Any, turn: Tensor) -> None:
    """Turn each head's values, and let the output projection turn them back."""
    values, out = attention.v_proj, attention.o_proj
    size = turn.shape[0]
    heads = values.weight.double().unflatten(0, (-1, size))
    _store(values.weight, (turn.t() @ heads).flatten(0, 1))
    if values.bias is not None:
        _store(values.bias, (values.bias.double().unflatten(0, (-1, size)) @ turn).flatten())
    _store(out.weight, (out.weight.double().unflatten(1, (-1, size)) @ turn).flatten(1))


def _store(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64, uniformly distributed (the signs of R fixed)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
