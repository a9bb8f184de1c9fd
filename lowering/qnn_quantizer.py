"""From a form of a decoder to a graph that the stock PT2E flow calibrates and converts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from executorch.backends.qualcomm.quantizer.observers.concat_observer import ConcatObserver
from executorch.backends.qualcomm.quantizer.observers.per_block_param_observer import (
    PerBlockParamObserver,
)
from executorch.backends.qualcomm.quantizer.observers.per_channel_param_observer import (
    PerChannelParamObserver,
)
from executorch.backends.qualcomm.quantizer.quantizer import (
    ModuleQConfig,
    QnnQuantizer,
    QuantDtype,
)
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)

from edgepass.calibration.aligned_encodings import align_conversions, check_conversions
from edgepass.calibration.apply_encodings import apply_encodings
from edgepass.calibration.block_scales import snap_block_scales
from edgepass.calibration.observer_kinds import observer_class
from edgepass.calibration.recipe import Role
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.calibration.visible_scores import show_all, show_visible
from edgepass.lowering.qnn_annotation import (
    PROJECTIONS,
    TWO_BYTE_MAX,
    block_sizes,
    keep_float_activations,
    kv_annotation,
    own_block_sizes,
    projection_paths,
    widen_caches,
)
from edgepass.lowering.qnn_block_sizes import BlockSizes, check_blocks
from edgepass.lowering.qnn_recipes import QnnRecipe, check_chip, check_kv_bits, qnn_recipe
from edgepass.ops.encodings import EncodingTable
from edgepass.ops.encodings_file import split_block_scales
from edgepass.ops.errors import EncodingError
from edgepass.passes.linear_to_conv2d import LinearToConv2d
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.value_names import call_name, module_path

# Where a decoder's form has the model, whose own paths recipes speak of.
MODEL_PREFIX = "decoder.model"

_INT16_MAX = 2**15 - 1

# The stock observers of this backend that learn of an activation its extremes alone.
RANGE_OBSERVERS: frozenset[type] = frozenset({ConcatObserver})


@dataclass(frozen=True)
class QnnQuantization:
    """How a decoder is quantized: the recipe, the blocks of LPBQ weights, the bits of the caches.

    ``block_size`` are the input features of a block; ``layer_block_sizes`` gives others to some
    modules (``{"down_proj": 64}``, see ``BlockSizes``). What is not given is the recipe's. ``soc``
    is the stock chip.

    Raises InvalidArgumentError for cache bits or block sizes that do not fit the recipe or
    the chip.
    """

    recipe: QnnRecipe
    soc: Any
    kv_bits: int | None = None
    block_size: int | None = None
    layer_block_sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kv_bits is not None:
            check_kv_bits(self.recipe, self.kv_bits)
        check_chip(self.recipe, self.kv_bits, self.soc)
        check_blocks(self.recipe, self.block_size, self.layer_block_sizes)

    def prepare(self, program: ExportedProgram) -> GraphModule:
        """Return ``program`` with observers, to be run on calibration inputs.

        By a recipe for quantization-aware training it computes with rounded values, and is trained.

        Raises InvalidArgumentError for a block size that does not divide a projection's width or
        names no module, or a cache that HTP does not join in 16 bits, and EncodingError for weights
        beyond fp16.
        """
        _check_weights(program)
        if self._has_blocks(self._own_recipes(program.graph_module)):
            program = Pipeline([LinearToConv2d()]).run(program).program
        # Guards are calls of their own that would stand among an input's users.
        module: Any = program.module(check_guards=False)
        prepare = prepare_qat_pt2e if self.recipe.asked.qat else prepare_pt2e
        with contextlib.redirect_stdout(io.StringIO()):
            prepared = prepare(module, self._quantizer(module))
        if not self.recipe.asked.qat:  # in training the encodings follow the loss, hidden or not
            show_visible(prepared)
        return prepared

    def convert(self, prepared: GraphModule) -> GraphModule:
        """Return the calibrated ``prepared`` with quantize and dequantize calls.

        Block scales are those that HTP stores, and changes to the caches' encodings are such that
        HTP computes them exactly: the graph computes what the device will. Raises EncodingError for
        one that it would compute wrong.
        """
        show_all(prepared)
        _snap_observed_blocks(prepared)
        _fit_two_byte_weights(prepared)
        converted = convert_pt2e(prepared)
        widen_caches(converted)
        snap_block_scales(converted)
        align_conversions(converted)
        check_conversions(converted)
        return converted

    def convert_with(
        self, prepared: GraphModule, encodings: EncodingTable, prefix: str
    ) -> GraphModule:
        """Return ``prepared``, which has seen any data, with ``encodings`` in place of its own.

        Names in ``encodings`` are without ``prefix``. Raises EncodingError unless they are those of
        the graph, and of its recipe.
        """
        show_all(prepared)
        converted = convert_pt2e(prepared, fold_quantize=False)
        widen_caches(converted)
        apply_encodings(converted, encodings, prefix)
        check_conversions(converted)
        return converted

    def _quantizer(self, module: GraphModule) -> QnnQuantizer:
        quantizer = QnnQuantizer(soc_model=self.soc)
        qat, observer = self.recipe.asked.qat, observer_class(self.recipe.observer)
        quantizer.set_default_quant_config(self.recipe.quant_dtype(), **_options(self.recipe, qat))
        own = self._own_recipes(module)
        configs = [(_stands_in(paths), _config(each, qat)) for each, paths in own.items()]
        if self.recipe.activation_bits == 8:
            configs.append((_is_no_projection, _sixteen_bits(observer)))
        quantizer.set_submodule_qconfig_list(configs)
        custom: list[Callable[[GraphModule], None]] = []
        if self._has_blocks(own):
            sizes = self._block_sizes(module, own)
            quantizer.set_block_size_map(sizes)
            custom.append(own_block_sizes(sizes))
        if self.recipe.activation_bits is None:
            custom.append(keep_float_activations)
        else:
            custom.append(kv_annotation(observer, self.kv_bits or self.recipe.kv_bits))
        quantizer.add_custom_quant_annotations(custom)
        return quantizer

    def _own_recipes(self, module: GraphModule) -> dict[QnnRecipe, set[str]]:
        """The paths of the projections that get another recipe than the default, by recipe."""
        own: dict[QnnRecipe, set[str]] = {}
        for path in projection_paths(module):
            recipe = replace(qnn_recipe(self._of(path)), asked=self.recipe.asked)
            if recipe != self.recipe:
                own.setdefault(recipe, set()).add(path)
        return own

    def _has_blocks(self, own: Mapping[QnnRecipe, set[str]]) -> bool:
        return any(each.blocks or each.rows_as_blocks for each in (self.recipe, *own))

    def _of(self, path: str) -> ModuleRecipe:
        name = path.removeprefix(f"{MODEL_PREFIX}.")
        role: Role = "head" if name.rpartition(".")[2] == "lm_head" else "linear"
        return self.recipe.asked.for_module(name, role)

    def _block_sizes(
        self, module: GraphModule, own: Mapping[QnnRecipe, set[str]]
    ) -> dict[str, tuple]:
        """The blocks of each projection that has some: asked for here, else by the recipe."""
        rest = set(projection_paths(module)).difference(*own.values())
        places = [*own.items(), (self.recipe, rest)]
        rows = {path for recipe, paths in places if recipe.rows_as_blocks for path in paths}
        whole = {path for recipe, paths in places if not recipe.blocks for path in paths} - rows
        default = self.recipe.block_size
        found = {path: self._of(path).weights.group_size for path in projection_paths(module)}
        others = {
            path: size
            for path, size in found.items()
            if size and size != default and path not in whole | rows
        }
        sizes = BlockSizes(self.block_size or default, {**others, **self.layer_block_sizes})
        return block_sizes(module, sizes, whole, rows)


def _snap_observed_blocks(prepared: GraphModule) -> None:
    """Let block observers give the scales that HTP stores, so that weights are rounded by them."""
    for observer in prepared.modules():
        if isinstance(observer, PerBlockParamObserver):
            scale, _ = observer.calculate_qparams()
            if scale.numel() == scale.shape[0]:
                continue  # one block a row: its scale is 16 of the channel's steps, exactly
            channel, steps = split_block_scales(scale.reshape(scale.shape[0], -1))
            ends = (channel[:, None] * steps).reshape(scale.shape) * observer.quant_max
            observer.min_val.copy_(-ends.reshape(observer.min_val.shape))
            observer.max_val.copy_(ends.reshape(observer.max_val.shape))


def _fit_two_byte_weights(prepared: GraphModule) -> None:
    """Let 16-bit weights end at 32,639: HTP multiplies by two signed bytes, 256 * 127 + 127."""
    for observer in prepared.modules():
        if isinstance(observer, PerChannelParamObserver) and observer.quant_max == _INT16_MAX:
            for end in (observer.min_val, observer.max_val):
                end.mul_(_INT16_MAX / TWO_BYTE_MAX)


def _is_no_projection(node: Node) -> bool:
    return call_name(node) not in PROJECTIONS


def _stands_in(paths: set[str]) -> Callable[[Node], bool]:
    return lambda node: call_name(node) in PROJECTIONS and module_path(node) in paths


def _config(recipe: QnnRecipe, qat: bool) -> ModuleQConfig:
    return ModuleQConfig(recipe.quant_dtype(), **_options(recipe, qat))


def _options(recipe: QnnRecipe, qat: bool) -> dict[str, Any]:
    """The stock configuration's options; in training ranges are averaged, as the weights move."""
    observer = {} if qat else {"act_observer": observer_class(recipe.observer)}
    return {"is_qat": qat, "is_conv_per_channel": True, "is_linear_per_channel": True, **observer}


def _sixteen_bits(observer: Any) -> ModuleQConfig:
    return ModuleQConfig(QuantDtype.use_16a8w, act_observer=observer)


def _check_weights(program: ExportedProgram) -> None:
    """Refuse weights that the stock quantizer would replace in place, without a word."""
    for name, weight in program.named_parameters():
        largest = weight.detach().abs().max().item() if weight.is_floating_point() else 0.0
        if largest >= torch.finfo(torch.float16).max:
            raise EncodingError(
                f"weight beyond fp16: got {name} with a magnitude of {largest:.4g}, accepted are "
                f"magnitudes below {torch.finfo(torch.float16).max:.0f}"
            )
