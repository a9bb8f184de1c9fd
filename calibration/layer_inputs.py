"""Second moments of what goes into linears and convolutions while they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.input_statistics import InputStatistics, convolution_inputs
from edgepass.ops.errors import CalibrationError


def collect_statistics(
    modules: Mapping[str, nn.Module], run: Callable[[], Any]
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of ``modules`` (linears, conv2ds), by name, while ``run()`` runs.

    Modules that are given the very same tensor (Q, K and V) share one sum.

    Raises CalibrationError for a module that never ran, or that was given NaN or infinity.
    """
    sums: dict[str, InputStatistics] = {}
    owners: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []

    def add(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            given: Tensor = args[0]
            if last and last[0][0] is given and owners.get(name, last[0][1]) == last[0][1]:
                owners[name] = last[0][1]
                return
            last[:] = [(given, name)]
            rows = given
            if isinstance(module, nn.Conv2d):
                rows = convolution_inputs(given, module)
            found = InputStatistics.of(rows)
            sums[name] = sums[name] + found if name in sums else found
            owners[name] = name

        return hook

    hooks = [each.register_forward_pre_hook(add(name)) for name, each in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _checked(name, owners, sums) for name in modules}


def _checked(
    name: str, owners: Mapping[str, str], sums: Mapping[str, InputStatistics]
) -> InputStatistics:
    if name not in owners:
        raise CalibrationError(
            f"no data: got no input of {name} during calibration, accepted are calibration inputs "
            "that reach every module"
        )
    found = sums[owners[name]]
    if not bool(torch.isfinite(found.gram).all()):
        raise CalibrationError(
            f"not finite: got NaN or infinity as input of {name} during calibration, accepted are "
            "finite ones"
        )
    return found
