"""KV caches are of 8 or 16 bits whatever joins them and whatever projects: one delegate, right.

The attention here is a user's own module on the stock quantizer and lowering. Its caches hold all
positions; a step writes its row at ``at``.
"""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.propagate_kv_encodings import propagate_kv_encodings
from tests.lowering.qnn_programs import needs_libraries, quantization
from tests.passes.programs import sqnr_db

pytestmark = needs_libraries
WIDTH, HEADS, PAST = 32, 2, 7

JOINS = {
    "cat": lambda cache, rows, at: torch.cat([cache, rows], 2),
    "index_copy": lambda cache, rows, at: torch.index_copy(cache, 2, at, rows),
    "index_put": lambda cache, rows, at: torch.ops.aten.index_put(cache, [None, None, at], rows),
    "slice_scatter": lambda cache, rows, at: torch.slice_scatter(cache, rows, 2, PAST - 1, PAST),
}


# HTP scatters no signed 16 bits.
ALL = [*((join, 8) for join in JOINS), ("cat", 16), ("slice_scatter", 16)]


class Attention(nn.Module):
    """``x [1, 1, W]``, caches ``[1, H, P, D]``, ``at int32 [1]``; returns the result and rows."""

    def __init__(self, join: str, conv: bool) -> None:
        super().__init__()
        self.join, self.conv = JOINS[join], conv
        make = nn.Conv2d if conv else nn.Linear
        extra = (1,) if conv else ()
        self.q, self.k, self.v, self.o = (make(WIDTH, WIDTH, *extra, bias=False) for _ in range(4))

    def forward(self, x, k_cache=None, v_cache=None, at=None):
        q, k, v = (self._heads(each, x) for each in (self.q, self.k, self.v))
        k = k * 1.5
        keys, values = k, v
        if at is not None:
            keys, values = self.join(k_cache, k, at), self.join(v_cache, v, at)
        weights = torch.softmax(q @ keys.transpose(2, 3), -1)
        mixed = (weights @ values).transpose(1, 2).reshape(1, -1, WIDTH)
        return x + self._project(self.o, mixed), k, v

    def _project(self, projection, x):
        if not self.conv:
            return projection(x)
        return projection(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)

    def _heads(self, projection, x):
        return self._project(projection, x).view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)


def inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    caches = (torch.randn(1, HEADS, PAST, WIDTH // HEADS, generator=generator) for _ in range(2))
    where = torch.tensor([PAST - 1], dtype=torch.int32)
    return torch.randn(1, 1, WIDTH, generator=generator), *caches, where.long()


def converted(module, given, recipe="16a8w", **options):
    chosen = quantization(recipe, **options)
    prepared = chosen.prepare(torch.export.export(module.eval(), given, strict=False))
    with torch.no_grad():
        prepared(*given)
    return chosen.convert(prepared)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(("join", "bits"), ALL)
def test_caches_joins_and_rows_share_one_encoding(join, bits, conv) -> None:
    from edgepass.passes.kv_pairs import kv_pairs_of
    from edgepass.passes.quantized_values import quantized_values
    from edgepass.passes.value_names import ValueNames

    torch.manual_seed(0)
    graph = converted(Attention(join, conv), inputs(), kv_bits=bits)
    pairs = kv_pairs_of(graph.graph)
    assert [(cache.name, join.op) for cache, join, _ in pairs] == [
        ("k_cache", "call_function"),
        ("v_cache", "call_function"),
    ]
    values = quantized_values(graph, ValueNames(graph.graph))
    for cache, whole, row in pairs:
        kinds = {
            (v.encoding.bits, int(v.encoding.zero_point), v.encoding.scale.item())
            for v in values
            if v.root in (cache, whole) or row in v.calls
        }
        assert len(kinds) == 1 and min(kinds)[:2] == (bits, 128 if bits == 8 else 0)


@pytest.mark.parametrize("join", ["index_copy", "index_put"])
def test_joins_that_scatter_16_bits_are_refused(join) -> None:
    message = rf"got kv_bits=16 for {join}\w*, a join by aten.{join}, accepted are 8, or joins by"
    with pytest.raises(InvalidArgumentError, match=message):
        converted(Attention(join, False), inputs(), kv_bits=16)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(("join", "bits"), ALL)
def test_a_step_computes_what_the_chunk_does_with_its_encodings(join, bits, conv) -> None:
    torch.manual_seed(0)
    module, x = Attention(join, conv), torch.randn(1, PAST, WIDTH)
    chunk = converted(module, (x,), kv_bits=bits)
    whole, *rows = chunk(x)
    caches = [each[:, :, : PAST - 1] if join == "cat" else each + 0 for each in rows]
    if join != "cat":
        for cache in caches:
            cache[:, :, PAST - 1] = 0
    step = converted(module, (torch.randn(1, 1, WIDTH) * 9, *caches, inputs()[3]), kv_bits=bits)
    propagation = propagate_kv_encodings(chunk, step)
    assert [cache for cache, _ in propagation.pairs] == ["k_cache", "v_cache"]
    found = step(x[:, PAST - 1 :], *caches, inputs()[3])
    assert sqnr_db(whole[:, -1:], found[0]) > 60
    for new, all_rows in zip(found[1:], rows, strict=True):
        assert sqnr_db(all_rows[:, :, -1:], new) > 60


class Blocks(nn.Module):
    """One attention of each kind behind the other; returns the result, keys, then values."""

    def __init__(self, kinds) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(*kind) for kind in kinds)

    def forward(self, x, k_caches, v_caches, at):
        keys, values = [], []
        for block, k_cache, v_cache in zip(self.blocks, k_caches, v_caches, strict=True):
            x, k, v = block(x, k_cache, v_cache, at)
            keys.append(k)
            values.append(v)
        return (x, *keys, *values)


@pytest.mark.parametrize(
    ("bits", "dtype", "least_db"), [(8, torch.uint8, 35), (16, torch.int16, 70)]
)
def test_in_one_delegate_they_compute_what_the_graph_computes(
    bits, dtype, least_db, tmp_path
) -> None:
    from edgepass.lowering.qnn_io import dequantize_tensor, io_encodings, quantize_tensor
    from edgepass.lowering.qnn_lowering import lower_graphs
    from edgepass.lowering.qnn_recipes import find_chip
    from edgepass.lowering.qnn_simulator import SimulatedProgram
    from edgepass.lowering.report import delegates, outside_delegates

    torch.manual_seed(0)
    kinds = [("slice_scatter", False), ("cat", True)]
    if bits == 8:
        kinds += [("index_copy", False), ("index_put", True)]
    x, _, _, at = inputs()
    given = x, *([inputs(i)[j] for i in range(len(kinds))] for j in (1, 2)), at
    graph = converted(Blocks(kinds), given, kv_bits=bits)
    manager = lower_graphs({"forward": graph}, {"forward": given}, find_chip("SM8650"))
    assert delegates(manager) == {"forward": 1}
    assert outside_delegates(manager) == {"forward": {}}
    path = tmp_path / "model.pte"
    path.write_bytes(manager.buffer)
    entering, leaving = io_encodings(graph)
    flat = zip(pytree.tree_leaves(given), entering, strict=True)
    with torch.no_grad():
        expected = graph(*given)
    found = SimulatedProgram(path).run("forward", [quantize_tensor(*each) for each in flat])
    assert [each.dtype for each in found] == [torch.uint16] + [dtype] * 2 * len(kinds)
    for graphs, device, encoding in zip(expected, found, leaving, strict=True):
        # A row has 32 values of 8 bits, of which one that rounds the other way shows.
        assert sqnr_db(graphs, dequantize_tensor(device, encoding)) > least_db


def test_what_was_seen_ends_where_htp_multiplies_by_two_signed_bytes() -> None:
    from edgepass.lowering.qnn_io import io_encodings

    torch.manual_seed(0)
    given = inputs()
    entering, _ = io_encodings(converted(Attention("cat", False), given, kv_bits=16))
    for cache, encoding in zip(given[1:3], entering[1:3], strict=True):
        assert (encoding.quant_min, encoding.quant_max) == (-(2**15), 2**15 - 1)
        assert cache.abs().max() / encoding.scale < 32639.5
