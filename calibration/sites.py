"""The quantized sites of a decoder: everything that a recipe may quantize, each with its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.analysis import SiteKind
from edgepass.calibration.decoder_layers import find_layers
from edgepass.calibration.recipe_modules import quantized_sites

# The parts of attention that are quantized, and what a site of each is called.
ATTENTION_PARTS = ("scores", "context", "keys", "values")


@dataclass(frozen=True)
class SitePlace:
    """One site: see ``analysis.Site``. ``module`` is what is watched: a linear, an embedding, or
    the attention module of ``layer``; ``part`` is one of ATTENTION_PARTS there."""

    name: str
    kind: SiteKind
    module: str
    role: str
    shape: tuple[int, ...]
    modules: tuple[str, ...] = ()
    layer: int | None = None
    agrees: str | None = None
    part: str | None = None


def find_sites(model: Any) -> list[SitePlace]:
    """The sites of a ``transformers`` decoder, in the order in which they are computed.

    - each linear's weight, the embedding and the head, by the path of their module;
    - each value that linears read, once for all that read it, as ``PATH:input`` of the first;
    - a layer's attention: the products ``:scores`` (query and key) and ``:context`` (probabilities
      and values), the caches ``:keys`` and ``:values``.

    A head that is tied to the embedding agrees with it, as all caches do: a recipe has one
    ``kv_cache.bits``. Raises CalibrationError for a model without a list of layers.
    """
    roles = quantized_sites(model)
    weights = {name: model.get_submodule(name).weight for name in roles}
    layers = {path: index for index, (path, _) in enumerate(find_layers(model))}
    attentions = _attention_modules(model, layers)
    inputs = _shared_inputs(model, [n for n, role in roles.items() if role != "embedding"])
    sites: list[SitePlace] = []
    for name, role in roles.items():
        layer = _layer_of(name, layers)
        for path in attentions.pop(layer, ()):
            sites += _attention_sites(model, path, layer)
        if name in inputs:
            sites.append(
                SitePlace(
                    f"{name}:input",
                    "activation",
                    name,
                    f"{name.rpartition('.')[2]}:input",
                    (int(weights[name].shape[1]),),
                    inputs[name],
                    layer,
                )
            )
        tied = [n for n, weight in weights.items() if weight is weights[name]]
        sites.append(
            SitePlace(
                name,
                "weight" if role == "linear" else role,
                name,
                name.rpartition(".")[2],
                tuple(int(size) for size in weights[name].shape),
                (name,),
                layer,
                "tied table" if len(tied) > 1 else None,
            )
        )
    return sites


def _layer_of(name: str, layers: dict[str, int]) -> int | None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        found = layers.get(".".join(parts[:end]))
        if found is not None:
            return found
    return None


def _attention_modules(model: nn.Module, layers: dict[str, int]) -> dict[int | None, list[str]]:
    """By layer the paths of the modules that call attention: those that know their layer."""
    found: dict[int | None, list[str]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "layer_idx") and hasattr(module, "head_dim"):
            found.setdefault(_layer_of(path, layers), []).append(path)
    found.pop(None, None)
    return found


def _attention_sites(model: nn.Module, path: str, layer: int | None) -> list[SitePlace]:
    width = int(model.get_submodule(path).head_dim)  # type: ignore[arg-type]
    return [
        SitePlace(
            f"{path}:{part}",
            "kv_cache" if part in ("keys", "values") else "attention",
            path,
            f"{path.rpartition('.')[2]}:{part}",
            (width,),
            (),
            layer,
            "caches" if part in ("keys", "values") else None,
            part,
        )
        for part in ATTENTION_PARTS
    ]


@torch.no_grad()
def _shared_inputs(model: Any, names: list[str]) -> dict[str, tuple[str, ...]]:
    """For the first reader of each value, all linears that read it (in one forward of 2 tokens)."""
    seen: list[tuple[Tensor, list[str]]] = []  # holds the tensors, so that none takes another's id

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for value, readers in seen:
                if value is args[0]:
                    readers.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    try:
        model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {readers[0]: tuple(readers) for _, readers in seen}
