"""The table of legal forms, the refusals that it gives, and its page."""

from pathlib import Path

import pytest

from edgepass.lowering.vulkan_declined import Refused
from edgepass.lowering.vulkan_legality import (
    DYNAMIC,
    EMBEDDING,
    RUNTIME,
    TABLE,
    WEIGHT_ONLY,
    Multiple,
    accepted,
    require,
)
from edgepass.lowering.vulkan_legality_page import render
from edgepass.lowering.vulkan_operators import OPERATORS, has_operator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vulkan-legality.md"
FACTS = {"rank": 3, "batch": 1, "K": 64, "N": 8, "group size": 32, "zero points": 0}


@pytest.mark.parametrize(
    ("operator", "quantity", "right", "wrong"),
    [
        (DYNAMIC, "group size", (4, 60, 64, 128), (2, 0, 68, 96, 100, 256, 512)),
        (DYNAMIC, "N", (8, 16), (4, 12, 0)),
        (DYNAMIC, "K", (4, 12), (2, 50)),
        (DYNAMIC, "rank", (2, 3), (1, 4)),
        (WEIGHT_ONLY, "K", (8,), (4, 12)),
        (WEIGHT_ONLY, "group size", (4, 512, 2048), (50,)),
        (WEIGHT_ONLY, "batch", (1,), (2,)),
        (EMBEDDING, "K", (32,), (16, 48)),
    ],
)
def test_what_a_row_accepts(
    operator: str, quantity: str, right: tuple[int, ...], wrong: tuple[int, ...]
) -> None:
    condition = accepted(operator, quantity)
    assert all(map(condition.holds, right))
    assert not any(map(condition.holds, wrong))


def test_a_refusal_names_quantity_value_and_reason() -> None:
    require(DYNAMIC, FACTS)
    wanted = r"group size 96: accepted are multiples of 4 up to 64, and 128 \(a longer group"
    with pytest.raises(Refused, match=wanted):
        require(DYNAMIC, {**FACTS, "group size": 96})


def test_an_unknown_row_is_an_error() -> None:
    with pytest.raises(KeyError):
        accepted(DYNAMIC, "colour")


def test_each_row_has_a_column_for_the_runtime_and_a_reason() -> None:
    assert all(RUNTIME in row.accepted and row.reason for row in TABLE)
    assert len({(row.operator, row.quantity) for row in TABLE}) == len(TABLE)


def test_conditions_say_what_they_accept() -> None:
    assert str(Multiple(4)) == "multiples of 4"
    assert str(Multiple(4, 64, (128,))) == "multiples of 4 up to 64, and 128"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render()


def test_operators_that_stock_knows_and_the_runtime_lacks() -> None:
    assert len(OPERATORS[RUNTIME]) == 157
    assert has_operator("aten.add.Tensor")
    assert has_operator("llama.sdpa_with_kv_cache.default")
    assert not has_operator("aten.logical_not.default")
    assert not has_operator("torchao.dequantize_affine.default")
