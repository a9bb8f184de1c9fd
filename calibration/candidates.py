"""The ways to quantize a site that an analysis tries, and the packed bytes of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgepass.calibration.analysis import SiteKind
from edgepass.calibration.recipe import Recipe, Role
from edgepass.calibration.recipe_resolution import ModuleRecipe, WeightSpec
from edgepass.calibration.recipe_sections import Activations, Backend, KvCache, Weights
from edgepass.calibration.sites import SitePlace

# Columns that share a scale; those that divide a row are tried, beside the recipe's own.
GROUP_SIZES = (16, 32, 64, 128, 192)
# Of LPBQ blocks: those that HTP computes right however many there are, in rows of whole vectors.
BLOCK_SIZES = (16, 32)
_VECTOR = 32

# Whether a backend holds what a module gets: ``holds(backend, module, role)``.
Holds = Callable[[Backend, ModuleRecipe, Role], bool]


@dataclass(frozen=True)
class Choice:
    """A candidate before it is measured: what a recipe asks for, resolved, and its bytes."""

    label: str
    spec: WeightSpec | None
    bits: int | None
    bytes: Mapping[Backend, int]
    weights: Weights | None = None
    activations: Activations | None = None
    kv_cache: KvCache | None = None


def choices_of(
    site: SitePlace, recipe: Recipe, backends: tuple[Backend, ...], holds: Holds
) -> list[Choice]:
    """The candidates of one site, what ``recipe`` itself gives it among them.

    A weight: 4 bits by groups of several sizes (blocks, for recipes with static activations) and by
    channel, and 8 bits by channel. An activation: 8 and 16 bits, and what the recipe gives it. A
    cache: 8 and 16 bits.
    """
    if site.kind in ("weight", "embedding", "head"):
        return _weight_choices(site, recipe, backends, holds)
    if site.kind == "activation":
        return _activation_choices(site, recipe, backends, holds)
    stores: dict[Backend, int] = {"qnn": 0} if "qnn" in backends else {}
    if site.kind == "kv_cache":
        return [
            Choice(f"int{bits}", None, bits, stores, kv_cache=KvCache(bits=bits))
            for bits in (8, 16)
        ]
    return [
        Choice(f"int{bits}", None, bits, stores, activations=Activations(kind="static", bits=bits))
        for bits in (8, 16)
    ]


def role_of_kind(kind: SiteKind) -> Role:
    """The part in a recipe of a module that is a site of ``kind``."""
    if kind == "embedding":
        return "embedding"
    return "head" if kind == "head" else "linear"


def _weight_choices(
    site: SitePlace, recipe: Recipe, backends: tuple[Backend, ...], holds: Holds
) -> list[Choice]:
    base = recipe.for_module(site.module, role_of_kind(site.kind))
    blocks = base.activations.kind == "static" or base.weights.granularity == "block"
    kind = "block" if blocks else "group"
    offered = BLOCK_SIZES if blocks else GROUP_SIZES
    sizes = {size for size in offered if site.shape[1] % (_VECTOR if blocks else size) == 0}
    if base.weights.group_size is not None:
        sizes.add(base.weights.group_size)
    asked: list[dict[str, Any]] = [
        {"bits": 4, "granularity": kind, f"{kind}_size": size} for size in sorted(sizes)
    ]
    asked += [{"bits": bits, "granularity": "channel"} for bits in (4, 8)]
    choices = []
    for fields in asked:
        spec = WeightSpec(
            fields["bits"],
            fields["granularity"],
            fields.get(f"{kind}_size"),
            # Eight bits by channel are symmetric in every backend.
            "symmetric" if fields["bits"] == 8 else base.weights.mapping,
            base.weights.algorithm,
        )
        module = ModuleRecipe(spec, base.activations, base.observer)
        held = {
            backend: packed_bytes(backend, site, spec)
            for backend in backends
            if holds(backend, module, role_of_kind(site.kind))
        }
        if spec.mapping != base.weights.mapping:
            fields["mapping"] = spec.mapping
        size = "" if spec.group_size is None else f"-{kind[0]}{spec.group_size}"
        label = f"int{spec.bits}{size or '-channel'}"
        choices.append(Choice(label, spec, spec.bits, held, weights=Weights(**fields)))
    return [each for each in choices if each.bytes] or choices


def _activation_choices(
    site: SitePlace, recipe: Recipe, backends: tuple[Backend, ...], holds: Holds
) -> list[Choice]:
    base = recipe.for_module(site.module)
    kind = "dynamic" if base.activations.kind == "none" else base.activations.kind
    choices = []
    for bits in (8, 16):
        asked = Activations(kind=kind, bits=bits)  # type: ignore[arg-type]
        held: dict[Backend, int] = {}
        if kind == "static" and "qnn" in backends:
            held["qnn"] = 0
        elif kind == "dynamic" and bits == 8:
            held |= {backend: 0 for backend in backends if backend != "qnn"}
        choices.append(Choice(f"{kind} int{bits}", None, bits, held, activations=asked))
    return choices


def _vulkan_group(size: int) -> int:
    """The longest group that the runtime sums up right and that divides one of ``size``."""
    if size % 128 == 0:
        return 128
    return max((each for each in range(4, 65, 4) if size % each == 0), default=size)


def packed_bytes(backend: Backend, site: SitePlace, spec: WeightSpec) -> int:
    """What a weight ``[N, K]`` takes in a program: integers, scales, padding.

    XNNPACK: int4 with a bfloat16 scale a group, int8 with a float32 scale a channel; an embedding
    is read by a portable kernel, with float32 scales. Vulkan: features padded to multiples of 8 and
    4, a float32 scale and an int32 sum a group of at most 128. QNN: a float32 scale a channel, and
    for blocks half a byte each.
    """
    rows, columns = site.shape
    groups = 1 if spec.group_size is None else columns // spec.group_size
    bits = spec.bits or 32
    stored = 4 if bits <= 4 else 8
    integers = rows * -(-columns * stored // 8)
    if backend == "xnnpack":
        scale = 2 if stored == 4 and site.kind != "embedding" else 4
        return integers + rows * groups * scale
    if backend == "vulkan":
        if site.kind == "embedding" and site.agrees is not None:
            return 0  # the head's table serves both
        if site.kind == "embedding" or stored == 8:
            return integers + rows * groups * 4
        wide, deep = -(-rows // 8) * 8, -(-columns // 4) * 4
        # A scale and a sum of each group as the runtime sums it up: a longer one is split.
        return wide * deep // 2 + wide * (columns // _vulkan_group(columns // groups)) * 8
    return integers + rows * 4 + (rows * -(-groups // 2) if spec.granularity == "block" else 0)
