"""Sequential MSE: scales with the least error of each layer's output, not of its weights.

AIMET's SeqMSE tries candidates of a scale and takes the one whose output error on calibration
inputs is least, layer by layer, so that later layers see the rounded earlier ones
(``sequential.py`` does the walking). Here the error of a group comes from the second moments of its
inputs, which gives the same sum over tokens without running the layer for each candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.calibration.grids import GridSpec, RoundedWeight, group_size_of
from edgepass.calibration.input_statistics import InputStatistics, check_statistics
from edgepass.calibration.scale_search import Metric, search_with

_DAMPING = 0.01


def sequential_mse(weight: Tensor, spec: GridSpec, statistics: InputStatistics) -> RoundedWeight:
    """Round ``weight`` ``[N, K]`` with the scales of least output error, group by group.

    Raises CalibrationError for statistics of another layer.
    """
    check_statistics(weight, statistics)
    size = group_size_of(weight, spec)
    return search_with(weight, spec, output_metric(statistics.damped(_DAMPING), size))


def output_metric(moments: Tensor, size: int) -> Metric:
    """The metric of a group's own part of the output: blocks of ``moments`` ``[K, K]``."""
    groups = moments.shape[0] // size
    blocks = moments.reshape(groups, size, groups, size)
    own = torch.stack([blocks[i, :, i] for i in range(groups)]).float()

    def metric(values: Tensor) -> Tensor:
        return torch.bmm(values.transpose(0, 1), own).transpose(0, 1)

    return metric
