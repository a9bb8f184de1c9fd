"""What is read from a PT2E graph is what was put in; names do not depend on shapes or views."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torchao.quantization.quant_primitives  # noqa: F401  defines torchao
from torch import nn

from edgepass.ops.encodings import Encoding
from edgepass.ops.errors import EncodingError
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.quantized_values import encoding_of, quantized_values, read_encodings
from edgepass.passes.value_names import ValueNames, call_name
from tests.passes.kv_models import WIDTH, Chunk, quantized

decomposed, affine = torch.ops.quantized_decomposed, torch.ops.torchao


class Written(nn.Module):
    """One constant, quantized in a spelling of choice."""

    def __init__(self, spelling: str, encoding: Encoding) -> None:
        super().__init__()
        self.spelling, self.encoding = spelling, encoding
        self.register_buffer("w", torch.randint(-7, 8, (4, 8), dtype=torch.int8))
        scale = encoding.scale.reshape(4, -1) if spelling == "affine" else encoding.scale
        self.register_buffer("scale", scale)
        self.register_buffer("zero", encoding.zero_point.reshape(scale.shape))

    def forward(self, x):
        low, high = self.encoding.quant_min, self.encoding.quant_max
        if self.spelling == "tensor":
            w = decomposed.dequantize_per_tensor(self.w, 0.25, 3, low, high, torch.int8)
        elif self.spelling == "channel":
            w = decomposed.dequantize_per_channel(
                self.w, self.scale, self.zero, 0, low, high, torch.int8
            )
        else:
            w = affine.dequantize_affine(
                self.w, [1, self.encoding.block], self.scale, self.zero, torch.int8, low, high
            )
        return torch.nn.functional.linear(x, w)


CASES = {
    "tensor": Encoding(torch.tensor(0.25), torch.tensor(3), -7, 7),
    "channel": Encoding(torch.rand(4) + 0.1, torch.zeros(4), -127, 127, axis=0),
    "affine": Encoding(torch.rand(4, 2) + 0.1, torch.zeros(4, 2), -7, 7, axis=0, block=4),
}


def graph_of(spelling: str):
    program = torch.export.export(Written(spelling, CASES[spelling]), (torch.randn(3, 8),))
    return program.module(check_guards=False)


@pytest.mark.parametrize("spelling", CASES)
def test_each_spelling_is_read(spelling) -> None:
    module = graph_of(spelling)
    (value,) = quantized_values(module, ValueNames(module.graph))
    assert value.encoding.difference(CASES[spelling]) == 0
    assert value.is_parameter and value.names == ["weight"]


def test_one_block_a_row_is_one_scale_a_channel() -> None:
    rows = Encoding(torch.rand(4, 1) + 0.1, torch.zeros(4, 1), -7, 7, axis=0, block=8)
    program = torch.export.export(Written("affine", rows), (torch.randn(3, 8),))
    module = program.module(check_guards=False)
    for node in module.graph.nodes:
        node.meta.pop("val", None)  # folded constants have none
    channels = Encoding(rows.scale[:, 0], rows.zero_point[:, 0], -7, 7, axis=0)
    (value,) = quantized_values(module, ValueNames(module.graph))
    assert value.encoding.difference(channels) == 0
    tripled = Encoding(channels.scale * 3, channels.zero_point, -7, 7, axis=0)
    write_encoding(module, value, tripled)
    assert torch.equal(module.scale[:, 0], tripled.scale)


@pytest.mark.parametrize("spelling", CASES)
def test_what_is_written_is_read_again(spelling) -> None:
    module = graph_of(spelling)
    (value,) = quantized_values(module, ValueNames(module.graph))
    old = value.encoding
    new = Encoding(old.scale * 3, old.zero_point, old.quant_min, old.quant_max, old.axis, old.block)
    write_encoding(module, value, new)
    (again,) = quantized_values(module, ValueNames(module.graph))
    assert again.encoding.difference(new) == 0
    module.recompile()
    x = torch.randn(3, 8)
    columns = 8 if new.axis is None or new.block is None else new.block
    scale = new.scale.double().reshape(-1, 1) if new.axis is not None else new.scale.double()
    shifted = (module.w.double() - float(new.zero_point.flatten()[0])).reshape(-1, columns)
    weight = (shifted * scale).reshape(4, 8)
    torch.testing.assert_close(module(x).double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)


def test_another_kind_is_not_written() -> None:
    module = graph_of("channel")
    (value,) = quantized_values(module, ValueNames(module.graph))
    with pytest.raises(EncodingError, match="another kind of encoding: got 16 bits"):
        write_encoding(
            module, value, Encoding(torch.ones(4), torch.zeros(4), -32767, 32767, axis=0)
        )


def test_names_do_not_depend_on_the_number_of_tokens() -> None:
    module = Chunk()
    tables = [
        read_encodings(quantized(module, [(torch.randn(1, count, WIDTH),)])) for count in (1, 5, 8)
    ]
    assert list(tables[0]) == list(tables[1]) == list(tables[2])
    assert set(tables[0].parameters) == {
        f"{block}.{name}.weight" for block in ("first", "second") for name in "qkvo"
    }
    assert "first/matmul#1.mat2" in tables[0] or "first/matmul#1.other" in tables[0]


def test_a_prefix_is_left_out() -> None:
    module = quantized(Chunk(), [(torch.randn(1, 4, WIDTH),)])
    names = list(read_encodings(module, prefix="first"))
    assert "q.weight" in names and "second.q.weight" in names


def test_pairs_that_disagree_are_refused() -> None:
    module = quantized(Chunk(), [(torch.randn(1, 4, WIDTH),)])
    node = next(n for n in module.graph.nodes if call_name(n).endswith(".quantize_per_tensor"))
    node.update_arg(1, encoding_of(module, node).scale.item() * 2)
    with pytest.raises(EncodingError, match="inconsistent quantization"):
        read_encodings(module)
