"""From quantized graphs to one ``.pte`` of HTP contexts, by the stock QNN backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from executorch.backends.qualcomm._passes.build_quant_io import BuildQuantIo
from executorch.backends.qualcomm._passes.tag_quant_io import TagQuantIO
from executorch.backends.qualcomm.utils.constants import (
    QCOM_QUANT_ATTRS,
    QCOM_QUANT_MAX,
    QCOM_QUANT_MIN,
    QCOM_REQUANTIZE,
)
from executorch.backends.qualcomm.utils.utils import (
    generate_htp_compiler_spec,
    generate_qnn_executorch_compiler_spec,
    to_edge_transform_and_lower_to_qnn,
)
from executorch.exir import ExecutorchBackendConfig, ExecutorchProgramManager
from torch.fx import GraphModule, Node

from edgepass.lowering.qnn_io import PLAIN_INPUTS
from edgepass.lowering.qnn_libraries import prepare_libraries
from edgepass.lowering.qnn_quiet import first_error, quiet_compiler
from edgepass.lowering.qnn_registration import activate, passes_job
from edgepass.lowering.shapes_only import replace_delegates, with_shapes_only
from edgepass.ops.errors import ProgramError

_IO_DTYPES = {(0, 255): torch.uint8, (0, 65535): torch.uint16}


def lower_graphs(
    graphs: Mapping[str, GraphModule],
    inputs: Mapping[str, tuple[Any, ...]],
    soc: Any,
    constant_methods: Mapping[str, Any] | None = None,
    fp16: bool = False,
) -> ExecutorchProgramManager:
    """Lower each graph (method name to PT2E graph) for the HTP of ``soc`` into one program.

    Quantized inputs and outputs pass as they are (uint8, uint16); token ids, positions and inputs
    that are not quantized pass as given.

    Raises LibraryError without the QNN libraries, ProgramError with the compiler's own first line
    if it refuses a graph.
    """
    prepare_libraries()
    spec = generate_qnn_executorch_compiler_spec(soc, generate_htp_compiler_spec(use_fp16=fp16))
    names = list(graphs)
    own = {name: _passes() for name in names}
    with quiet_compiler() as log:
        try:
            edge = to_edge_transform_and_lower_to_qnn(
                dict(graphs),
                {name: inputs[name] for name in names},
                dict.fromkeys(names, spec),
                constant_methods=dict(constant_methods or {}) or None,
                passes_job={name: passes for name, (passes, _) in own.items()},
                dep_table={name: order for name, (_, order) in own.items()},
            )
            # Passes of stock run a delegate's own graph again, which takes no integers.
            replace_delegates(edge, lambda each: with_shapes_only(each, each.backend_id))
            return edge.to_executorch(ExecutorchBackendConfig(passes=[BuildQuantIo()]))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ProgramError(
                f"the HTP compiler refuses the graph: got methods={', '.join(names)}: "
                f"{first_error(log) or error}; accepted are graphs of operators that it knows"
            ) from error


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
