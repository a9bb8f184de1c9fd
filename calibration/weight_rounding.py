"""One weight, rounded as its recipe says: the algorithms by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edgepass.calibration.grids import RoundedWeight, WeightSpec
from edgepass.calibration.round_to_nearest import round_to_nearest
from edgepass.calibration.scale_search import search_scales
from edgepass.ops.errors import InvalidArgumentError

_WITHOUT_DATA: dict[str, Callable[[Tensor, WeightSpec], RoundedWeight]] = {
    "rtn": round_to_nearest,
    "mse": search_scales,
}
ALGORITHMS = (*_WITHOUT_DATA,)


def quantize_weight(weight: Tensor, spec: WeightSpec, statistics: None = None) -> RoundedWeight:
    """Round a float ``weight`` ``[N, K]`` by ``spec``, whose ``algorithm`` is one of ALGORITHMS.

    Returns ``(values int8 [N, K], scale float32 [N, G], zero_point [N, G] or None)``.

    Raises InvalidArgumentError for an unknown algorithm and for what ``grids.group_size_of``
    refuses.
    """
    if spec.algorithm not in _WITHOUT_DATA:
        raise InvalidArgumentError(
            f"unknown weight algorithm: got algorithm={spec.algorithm!r}, accepted are "
            f"{', '.join(ALGORITHMS)}"
        )
    return _WITHOUT_DATA[spec.algorithm](weight, spec)
