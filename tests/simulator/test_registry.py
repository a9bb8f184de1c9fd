"""Operators that are not known are named before anything is run, and the page lists the others."""

import re
from pathlib import Path

import pytest
import torch

from edgepass.lowering.vulkan_backend import _FINAL
from edgepass.ops.errors import SimulatorError
from edgepass.simulator import kernels  # noqa: F401
from edgepass.simulator.registry import OPERATORS, PREPACK
from tests.simulator.graphs import activation, one_call

PAGE = Path(__file__).resolve().parents[2] / "docs" / "simulator.md"


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(SimulatorError, match=r"unknown operator: got torchao\.dequantize_affine"):
        one_call("torchao.dequantize_affine.default", [activation(4)], activation(4))


def test_arguments_that_do_not_go_together_name_the_operator() -> None:
    delegate = one_call("aten.mm.default", [activation(4, 4), activation(4, 4)], activation(4, 4))
    with pytest.raises(
        SimulatorError, match=r"aten\.mm\.default: its arguments do not go together"
    ):
        delegate.run([torch.ones(2, 3), torch.ones(2, 3)])


def test_all_that_edgepass_emits_is_known() -> None:
    """Names are those that the writer gives them; getitem and the like are not calls."""
    emitted = {getattr(target, "__name__", "") for target in _FINAL} - {"getitem"}
    emitted = {name.removeprefix("llama.") if "sdpa_with" in name else name for name in emitted}
    assert emitted - OPERATORS.keys() == set()


def test_the_page_lists_the_known_operators() -> None:
    listed = re.findall(r"`([a-z_]+\.?[\w.]*)`", PAGE.read_text().partition("## Operators")[2])
    assert set(listed) == {*OPERATORS, PREPACK}
