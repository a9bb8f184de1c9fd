"""What makes two calibrations the same: the model, the observers, the text, the versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgepass.passes.quantized_values import attribute


def identity_of(prepared: GraphModule, chunks: Tensor) -> dict[str, str]:
    """Short digests of each part, by a name to tell the user which of them differs.

    ``model`` covers the constants of the graph, ``recipe`` its calls and its observers, ``text``
    the chunks; ``edgepass`` and ``torch`` are versions.
    """
    return {
        "edgepass": version("edgepass"),
        "torch": torch.__version__,
        "model": _digest(_constants(prepared)),
        "recipe": _digest(_structure(prepared)),
        "text": _digest(_bytes("chunks", chunks)),
    }


def model_identity(model: nn.Module, chunks: Tensor, **settings: object) -> dict[str, str]:
    """The same of work on a model itself; ``settings`` are digested by their names."""
    weights = (part for name, each in model.state_dict().items() for part in _bytes(name, each))
    return {
        "edgepass": version("edgepass"),
        "torch": torch.__version__,
        "model": _digest(weights),
        "text": _digest(_bytes("chunks", chunks)),
        **{name: _digest([repr(value).encode()]) for name, value in settings.items()},
    }


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:16]


def _constants(prepared: GraphModule) -> Iterable[bytes | memoryview]:
    seen: set[int] = set()
    for node in prepared.graph.nodes:
        if node.op == "get_attr":
            value = attribute(prepared, str(node.target))
            if isinstance(value, Tensor) and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                yield from _bytes(str(node.target), value.detach())


def _bytes(name: str, value: Tensor) -> Iterable[bytes | memoryview]:
    yield f"{name} {value.dtype} {list(value.shape)}\n".encode()
    yield value.contiguous().view(-1).view(torch.uint8).numpy().data


def _structure(prepared: GraphModule) -> Iterable[bytes]:
    for node in prepared.graph.nodes:
        yield f"{node.name} {node.op} {_name(node)} {node.args} {node.kwargs}\n".encode()
        if node.op == "call_module":
            observer = prepared.get_submodule(str(node.target))
            yield f"{type(observer).__qualname__} {_settings(observer)}\n".encode()


def _name(node: Node) -> str:
    """What a node calls; a Python function's own text has its address, which no two runs share."""
    target: Any = node.target
    if isinstance(target, (FunctionType, BuiltinFunctionType)):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)


def _settings(observer: Any) -> dict[str, str]:
    """The plain attributes of an observer, and its least scale; what it has seen are tensors."""
    plain = (bool, int, float, str, tuple, torch.dtype, torch.qscheme)
    settings = {
        name: repr(value)
        for name, value in sorted(vars(observer).items())
        if isinstance(value, plain) and not name.startswith("_")
    }
    eps = getattr(observer, "eps", None)
    return settings | {"eps": repr(eps.tolist() if isinstance(eps, Tensor) else eps)}
