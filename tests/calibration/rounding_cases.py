"""Weights and specifications that the tests of rounding share."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """A weight's part of a recipe."""

    bits: int = 4
    group_size: int | None = 32
    mapping: str = "symmetric"
    algorithm: str = "rtn"


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal values with a few outliers, float32 ``[rows, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) > 0.97] *= 6
    return weight


def correlated_inputs(tokens: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs of few directions plus noise, as hidden states are: ``[tokens, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(2, columns // 8), columns, generator=generator)
    mixed = torch.randn(tokens, directions.shape[0], generator=generator) @ directions
    return mixed + 0.1 * torch.randn(tokens, columns, generator=generator)
