"""How much quantizing one site alone changes the logits, of all sites by one backward pass.

To second order the divergence KL(p || p') of the logits' distribution after a change d of the
logits is d^T F d / 2, with F = diag(p) - p p^T, their Fisher information. A random vector v of the
covariance F gives E[(v . d)^2] = d^T F d, and by the chain rule v . d = g . e, where e is the error
at the site and g the gradient of (v . logits) there: one backward pass serves every site and every
candidate. The errors of a weight are alike where tokens are, so that their products are summed over
blocks of tokens before they are squared: longer blocks miss less, but of one chunk there are fewer
of them. The rounding of values is taken as uncorrelated: a token's share is (g_t . e_t)^2. The
head's own candidates are not estimated: their divergence is computed.

The loss of a text grows by something else than the divergence wherever the model is not at its
minimum on that text: an error along the gradient of the loss changes it to first order. A second
backward pass, of the loss itself, gives that slope: g . e, summed over tokens.

v = sqrt(p) r - p (sqrt(p) . r) with random signs r has that covariance, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.attention_probes import watch_attention
from edgepass.calibration.candidates import Choice
from edgepass.calibration.grids import RoundedWeight
from edgepass.calibration.rounding_error import Rounding, rounding_of, weight_error
from edgepass.calibration.sites import SitePlace
from edgepass.calibration.weight_rounding import quantize_weight
from edgepass.ops.errors import CalibrationError

# The head's divergence, which takes a softmax of the vocabulary a candidate, is computed for every
# so many tokens.
_HEAD_STRIDE = 4
# Tokens whose errors are summed. On SmolLM2-135M 64 come nearest to the exact divergences, nearer
# than single tokens, whole chunks, or the mean error apart from the rest.
_BLOCK = 64
# Of each candidate on one chunk: the divergence a token, the power of the site's values, that of
# their error, and by how much the text's loss changes to first order, a predicted token.
MEASURES = ("kl", "signal", "error", "slope")


@dataclass
class Measured:
    """A site and its candidates, with all that measuring them needs."""

    place: SitePlace
    choices: Sequence[Choice]
    rounded: list[RoundedWeight] = field(default_factory=list)
    roundings: list[Rounding] = field(default_factory=list)


def prepare_sites(model: nn.Module, sites: Mapping[SitePlace, Sequence[Choice]]) -> list[Measured]:
    """Round the weight of each site by each of its candidates: a byte a value is kept.

    Algorithms that need calibration are stood in for by the nearest that needs none.
    """
    measured, known = [], {}
    for place, choices in sites.items():
        each = Measured(place, choices)
        for choice in choices:
            if choice.spec is None:
                assert choice.bits is not None, "an activation has bits"
                asked = choice.activations
                each.roundings.append(rounding_of(choice.bits, asked.kind if asked else None))
                continue
            weight: Any = model.get_submodule(place.module).weight
            key = (id(weight), choice.spec)
            if key not in known:
                _check_finite(weight, f"the weight of {place.name}")
                known[key] = quantize_weight(weight.detach(), choice.spec)  # type: ignore[arg-type]
            each.rounded.append(known[key])
        measured.append(each)
    return measured


class SensitivityProbe:
    """Measures all candidates of all sites on one chunk: a forward and two backward passes."""

    def __init__(self, model: Any, sites: Sequence[Measured], seed: int) -> None:
        self.model, self.sites, self.seed = model, sites, seed
        self._rows: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}
        self._of_loss = False  # whose gradients the hooks are given: the loss's, or v's

    def run(self, chunk: Tensor, number: int) -> Tensor:
        """The MEASURES of each candidate, site by site, on token ids ``chunk`` ``[T]``.

        Float64 ``[candidates, 4]``. ``number`` is the chunk's in the text: with the seed it decides
        the random signs. Raises CalibrationError for values or gradients that are not finite.
        """
        self._rows, self._slopes, self._of_loss = {}, {}, False
        with ExitStack() as stack, torch.enable_grad():
            for site in self.sites:
                self._watch(site, stack)
            if not any(site.place.kind == "embedding" for site in self.sites):
                table = self.model.get_input_embeddings()
                start = table.register_forward_hook(lambda _, args, out: out.requires_grad_())
                stack.callback(start.remove)
            watch_attention(stack, self.model, self.sites, self._note_parts)
            logits = self.model(chunk[None], use_cache=False).logits[0]
            _check_finite(logits, "the logits")
            logits.backward(self._direction(logits.detach(), number), retain_graph=True)
            self._of_loss = True
            loss = nn.functional.cross_entropy(logits[:-1].float(), chunk[1:])
            loss.backward()
        for site in self.sites:
            if site.place.name not in self._rows:
                raise CalibrationError(
                    f"no data: got no value of {site.place.name} in chunk {number}, accepted are "
                    "texts that reach every site"
                )
        names = [site.place.name for site in self.sites]
        rows = torch.cat([self._rows[name] for name in names])
        return torch.cat([rows, torch.cat([self._slopes[name] for name in names])[:, None]], dim=1)

    def _put(self, site: Measured, found: list[Tensor]) -> None:
        """Keep what was measured of a site in this pass: it is computed once a chunk."""
        kept = self._slopes if self._of_loss else self._rows
        if site.place.name in kept:
            raise CalibrationError(
                f"computed twice: got {site.place.name} twice in one pass, accepted are models "
                "that call each module once"
            )
        kept[site.place.name] = torch.stack(found)

    def _direction(self, logits: Tensor, number: int) -> Tensor:
        # torch's generator reads the low 32 bits of a seed only.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8)
        return fisher_direction(logits.softmax(-1), signs.mul_(2).sub_(1))

    def _watch(self, site: Measured, stack: ExitStack) -> None:
        place = site.place
        if place.part is not None:
            return
        module = self.model.get_submodule(place.module)
        if place.kind == "activation":
            hook = module.register_forward_pre_hook(lambda _, args: self._input(site, args[0]))
        elif place.kind == "head":
            hook = module.register_forward_hook(lambda _, args, out: self._head(site, args[0], out))
        elif place.kind == "embedding":
            hook = module.register_forward_hook(
                lambda _, args, out: self._table(site, args[0], out)
            )
        else:
            hook = module.register_forward_hook(
                lambda _, args, out: self._weight(site, args[0], out)
            )
        stack.callback(hook.remove)

    def _input(self, site: Measured, x: Tensor) -> None:
        # Hooks keep what they refer to: the value without its graph, or nothing is ever freed.
        value = x.detach()
        if x.requires_grad:
            x.register_hook(lambda grad: self._note_parts(site, [(value, grad)]))

    def _weight(self, site: Measured, x: Tensor, out: Tensor) -> None:
        weight: Any = self.model.get_submodule(site.place.module).weight
        _check_finite(out, site.place.name)
        rows, result = x.detach().flatten(0, -2), out.detach()

        def note(grad: Tensor) -> None:
            _check_finite(grad, site.place.name)
            flat = grad.flatten(0, -2)
            if self._of_loss:
                self._put(site, _slopes(site, weight, flat, rows))
                return
            signal = result.double().square().sum()
            found = []
            for rounded in site.rounded:
                error = rows @ weight_error(rounded, weight).t()
                found.append(_measures(_divergence(flat, error), signal, error))
            self._put(site, found)

        out.register_hook(note)

    def _table(self, site: Measured, ids: Tensor, out: Tensor) -> Tensor:
        """The embedding: the first value that is differentiated, so that all behind it are."""
        weight: Any = self.model.get_submodule(site.place.module).weight
        scale = _embedding_scale(self.model.get_submodule(site.place.module))
        value = out.detach()
        start = value.clone().requires_grad_()
        rows = ids.flatten()

        def note(grad: Tensor) -> None:
            _check_finite(grad, site.place.name)
            flat, signal = grad.flatten(0, -2), value.double().square().sum()
            found = []
            for rounded in site.rounded:
                error = _rows_of(rounded, rows).dequantize() - weight[rows]
                error *= scale
                if self._of_loss:
                    found.append((flat * error).double().sum())
                else:
                    found.append(_measures(_divergence(flat, error), signal, error))
            self._put(site, found)

        start.register_hook(note)
        return start

    def _head(self, site: Measured, x: Tensor, out: Tensor) -> None:
        weight: Any = self.model.get_submodule(site.place.module).weight
        every = x.detach().flatten(0, -2)

        def note(grad: Tensor) -> None:
            if self._of_loss:
                self._put(site, _slopes(site, weight, grad.flatten(0, -2), every))

        out.register_hook(note)
        rows, logits = every[::_HEAD_STRIDE], out.detach().flatten(0, -2)[::_HEAD_STRIDE]
        known = self._capped(logits).log_softmax(-1)
        signal = logits.double().square().sum()
        found = []
        with torch.no_grad():
            for rounded in site.rounded:
                error = rows @ weight_error(rounded, weight).t()
                other = self._capped(logits + error).log_softmax(-1)
                divergence = (known.exp() * (known - other)).sum(-1).double().clamp(min=0)
                found.append(_measures(divergence.mean(), signal, error))
        self._put(site, found)

    def _capped(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's output: Gemma 2 caps it softly."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _note_parts(self, site: Measured, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Values that are rounded themselves, each with its gradient, tokens in dimension -2."""
        for _, grad in parts:
            _check_finite(grad, site.place.name)
        if self._of_loss:
            self._put(site, [_slope_of_parts(parts, each) for each in site.roundings])
            return
        signal = sum(value.double().square().sum() for value, _ in parts)
        found = []
        for rounding in site.roundings:
            along, power = torch.zeros(2, dtype=torch.float64)
            for value, grad in parts:
                error = rounding(value) - value
                shares = (grad * error).double().sum(-1)
                # All heads of a token count together, where there are heads.
                while shares.dim() > 1:
                    shares = shares.sum(0)
                along = along + shares.square()
                power = power + error.double().square().sum()
            found.append(torch.stack([0.5 * along.mean(), torch.as_tensor(signal), power]))
        self._put(site, found)


def fisher_direction(p: Tensor, signs: Tensor) -> Tensor:
    """A vector a token whose covariance over random ``signs`` is diag(p) - p p^T, ``[T, V]``."""
    drawn = p.sqrt() * signs
    return drawn - p * drawn.sum(-1, keepdim=True)


def _divergence(grad: Tensor, error: Tensor) -> Tensor:
    """The divergence a token of an error ``[T, N]`` with gradient ``[T, N]``, float64."""
    shares = (grad * error).sum(-1).double()
    blocks = torch.nn.functional.pad(shares, (0, -len(shares) % _BLOCK)).view(-1, _BLOCK)
    return 0.5 * blocks.sum(1).square().sum() / len(shares)


def _slope_of_parts(parts: Sequence[tuple[Tensor, Tensor]], rounding: Rounding) -> Tensor:
    changes = [((rounding(value) - value) * grad).double().sum() for value, grad in parts]
    return torch.stack(changes).sum()


def _slopes(site: Measured, weight: Tensor, grad: Tensor, rows: Tensor) -> list[Tensor]:
    """The loss's first-order change by each candidate of a weight, from the gradient ``[T, N]`` of
    its linear's output and the linear's input ``[T, K]``."""
    gradient = grad.t() @ rows
    return [
        (gradient * weight_error(rounded, weight)).sum(dtype=torch.float64)
        for rounded in site.rounded
    ]


def _measures(divergence: Tensor, signal: Tensor, error: Tensor) -> Tensor:
    return torch.stack([divergence, signal, error.double().square().sum()])


def _rows_of(rounded: RoundedWeight, rows: Tensor) -> RoundedWeight:
    values, scale, zero = rounded
    return RoundedWeight(values[rows], scale[rows], None if zero is None else zero[rows])


def _embedding_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by (Gemma)."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale)


def _check_finite(value: Tensor, name: str) -> None:
    if not bool(value.isfinite().all()):
        raise CalibrationError(
            f"not finite: got NaN or infinity in {name} during the analysis, accepted are models "
            "and texts with finite values"
        )
