"""A table of encodings in place of a graph's own; one that does not fit is refused by name."""

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from edgepass.calibration.apply_encodings import apply_encodings
from edgepass.ops.encodings import EncodingTable
from edgepass.ops.errors import EncodingError
from edgepass.passes.quantized_values import read_encodings
from tests.passes.kv_models import WIDTH, Chunk, prepare, quantized


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Chunk()


def other_data(model):
    """A graph of the same model that saw other data, constants not folded."""
    x = torch.randn(1, 5, WIDTH) * 9
    prepared = prepare(model, (x,))
    prepared(x)
    return convert_pt2e(prepared, fold_quantize=False)


def test_the_graph_computes_what_the_table_s_own_graph_computes(model) -> None:
    x = torch.randn(1, 5, WIDTH)
    source = quantized(model, [(x,)])
    table = read_encodings(source)
    # Weights are quantized by the table, too: here by coarser scales than their own.
    weight = table.parameters["first.q.weight"]
    module = other_data(model)
    assert not torch.equal(module(x)[0], source(x)[0])
    assert apply_encodings(module, table) >= len(table) // 2
    assert all(map(torch.equal, module(x), source(x)))
    assert read_encodings(module)["first.q.weight"].difference(weight) == 0


def test_weights_are_quantized_by_the_table(model) -> None:
    x = torch.randn(1, 5, WIDTH)
    table = read_encodings(quantized(model, [(x,)]))
    own = table.parameters["first.q.weight"]
    coarse = type(own)(own.scale * 3, own.zero_point, own.quant_min, own.quant_max, own.axis)
    table.parameters["first.q.weight"] = coarse
    module = other_data(model)
    apply_encodings(module, table)
    integers = [
        value for value in module.buffers() if value.dtype == torch.int8 and value.dim() == 2
    ]
    expected = torch.round(model.first.q.weight / coarse.scale[:, None]).to(torch.int8)
    assert any(torch.equal(each, expected) for each in integers)


def changed(table: EncodingTable, name: str, encoding=None) -> EncodingTable:
    activations = dict(table.activations)
    activations.pop(name, None)
    if encoding is not None:
        activations[name] = encoding
    return EncodingTable(activations, table.parameters)


def test_what_does_not_fit_is_named_and_nothing_is_written(model) -> None:
    x = torch.randn(1, 5, WIDTH)
    table = read_encodings(quantized(model, [(x,)]))
    name, eight = "first/softmax#0.output", table["first/matmul#0.other"]
    for wrong, message in (
        (changed(table, name), f"got 1 names that do not fit: {name}: missing"),
        (changed(table, "other", eight), "other: not in this model"),
        (changed(table, name, eight), f"{name}: uint16.* and uint8"),
    ):
        module = other_data(model)
        before = module(x)
        with pytest.raises(EncodingError, match=message) as caught:
            apply_encodings(module, wrong)
        assert "\n" not in str(caught.value)
        assert all(map(torch.equal, before, module(x)))
