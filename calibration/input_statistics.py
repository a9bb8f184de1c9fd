"""What a weight's inputs look like: their second moments, summed over calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgepass.ops.errors import CalibrationError


@dataclass(frozen=True)
class InputStatistics:
    """``gram``: float32 ``[K, K]``, the sum of ``x x^T`` over ``tokens`` inputs ``[K]``.

    With it a rounding's squared output error over all tokens is ``tr(D gram D^T)``, for the
    difference D of the weights: no input needs to be kept.
    """

    gram: Tensor
    tokens: int

    @staticmethod
    def of(inputs: Tensor) -> InputStatistics:
        """The statistics of float inputs ``[.., K]``. Raises CalibrationError for none."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not rows.shape[0]:
            raise CalibrationError("no calibration inputs: got 0 tokens, accepted are 1 and more")
        return InputStatistics(rows.t() @ rows, rows.shape[0])

    def __add__(self, other: InputStatistics) -> InputStatistics:
        return InputStatistics(self.gram + other.gram, self.tokens + other.tokens)

    def damped(self, share: float) -> Tensor:
        """The mean second moments, float64, with ``share`` of their mean added to the diagonal.

        Inputs that are always zero count as the mean does, so that their weights round plainly.
        """
        moments = self.gram.double() / self.tokens
        diagonal = moments.diagonal()
        dead = diagonal == 0
        mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
        diagonal[dead] = mean
        diagonal += share * mean
        return moments


def check_statistics(weight: Tensor, statistics: InputStatistics) -> None:
    """Refuse statistics of another width than a weight ``[N, K]``, or that are not finite."""
    columns = weight.shape[1]
    if statistics.gram.shape != (columns, columns):
        raise CalibrationError(
            f"statistics of another layer: got inputs of {statistics.gram.shape[0]} features, "
            f"accepted are the {columns} of the weight"
        )
    if not bool(torch.isfinite(statistics.gram).all()):
        raise CalibrationError(
            "not finite: got NaN or infinite inputs during calibration, accepted are finite ones"
        )


def convolution_inputs(inputs: Tensor, convolution: torch.nn.Conv2d) -> Tensor:
    """The inputs of a conv2d's weight as a matrix ``[Cout, Cin * kh * kw]``: ``[positions, K]``.

    inputs: float ``[B, Cin, H, W]``. Raises CalibrationError for a convolution of several groups
    of channels or with padding other than zeros.
    """
    if convolution.groups != 1 or convolution.padding_mode != "zeros":
        raise CalibrationError(
            f"got a conv2d with groups={convolution.groups} and "
            f"padding_mode={convolution.padding_mode}, accepted are groups=1 and zeros"
        )
    if isinstance(convolution.padding, str):
        raise CalibrationError(
            f"got a conv2d with padding={convolution.padding!r}, accepted are numbers"
        )
    columns = torch.nn.functional.unfold(
        inputs,
        convolution.kernel_size,
        dilation=convolution.dilation,
        padding=convolution.padding,
        stride=convolution.stride,
    )
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])
