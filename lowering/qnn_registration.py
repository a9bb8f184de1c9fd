"""edgepass's passes in the four pipelines of the stock QNN pass manager.

The stock flow asks a map of its own for the pass manager of a backend, with a quantizer of the
user's as with a lowering. Registration puts a subclass there, whose lists are the stock ones and
more. The map is private: it is touched in this file alone, and a test notices when it moves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from executorch.backends.qualcomm._passes import qnn_pass_manager
from executorch.backends.qualcomm._passes.qnn_pass_manager import QnnPassManager
from executorch.backends.qualcomm._passes.resolve_debug_handle import ResolveDebugHandle
from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchBackendType
from executorch.backends.qualcomm.utils.constants import (
    QCOM_PASS_ACTIVATE_KEY,
    QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY,
)
from executorch.exir.pass_base import ExportPass

from edgepass.lowering.qnn_passes import DropProvenance, SnapBlockScales
from edgepass.ops.errors import PassError

PassClass = type[ExportPass]


@dataclass(frozen=True)
class QnnCollection:
    """Passes for each pipeline: before annotation, after export, on the edge graph, a delegate's.

    They run before the stock ones; in the edge pipeline ``ResolveDebugHandle`` stays last. The
    first parameter of their ``__init__`` must be called ``self``.
    """

    annotation: Sequence[PassClass] = ()
    export: Sequence[PassClass] = (SnapBlockScales,)
    edge: Sequence[PassClass] = (DropProvenance,)
    preprocess: Sequence[PassClass] = (DropProvenance,)


_BACKEND = QnnExecuTorchBackendType.kHtpBackend
_replaced: list[type[QnnPassManager]] = []


def manager_map() -> dict[Any, type[QnnPassManager]]:
    """The stock map from backend to pass manager.

    Raises PassError if it is not where it was.
    """
    find: Callable[[], Any] | None = getattr(
        qnn_pass_manager, "_get_backend_pass_manager_map", None
    )
    found = find() if find is not None else None
    if not isinstance(found, dict) or _BACKEND not in found:
        raise PassError(
            "cannot register: got no map of pass managers in the stock backend, accepted is "
            "executorch 1.5.1"
        )
    return found


def register_qnn_passes(collection: QnnCollection | None = None) -> None:
    """Add ``collection`` to all four pipelines of the HTP pass manager.

    From then on the stock ``QnnQuantizer`` and ``to_edge_transform_and_lower_to_qnn`` use it. A
    second call replaces the first. Raises PassError if the stock backend has moved its map.
    """
    unregister_qnn_passes()
    known = manager_map()
    _replaced.append(known[_BACKEND])
    known[_BACKEND] = _extended(known[_BACKEND], collection or QnnCollection())


def unregister_qnn_passes() -> None:
    """Put the stock pass manager back; without a registration this does nothing."""
    if _replaced:
        manager_map()[_BACKEND] = _replaced.pop()


def is_registered() -> bool:
    """Whether a collection is registered."""
    return bool(_replaced)


def passes_job(collection: QnnCollection | None = None) -> tuple[OrderedDict, dict]:
    """``passes_job`` and ``dep_table`` for one ``to_edge_transform_and_lower_to_qnn``.

    They hold the stock edge passes and the collection's; nothing is registered.
    """
    extended = _extended(manager_map()[_BACKEND], collection or QnnCollection())
    return (
        extended.get_capture_program_passes(),
        extended.get_passes_dependency_for_capture_program(),
    )


def _extended(base: type[QnnPassManager], collection: QnnCollection) -> type[QnnPassManager]:
    class EdgepassQnnPassManager(base):  # type: ignore[misc, valid-type]
        """The stock pass manager with a collection's passes in its lists."""

        @classmethod
        def get_annotation_passes(cls) -> list[PassClass]:
            return [*collection.annotation, *super().get_annotation_passes()]

        @classmethod
        def get_export_passes(cls) -> list[PassClass]:
            return [*collection.export, *super().get_export_passes()]

        @classmethod
        def get_preprocess_passes(cls, use_mha2sha: bool = False) -> list[PassClass]:
            return [*collection.preprocess, *super().get_preprocess_passes(use_mha2sha)]

        @classmethod
        def get_default_pass_activations(cls) -> list[tuple[PassClass, bool]]:
            own = [(each, True) for each in collection.edge]
            return [*own, *super().get_default_pass_activations()]

        @classmethod
        def get_passes_dependency_for_capture_program(cls) -> dict[PassClass, list[PassClass]]:
            table = dict(super().get_passes_dependency_for_capture_program())
            before = table.get(ResolveDebugHandle, ())
            table[ResolveDebugHandle] = [*before, *collection.edge]
            return table

    return EdgepassQnnPassManager


def activate(passes: OrderedDict, each: PassClass, **arguments: Any) -> None:
    """Switch on a stock pass of a ``passes_job`` and set its arguments."""
    passes[each][QCOM_PASS_ACTIVATE_KEY] = True
    passes[each][QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY].update(arguments)
