"""edgepass: graph passes that turn a PyTorch language model into a 4-bit ExecuTorch program.

The names below are loaded when they are first used, so that ``import edgepass`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "lower": "edgepass.api",
    "explain": "edgepass.api",
    "analyze": "edgepass.analysis",
    "allocate": "edgepass.analysis",
    "load_model": "edgepass.models.load",
    "quantize_model": "edgepass.calibration.recipes",
    "simulate": "edgepass.simulator.simulate",
    "SimulatedProgram": "edgepass.simulator.simulate",
    "register": "edgepass.lowering.registration",
    "unregister": "edgepass.lowering.registration",
    "EdgepassError": "edgepass.ops.errors",
    "lower_for_qnn": "edgepass.qnn",
    "text_half": "edgepass.models.vision_language",
    "embed_prompt": "edgepass.models.vision_language",
    "QnnOptions": "edgepass.qnn",
    "propagate_kv_encodings": "edgepass.passes.propagate_kv_encodings",
    "register_qnn_passes": "edgepass.lowering.qnn_registration",
    "unregister_qnn_passes": "edgepass.lowering.qnn_registration",
}
__all__ = [
    "EdgepassError",
    "QnnOptions",
    "SimulatedProgram",
    "allocate",
    "analyze",
    "embed_prompt",
    "explain",
    "load_model",
    "lower",
    "lower_for_qnn",
    "propagate_kv_encodings",
    "quantize_model",
    "register",
    "register_qnn_passes",
    "simulate",
    "text_half",
    "unregister",
    "unregister_qnn_passes",
]

if TYPE_CHECKING:
    from edgepass.analysis import allocate, analyze
    from edgepass.api import explain, lower
    from edgepass.calibration.recipes import quantize_model
    from edgepass.lowering.qnn_registration import register_qnn_passes, unregister_qnn_passes
    from edgepass.lowering.registration import register, unregister
    from edgepass.models.load import load_model
    from edgepass.models.vision_language import embed_prompt, text_half
    from edgepass.ops.errors import EdgepassError
    from edgepass.passes.propagate_kv_encodings import propagate_kv_encodings
    from edgepass.qnn import QnnOptions, lower_for_qnn
    from edgepass.simulator.simulate import SimulatedProgram, simulate


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edgepass' has no attribute {name!r}")
