"""From quantized graphs to one ``.pte`` of HTP contexts, by the stock QNN backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from executorch.backends.qualcomm._passes.build_quant_io import BuildQuantIo
from executorch.backends.qualcomm._passes.qnn_pass_manager import get_qnn_pass_manager_cls
from executorch.backends.qualcomm._passes.tag_quant_io import TagQuantIO
from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchBackendType
from executorch.backends.qualcomm.utils.constants import (
    QCOM_QUANT_ATTRS,
    QCOM_QUANT_MAX,
    QCOM_QUANT_MIN,
    QCOM_REQUANTIZE,
)
from executorch.backends.qualcomm.utils.qnn_manager_lifecycle import QnnManagerContext
from executorch.backends.qualcomm.utils.utils import (
    generate_htp_compiler_spec,
    generate_qnn_executorch_compiler_spec,
    qnn_edge_config,
)
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.program._program import lift_constant_tensor_pass
from torch.fx import GraphModule, Node

from edgepass.lowering.qnn_edge import has_direct_form, to_edge_directly
from edgepass.lowering.qnn_io import PLAIN_INPUTS
from edgepass.lowering.qnn_libraries import prepare_libraries
from edgepass.lowering.qnn_registration import activate, passes_job
from edgepass.lowering.shapes_only import replace_delegates, with_shapes_only
from edgepass.ops.errors import ProgramError
from edgepass.ops.native_output import native_output_captured

_IO_DTYPES = {
    (0, 255): torch.uint8,
    (0, 65535): torch.uint16,
    (-(2**15), 2**15 - 1): torch.int16,
}


def lower_graphs(
    graphs: Mapping[str, GraphModule],
    inputs: Mapping[str, tuple[Any, ...]],
    soc: Any,
    constant_methods: Mapping[str, Any] | None = None,
    fp16: bool = False,
) -> ExecutorchProgramManager:
    """Lower each graph (method name to PT2E graph) for the HTP of ``soc`` into one program.

    Quantized inputs and outputs pass as they are (uint8, uint16, int16); token ids, positions and
    inputs that are not quantized pass as given.

    Raises LibraryError without the QNN libraries, ProgramError with the compiler's own first line
    if it refuses a graph.
    """
    prepare_libraries()
    spec = generate_qnn_executorch_compiler_spec(soc, generate_htp_compiler_spec(use_fp16=fp16))
    with native_output_captured() as log:
        try:
            edge = _delegate(graphs, inputs, spec, constant_methods)
            # Passes of stock run a delegate's own graph again, which takes no integers.
            replace_delegates(edge, lambda each: with_shapes_only(each, each.backend_id))
            return edge.to_executorch(ExecutorchBackendConfig(passes=[BuildQuantIo()]))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ProgramError(
                f"the HTP compiler refuses the graph: got methods={', '.join(graphs)}: "
                f"{_first_error(log) or error}; accepted are graphs of operators that it knows"
            ) from error


def _delegate(
    graphs: Mapping[str, GraphModule],
    inputs: Mapping[str, tuple[Any, ...]],
    spec: list[Any],
    constant_methods: Mapping[str, Any] | None,
) -> EdgeProgramManager:
    """What stock ``to_edge_transform_and_lower_to_qnn`` does, its conversion to edge aside."""
    programs, passes = {}, {}
    for name, graph in graphs.items():
        exported = torch.export.export(graph, inputs[name], strict=True)
        manager = get_qnn_pass_manager_cls(QnnExecuTorchBackendType.kHtpBackend)()
        programs[name] = manager.transform_for_export_pipeline(exported)
        job, order = _passes()
        passes[name] = manager.get_to_edge_transform_passes(
            exported, passes_job=job, dep_table=order, compiler_specs=spec
        )
    constants, config = dict(constant_methods or {}) or None, qnn_edge_config()
    partitioners = {name: QnnPartitioner(spec) for name in graphs}
    with QnnManagerContext(dict.fromkeys(graphs, spec)):
        if all(map(has_direct_form, programs.values())):
            direct = {name: to_edge_directly(program) for name, program in programs.items()}
            edge = EdgeProgramManager(direct, constants, config).transform(passes)
            for name in graphs:
                lift_constant_tensor_pass(edge.exported_program(name))
            return edge.to_backend(partitioners)
        return to_edge_transform_and_lower(
            programs,
            transform_passes=passes,
            partitioner={name: [each] for name, each in partitioners.items()},
            constant_methods=constants,
            compile_config=config,
        )


def _passes() -> tuple[Any, Any]:
    """Edge passes and their order, with the tagging of quantized inputs and outputs on."""
    passes, order = passes_job()
    activate(passes, TagQuantIO, get_quant_io_dtype_fn=io_dtype)
    return passes, order


def io_dtype(node: Node) -> torch.dtype | None:
    """The dtype in which a graph's input or output passes, None for float."""
    is_input = node.op == "placeholder" and node.name not in PLAIN_INPUTS
    outputs = [user for user in node.users if user.op == "output"]
    if not is_input and not outputs:
        return None
    attributes = node.meta.get(QCOM_QUANT_ATTRS)
    # Stock notes here what the value becomes for one user, and inserts the change later.
    for output in outputs:
        attributes = node.meta.get(QCOM_REQUANTIZE, {}).get(output.name, attributes)
    if not attributes:
        return None
    return _IO_DTYPES.get((attributes[QCOM_QUANT_MIN], attributes[QCOM_QUANT_MAX]))


def _first_error(log: Any) -> str | None:
    log.seek(0)
    lines = (line.partition("[ERROR]")[2].strip() for line in log if "[ERROR]" in line)
    return next((line.removeprefix("[Qnn ExecuTorch]:").strip() for line in lines if line), None)
