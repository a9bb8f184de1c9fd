"""Running a graph with observers over calibration data; data that gives no encoding is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from edgepass.ops.errors import EncodingError
from edgepass.passes.value_names import module_path


def observe(prepared: GraphModule, batches: Iterable[tuple[Any, ...]]) -> int:
    """Run ``prepared`` (of ``prepare_pt2e``) on each batch of inputs; return how many there were.

    Raises EncodingError if there is no batch, if an activation is NaN or infinite (with the module
    that computed it), or if an observer saw no data.
    """
    count = 0
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
            count += 1
    if not count:
        raise EncodingError("no calibration data: got 0 batches, accepted are 1 and more")
    check_observers(prepared)
    return count


def check_observers(prepared: GraphModule, constants: bool = False) -> None:
    """Refuse observers whose least and largest values are not finite, naming the first module.

    With ``constants`` only those of weights are looked at. Raises EncodingError.
    """
    for node in prepared.graph.nodes:
        if node.op != "call_module" or (constants and node.args[0].op != "get_attr"):
            continue
        observer: Any = prepared.get_submodule(str(node.target))
        # Observers that stand for no tensor of numbers (placeholders, derived biases) have neither.
        low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
        if not (isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor)):
            continue
        if low.numel() == 0 or (low == torch.inf).any() or (high == -torch.inf).any():
            raise EncodingError(
                f"no data: got an observer of {place_of(node)} that saw none, accepted are "
                "calibration inputs that reach every module"
            )
        if not (low.isfinite().all() and high.isfinite().all()):
            raise EncodingError(
                f"not finite: got {low.min().item()} to {high.max().item()} in {place_of(node)} "
                "during calibration, accepted are finite activations"
            )


def place_of(observer: Node) -> str:
    """The module and the value that an observer watches."""
    value: Any = observer.args[0]
    while isinstance(value, Node) and value.op == "call_module":
        value = value.args[0]
    if value.op == "get_attr":
        return str(value.target)
    path = module_path(value)
    return f"{path} ({value.name})" if path else str(value.name)
