"""One weight, rounded as its recipe says: the algorithms by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edgepass.calibration.gptq import gptq
from edgepass.calibration.grids import GridSpec, RoundedWeight
from edgepass.calibration.hqq import half_quadratic
from edgepass.calibration.input_statistics import InputStatistics
from edgepass.calibration.round_to_nearest import round_to_nearest
from edgepass.calibration.scale_search import search_scales
from edgepass.calibration.seqmse import sequential_mse
from edgepass.ops.errors import InvalidArgumentError

_FROM_WEIGHTS: dict[str, Callable[[Tensor, GridSpec], RoundedWeight]] = {
    "rtn": round_to_nearest,
    "hqq": half_quadratic,
    "mse": search_scales,
}
_FROM_INPUTS: dict[str, Callable[[Tensor, GridSpec, InputStatistics], RoundedWeight]] = {
    "seqmse": sequential_mse,
    "gptq": gptq,
}
ALGORITHMS = (*_FROM_WEIGHTS, *_FROM_INPUTS)
NEED_STATISTICS = frozenset(_FROM_INPUTS)


def quantize_weight(
    weight: Tensor, spec: GridSpec, statistics: InputStatistics | None = None
) -> RoundedWeight:
    """Round a float ``weight`` ``[N, K]`` by ``spec``, whose ``algorithm`` is one of ALGORITHMS.

    ``statistics`` of the layer's inputs are what ``seqmse`` and ``gptq`` go by; without them (an
    embedding, whose inputs are ids) the nearest that needs none takes their place: ``mse``.

    Returns ``(values int8 [N, K], scale float32 [N, G], zero_point [N, G] or None)``.

    Raises InvalidArgumentError for an unknown algorithm and for what ``grids.group_size_of``
    refuses, CalibrationError for statistics of another layer.
    """
    if spec.algorithm not in ALGORITHMS:
        raise InvalidArgumentError(
            f"unknown weight algorithm: got algorithm={spec.algorithm!r}, accepted are "
            f"{', '.join(ALGORITHMS)}"
        )
    if spec.algorithm in _FROM_WEIGHTS:
        return _FROM_WEIGHTS[spec.algorithm](weight, spec)
    if statistics is None:
        return search_scales(weight, spec)
    return _FROM_INPUTS[spec.algorithm](weight, spec, statistics)
