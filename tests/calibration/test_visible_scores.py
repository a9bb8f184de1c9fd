"""Scores that the mask hides leave no trace in the encodings."""

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from edgepass.calibration.visible_scores import MARGIN, show_all, show_visible, visible_scores
from edgepass.passes.quantized_values import read_encodings
from tests.passes.kv_models import prepare
from tests.passes.programs import sqnr_db


class Masked(nn.Module):
    """Attention of two heads a group, with a soft cap if asked, over a mask that is an input."""

    def __init__(self, cap: float | None = None) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, query, key, value, mask):
        scores = torch.matmul(query * 0.5, key * 1.5)
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        weights = torch.softmax(scores.reshape(1, 2, *mask.shape[-2:]) + mask, -1)
        return torch.matmul(weights.reshape(scores.shape), value * 1.25)


TOKENS, PLACES, WIDTH = 3, 8, 4


def inputs(junk: float = 1.0, hidden: int = 3):
    """The last ``hidden`` places are masked; their keys are ``junk`` times as large."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 1, *shape, generator=generator)
        for shape in ((2 * TOKENS, WIDTH), (WIDTH, PLACES), (PLACES, WIDTH))
    )
    key[..., PLACES - hidden :] *= junk
    mask = torch.zeros(1, 1, TOKENS, PLACES)
    mask[..., PLACES - hidden :] = -255.0
    return query, key, value, mask


def prepared_on(data, cap=None):
    prepared = prepare(Masked(cap), data)
    assert show_visible(prepared) == 1
    with torch.no_grad():
        prepared(*data)
    return prepared


def encodings(data, cap=None):
    prepared = prepared_on(data, cap)
    show_all(prepared)
    return read_encodings(convert_pt2e(prepared))


@pytest.mark.parametrize("cap", [None, 5.0])
def test_ranges_of_scores_do_not_depend_on_hidden_keys(cap) -> None:
    # The keys themselves are observed whatever the mask says, so the junk lies within their range.
    one, other = (encodings(inputs(junk), cap) for junk in (0.9, 0.0))
    scores = [name for name in one if "matmul#0.output" in name or "softmax" in name]
    assert len(scores) >= 2
    assert [each.name for each in one.diff(other, 1e-6) if each.name in scores] == []


def test_without_it_they_do() -> None:
    tables = []
    for junk in (0.9, 0.0):
        prepared = prepare(Masked(), inputs(junk))
        prepared(*inputs(junk))
        tables.append(read_encodings(convert_pt2e(prepared)))
    differing = {each.name for each in tables[0].diff(tables[1], 1e-6)}
    assert "/add#0.output" in differing


def test_the_sum_reaches_the_margin_below_the_least_visible_score_and_no_further() -> None:
    query, key, _, _ = data = inputs()
    seen = torch.matmul(query * 0.5, key * 1.5)[..., :5]
    low, high = encodings(data)["/add#0.output"].real_range()
    assert low.item() == pytest.approx(seen.min().item() - MARGIN, abs=1e-3)
    assert high.item() == pytest.approx(seen.max().item(), abs=1e-3)


def test_a_hidden_place_weighs_nothing_whatever_it_holds() -> None:
    prepared = prepared_on(inputs())
    show_all(prepared)
    converted = convert_pt2e(prepared)
    # In float, what is hidden weighs exp(-255); here it saturates, with keys of any size.
    exact = Masked()(*inputs())
    assert sqnr_db(exact, converted(*inputs())) > 35
    assert torch.equal(converted(*inputs(junk=1e4)), converted(*inputs()))


def test_undone_the_graph_is_as_it_was() -> None:
    plain = prepare(Masked(), inputs())
    prepared = prepare(Masked(), inputs())
    show_visible(prepared)
    assert len(prepared.graph.nodes) == len(plain.graph.nodes) + 2
    show_all(prepared)
    assert [n.format_node() for n in prepared.graph.nodes] == [
        n.format_node() for n in plain.graph.nodes
    ]


def test_a_sum_with_something_computed_is_no_mask() -> None:
    class Sum(nn.Module):
        def forward(self, a, b, c):
            return torch.softmax(torch.matmul(a, b) + c * 2.0, -1)

    prepared = prepare(Sum(), tuple(torch.randn(1, 4, 4) for _ in range(3)))
    assert show_visible(prepared) == 0


def test_rows_of_grouped_heads_share_the_mask_of_their_token() -> None:
    scores = torch.tensor([[1.0, 9.0], [2.0, 3.0], [-4.0, -9.0], [5.0, 6.0]])[None, None]
    mask = torch.tensor([[0.0, -255.0], [0.0, 0.0]])[None, None]
    shown = visible_scores(scores, mask, 1.0)
    assert shown.tolist() == [[[[1.0, -5.0], [2.0, 3.0], [-4.0, -5.0], [5.0, 6.0]]]]
    assert visible_scores(scores, mask - 1, 1.0) is scores
