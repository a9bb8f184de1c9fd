"""The collection in the four pipelines of the stock pass manager, and out of them again."""

import pytest
import torch
from executorch.backends.qualcomm._passes import qnn_pass_manager
from executorch.backends.qualcomm._passes.qnn_pass_manager import get_qnn_pass_manager_cls
from executorch.backends.qualcomm._passes.resolve_debug_handle import ResolveDebugHandle
from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchBackendType
from executorch.exir.pass_base import ExportPass, PassResult
from torch import nn

import edgepass
from edgepass.lowering import registration
from edgepass.lowering.qnn_passes import DropProvenance, SnapBlockScales
from edgepass.lowering.qnn_registration import (
    QnnCollection,
    manager_map,
    passes_job,
    register_qnn_passes,
    unregister_qnn_passes,
)
from edgepass.ops.errors import PassError
from tests.lowering.qnn_programs import needs_libraries

HTP = QnnExecuTorchBackendType.kHtpBackend


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    yield
    monkeypatch.undo()
    edgepass.unregister()


def seen_by(names: list[str]) -> QnnCollection:
    """A collection whose passes note the pipeline in which they run."""

    def noting(name: str) -> type[ExportPass]:
        class Noting(ExportPass):
            def __init__(self) -> None:
                super().__init__()

            def call(self, graph_module):
                names.append(name)
                return PassResult(graph_module, False)

        return Noting

    return QnnCollection(*([noting(name)] for name in ("annotation", "export", "edge", "delegate")))


def test_the_private_map_is_where_it_was() -> None:
    # When this fails, the stock backend keeps its pass managers elsewhere: see manager_map.
    assert manager_map() is qnn_pass_manager._get_backend_pass_manager_map()
    assert manager_map()[HTP].__name__ == "QnnHtpPassManager"


def test_a_map_that_moved_is_an_error(monkeypatch) -> None:
    monkeypatch.delattr(qnn_pass_manager, "_get_backend_pass_manager_map")
    with pytest.raises(PassError, match=r"accepted is executorch 1\.5\.1"):
        register_qnn_passes()


def test_registration_can_be_taken_back() -> None:
    before = get_qnn_pass_manager_cls(HTP)
    register_qnn_passes()
    register_qnn_passes()
    assert issubclass(get_qnn_pass_manager_cls(HTP), before)
    assert get_qnn_pass_manager_cls(HTP) is not before
    unregister_qnn_passes()
    unregister_qnn_passes()
    assert get_qnn_pass_manager_cls(HTP) is before


def test_register_brings_the_passes_and_unregister_takes_them_away() -> None:
    before = get_qnn_pass_manager_cls(HTP)
    edgepass.register()
    edgepass.register()
    assert SnapBlockScales in get_qnn_pass_manager_cls(HTP).get_export_passes()
    edgepass.unregister()
    edgepass.unregister()
    assert get_qnn_pass_manager_cls(HTP) is before


def test_register_keeps_a_collection_of_the_user_s_own() -> None:
    register_qnn_passes(QnnCollection(export=()))
    mine = get_qnn_pass_manager_cls(HTP)
    edgepass.register()
    assert get_qnn_pass_manager_cls(HTP) is mine


def test_register_without_the_backend_leaves_it_out(monkeypatch) -> None:
    before = get_qnn_pass_manager_cls(HTP)
    monkeypatch.setattr(registration.importlib.util, "find_spec", lambda name: None)
    edgepass.register()
    assert get_qnn_pass_manager_cls(HTP) is before and registration.is_registered()


def test_register_with_a_map_that_moved_registers_nothing(monkeypatch) -> None:
    monkeypatch.delattr(qnn_pass_manager, "_get_backend_pass_manager_map")
    with pytest.raises(PassError, match="cannot register"):
        edgepass.register()
    assert not registration.is_registered()


def test_every_list_keeps_the_stock_passes_in_their_order() -> None:
    stock = get_qnn_pass_manager_cls(HTP)
    register_qnn_passes()
    mine = get_qnn_pass_manager_cls(HTP)
    for name in ("get_annotation_passes", "get_export_passes", "get_preprocess_passes"):
        ours, theirs = getattr(mine, name)(), getattr(stock, name)()
        assert [each for each in ours if each in theirs] == theirs
    assert SnapBlockScales in mine.get_export_passes()
    assert DropProvenance in mine.get_preprocess_passes()


def test_the_debug_handles_stay_last() -> None:
    register_qnn_passes()
    exported = torch.export.export(nn.ReLU(), (torch.ones(2),))
    passes = get_qnn_pass_manager_cls(HTP)().get_to_edge_transform_passes(exported)
    kinds = [type(each) for each in passes]
    assert kinds[-1] is ResolveDebugHandle and DropProvenance in kinds


def test_per_call_nothing_is_registered() -> None:
    before = get_qnn_pass_manager_cls(HTP)
    passes, table = passes_job()
    assert DropProvenance in passes and DropProvenance in table[ResolveDebugHandle]
    assert get_qnn_pass_manager_cls(HTP) is before


@needs_libraries
def test_a_user_s_own_quantizer_and_lowering_run_all_four() -> None:
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.utils import utils
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from edgepass.lowering.qnn_libraries import prepare_libraries
    from edgepass.lowering.qnn_recipes import find_chip
    from edgepass.ops.native_output import native_output_captured

    prepare_libraries()
    names: list[str] = []
    register_qnn_passes(seen_by(names))
    soc, x = find_chip("SM8650"), (torch.randn(1, 8),)
    quantizer = QnnQuantizer(soc_model=soc)
    quantizer.set_default_quant_config(QuantDtype.use_8a8w, is_linear_per_channel=True)
    with native_output_captured():
        graph = torch.export.export(nn.Linear(8, 8), x).module(check_guards=False)
        prepared = prepare_pt2e(graph, quantizer)
        prepared(*x)
        spec = utils.generate_qnn_executorch_compiler_spec(
            soc, utils.generate_htp_compiler_spec(use_fp16=False)
        )
        utils.to_edge_transform_and_lower_to_qnn(convert_pt2e(prepared), x, spec)
    assert list(dict.fromkeys(names)) == ["annotation", "export", "edge", "delegate"]


def test_block_scales_are_snapped_where_they_are_stored() -> None:
    from tests.passes.test_quantized_values import CASES, Written

    module = Written("affine", CASES["affine"])
    program = torch.export.export(module, (torch.randn(3, 8),))
    result = SnapBlockScales(program).call(program.graph_module)
    channel = module.scale.amax(1, keepdim=True) / 16
    counts = module.scale / channel
    assert result.modified
    torch.testing.assert_close(counts, counts.round())
    assert not SnapBlockScales(program).call(program.graph_module).modified


def test_provenance_is_dropped() -> None:
    program = torch.export.export(nn.ReLU(), (torch.ones(2),)).run_decompositions()
    assert any("from_node" in node.meta for node in program.graph.nodes)
    DropProvenance().call(program.graph_module)
    assert not any("from_node" in node.meta for node in program.graph.nodes)
