"""All operators of the simulator: importing this registers them."""

from edgepass.simulator import (  # noqa: F401
    attention,
    elementwise,
    embedding,
    linear,
    matmul,
    quantize,
    reductions,
    rotary,
    shapes,
    symbols,
)
