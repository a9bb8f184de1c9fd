"""The one place where edgepass's operators enter torch's dispatcher."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("edgepass", "DEF")


def register_operator(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``edgepass::<schema>`` with a CPU kernel and a fake kernel (shapes and dtypes only).

    ``schema`` is torch's schema text without the namespace. All operators are functional: no
    output aliases an input. They are for inference: no gradient flows through them.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _without_gradient(kernel), "CPU")
    torch.library.register_fake(f"edgepass::{name}", fake, lib=_LIBRARY)


def _without_gradient(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as called below autograd: torch leaves autograd on inside a Python kernel."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kernel(*args, **kwargs)
        with torch.no_grad():
            return kernel(*args, **kwargs)

    return call
