"""edgepass: graph passes that turn a PyTorch language model into a 4-bit ExecuTorch program.

The names below are loaded when they are first used, so that ``import edgepass`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "lower": "edgepass.api",
    "explain": "edgepass.api",
    "load_model": "edgepass.models.load",
    "quantize_model": "edgepass.calibration.recipes",
    "simulate": "edgepass.simulator.simulate",
    "SimulatedProgram": "edgepass.simulator.simulate",
    "register": "edgepass.lowering.registration",
    "unregister": "edgepass.lowering.registration",
    "EdgepassError": "edgepass.ops.errors",
}
__all__ = [
    "EdgepassError",
    "SimulatedProgram",
    "explain",
    "load_model",
    "lower",
    "quantize_model",
    "register",
    "simulate",
    "unregister",
]

if TYPE_CHECKING:
    from edgepass.api import explain, lower
    from edgepass.calibration.recipes import quantize_model
    from edgepass.lowering.registration import register, unregister
    from edgepass.models.load import load_model
    from edgepass.ops.errors import EdgepassError
    from edgepass.simulator.simulate import SimulatedProgram, simulate


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edgepass' has no attribute {name!r}")
