"""Encodings of the chunk graph, carried into the graph with caches; what cannot be is listed."""

import pytest
import torch
from torch import nn

from edgepass.ops.errors import EncodingError
from edgepass.passes.propagate_kv_encodings import propagate_kv_encodings
from edgepass.passes.quantized_values import quantized_values, read_encodings
from edgepass.passes.value_names import ValueNames, call_name
from tests.passes.kv_models import (
    PAIRS,
    WIDTH,
    Chunk,
    Step,
    chunk_and_step,
    empty_caches,
    quantized,
)
from tests.passes.programs import sqnr_db


def encodings_at(module, node):
    values = quantized_values(module, ValueNames(module.graph))
    return [v.encoding for v in values if v.root is node or node in v.calls]


@pytest.mark.parametrize("pairs", [PAIRS, None])
def test_a_chain_of_steps_computes_what_the_chunk_computes(pairs) -> None:
    source, target, _, x = chunk_and_step(past=7)
    report = propagate_kv_encodings(source, target, pairs)
    assert [cache for cache, _ in report.pairs] == [
        *("k_cache_0", "k_cache_1", "v_cache_0", "v_cache_1")
    ]
    # All past rows at once, as the chunk graph itself computes them; then one step.
    whole = source(x)
    caches = [rows[:, :7] for rows in whole[1:]]
    step = target(x[:, 7:], *caches)
    for mine, all_rows in zip(step, whole, strict=True):
        assert sqnr_db(all_rows[:, -1:], mine) > 60


def test_without_it_the_step_is_far_off() -> None:
    source, target, _, x = chunk_and_step(past=7)
    whole = source(x)
    step = target(x[:, 7:], *(rows[:, :7] for rows in whole[1:]))
    assert sqnr_db(whole[0][:, -1:], step[0]) < 40


def test_what_a_step_writes_is_what_the_next_one_reads() -> None:
    source, target, _, _ = chunk_and_step()
    propagate_kv_encodings(source, target)
    inputs = list(target.graph.find_nodes(op="placeholder"))
    outputs = target.graph.output_node().args[0]
    for i, j in PAIRS:
        read, written = encodings_at(target, inputs[i]), encodings_at(target, outputs[j])[-1]
        assert read and all(written.difference(each) == 0 for each in read)


def test_every_shared_value_has_the_encoding_of_the_source() -> None:
    source, target, _, _ = chunk_and_step()
    before = read_encodings(source)
    propagate_kv_encodings(source, target)
    joins = {node for node in target.graph.nodes if call_name(node) == "aten.cat"}
    after = read_encodings(target, joins=joins)
    shared = [name for name in before if name in after]
    assert len(shared) > 40
    assert all(before[name].difference(after[name]) == 0 for name in shared)


def test_a_second_run_changes_nothing() -> None:
    source, target, _, x = chunk_and_step(past=3)
    propagate_kv_encodings(source, target)
    inputs = (x[:, 3:], *(rows[:, :3] for rows in source(x)[1:]))
    before = target(*inputs)
    propagate_kv_encodings(source, target)
    assert all(torch.equal(a, b) for a, b in zip(before, target(*inputs), strict=True))


def test_weights_are_held_once() -> None:
    source, target, _, _ = chunk_and_step()
    propagate_kv_encodings(source, target)
    for module in (source, target):
        module.held = {
            call.target: getattr(module, call.target).data_ptr()
            for call in module.graph.find_nodes(op="get_attr")
            if getattr(module, call.target).dtype == torch.int8
        }
    assert set(source.held.values()) == set(target.held.values())


class OtherOrder(Step):
    """The same model, returning values before keys, with its caches in another order."""

    def forward(self, v_cache_1, x, v_cache_0, k_cache_1, k_cache_0):
        x, k0, k1, v0, v1 = super().forward(x, k_cache_0, k_cache_1, v_cache_0, v_cache_1)
        return v1, v0, x, k1, k0


def test_nothing_goes_by_position() -> None:
    source, _, chunk, x = chunk_and_step(past=5)
    other = OtherOrder()
    other.load_state_dict(chunk.state_dict())
    a, b, c, d = empty_caches(5)
    target = quantized(other, [(a, torch.randn(1, 1, WIDTH), b, c, d)])
    propagate_kv_encodings(source, target)
    _, k0, k1, v0, v1 = (rows[:, :5] for rows in source(x))
    found = target(v1, x[:, 5:], v0, k1, k0)
    expected = [source(x)[i][:, -1:] for i in (4, 3, 0, 2, 1)]
    for mine, its in zip(found, expected, strict=True):
        assert sqnr_db(its, mine) > 60


class Missing(Step):
    def forward(self, x, k_cache_0, k_cache_1, v_cache_0, v_cache_1):
        out = super().forward(x, k_cache_0, k_cache_1, v_cache_0, v_cache_1)
        return (out[0] * 3.0, *out[1:])


def test_a_value_that_the_source_lacks_is_listed_and_nothing_is_written() -> None:
    source, _, chunk, x = chunk_and_step(past=3)
    other = Missing()
    other.load_state_dict(chunk.state_dict())
    target = quantized(other, [(x[:, 3:], *empty_caches(3))])
    before = [node.args for node in target.graph.nodes]
    with pytest.raises(EncodingError, match=r"missing: /mul#0\.output") as caught:
        propagate_kv_encodings(source, target)
    assert "\n" not in str(caught.value)
    assert [node.args for node in target.graph.nodes] == before


class Twice(Chunk):
    """Calls one operator of a module once more: which of them is which cannot be told."""

    def forward(self, x):
        out = super().forward(x)
        return (self.first.o(self.second.q(out[0])), *out[1:])


def test_counts_that_differ_are_ambiguous() -> None:
    _, target, chunk, x = chunk_and_step(past=3)
    other = Twice()
    other.load_state_dict(chunk.state_dict())
    source = quantized(other, [(x,)])
    with pytest.raises(EncodingError, match=r"ambiguous: .*linear#0.* is one of 2 calls in the"):
        propagate_kv_encodings(source, target)


def test_another_model_is_refused() -> None:
    source = quantized(nn.Sequential(nn.Linear(WIDTH, WIDTH)), [(torch.randn(1, 4, WIDTH),)])
    _, target, _, _ = chunk_and_step()
    with pytest.raises(EncodingError, match="accepted is a source of the same model and recipe"):
        propagate_kv_encodings(source, target)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 9)], "no such KV pair: got input 1 and output 9"),
        ([(0, 0)], "no KV input: got x, which 0 calls join"),
    ],
)
def test_wrong_pairs_are_refused(pairs, message) -> None:
    source, target, _, _ = chunk_and_step()
    with pytest.raises(EncodingError, match=message):
        propagate_kv_encodings(source, target, pairs)


class TwoCandidates(Step):
    def forward(self, x, k_cache_0, k_cache_1, v_cache_0, v_cache_1):
        out = super().forward(x, k_cache_0, k_cache_1, v_cache_0, v_cache_1)
        return (*out, out[1].transpose(1, 2))


def test_ambiguous_pairs_are_refused() -> None:
    source, _, chunk, x = chunk_and_step(past=3)
    other = TwoCandidates()
    other.load_state_dict(chunk.state_dict())
    target = quantized(other, [(x[:, 3:], *empty_caches(3))])
    with pytest.raises(EncodingError, match="ambiguous KV pair: got input k_cache_0"):
        propagate_kv_encodings(source, target)
