"""A decoder quantized on the chunk: its forms compute what the chunk graph computes.

The reference is the fake-quantized chunk graph over the same text, and the float model. Needs the
QNN libraries for the stock quantizer alone; nothing is compiled here.
"""

import pytest
import torch

from edgepass.calibration.recipe_file import parse_recipe
from edgepass.calibration.recipe_observers import MovingAverage, Mse, Percentile
from edgepass.calibration.recipe_presets import PRESETS
from edgepass.calibration.recipe_sections import Override, Weights
from edgepass.ops.errors import EncodingError, InvalidArgumentError
from edgepass.ops.float64_sums import Float64Sums
from tests.lowering.qnn_programs import (
    CHUNK,
    CONTEXT,
    needs_libraries,
    quantization,
    quantized,
    tokens,
)
from tests.models.cache_steps import run_chained
from tests.passes.programs import sqnr_db

pytestmark = needs_libraries


def chained(found, text):
    forms, graphs = found.forms, found.graphs
    plan = [
        (forms["prefill_forward"], [CHUNK, CHUNK]),
        (forms["kv_forward"], [1] * (CONTEXT - 1 - 2 * CHUNK)),
    ]
    run = {form: graphs[name] for name, form in forms.items()}
    return run_chained(found.decoder, text, plan, run)


@pytest.mark.parametrize(
    ("family", "recipe"), [("qwen3", "8a8w"), ("gemma3_text", "16a4w_block"), ("qwen3", "fp16a8w")]
)
def test_prefill_and_decode_chained_equal_the_chunk(family, recipe) -> None:
    found, text = quantized(family, recipe), tokens(seed=1)
    with torch.no_grad():
        whole = found.chunk_graph(*found.chunk.inputs(text))[0][0, : CONTEXT - 1]
        exact = found.decoder.model(text[None]).logits[0, : CONTEXT - 1]
        steps = chained(found, text)
    # Step by step within 1 dB of the chunk, against the float model.
    assert abs(sqnr_db(exact, steps) - sqnr_db(exact, whole)) < 1
    assert sqnr_db(exact, whole) > 8


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    ("recipe", "bits"),
    [("16a8w", 8), ("16a4w_block", 8), ("8a8w", 8), ("16a16w", 16), ("16a4w_block", 16)],
)
def test_without_rounding_errors_of_sums_chained_steps_are_the_chunk(family, recipe, bits) -> None:
    found, text = quantized(family, recipe, layers=2, kv_bits=bits), tokens(seed=1)
    with torch.no_grad(), Float64Sums():
        whole = found.chunk_graph(*found.chunk.inputs(text))[0][0, : CONTEXT - 1]
        steps = chained(found, text)
    assert torch.equal(steps, whole)


@pytest.mark.parametrize(
    ("bits", "dtype", "zero"), [(None, "uint8", 128), (8, "uint8", 128), (16, "int16", 0)]
)
def test_the_caches_have_their_bits_for_linears_and_convolutions(bits, dtype, zero) -> None:
    from edgepass.lowering.qnn_io import describe_io, io_encodings

    for recipe in ("16a8w", "16a4w_block"):
        found = quantized("qwen3", recipe, kv_bits=bits)
        for graph in found.graphs.values():
            entering, leaving = io_encodings(graph)
            caches = [*entering[-2:], *leaving[-2:]]
            assert [(each.bits, int(each.zero_point)) for each in caches] == [(bits or 8, zero)] * 4
        facts = describe_io(found)
        assert facts["cache"] == {"dtype": dtype, "zero": zero}
        assert facts["mask"] == {"dtype": "uint16", "visible": 65535, "hidden": 0}


def test_embeddings_instead_of_tokens() -> None:
    found = quantized("llama", "16a8w", embeddings=True)
    assert found.forms["kv_forward"].inputs(torch.zeros(1, 64))[0].shape == (1, 1, 64)
    assert "inputs_embeds" not in found.encodings and len(found.encodings) > 50


def test_mixed_block_sizes_are_each_module_s_own() -> None:
    found = quantized("qwen3", "16a4w_block", layer_block_sizes={"down_proj": 16, "q_proj": 64})
    blocks = {
        name.removesuffix(".weight").rpartition(".")[2]: encoding.block
        for name, encoding in found.encodings.parameters.items()
        if encoding.block is not None
    }
    assert blocks["down_proj"] == 16 and blocks["up_proj"] == 32
    # One block a row is one scale a channel.
    assert "q_proj" not in blocks and blocks["lm_head"] == 32


MIXED = """
name: mixed
backend: qnn
weights: {bits: 4, granularity: block, block_size: 16}
activations: {kind: static, bits: 16}
embedding: {bits: none}
head: {weights: {bits: 8, granularity: channel}}
overrides:
- {modules: "*.mlp.*", weights: {block_size: 32}}
- {modules: "*.down_proj", weights: {bits: 4, granularity: channel}}
- {modules: model.layers.0.self_attn.q_proj, weights: {bits: 8, granularity: channel}}
"""


def test_each_module_has_the_bits_and_blocks_of_the_recipe() -> None:
    found = quantized("qwen3", parse_recipe(MIXED))
    weights = {
        name.removesuffix(".weight").rpartition(".")[2]: (encoding.bits, encoding.block)
        for name, encoding in found.encodings.parameters.items()
        if encoding.axis is not None or encoding.block is not None
    }
    assert weights == {
        **dict.fromkeys(["k_proj", "v_proj", "o_proj"], (4, 16)),
        **dict.fromkeys(["gate_proj", "up_proj"], (4, 32)),
        "down_proj": (4, None),
        **dict.fromkeys(["q_proj", "lm_head"], (8, None)),
    }


FOUR_BITS = Override(modules="*.mlp.[gu]*", weights=Weights(bits=4, granularity="channel"))


def blocks_of_rows(graph) -> dict[str, int | None]:
    """The block that the graph has for the weights of each linear or convolution, None for none."""
    from edgepass.passes.value_names import call_name, module_path

    found: dict[str, int | None] = {}
    for node in graph.graph.nodes:
        if call_name(node) in ("aten.linear", "aten.conv2d"):
            weight = node.args[1]
            blocks = call_name(weight).endswith("_affine")
            found[module_path(node).rpartition(".")[2]] = weight.args[1][1] if blocks else None
    return found


@pytest.mark.parametrize(
    ("recipe", "rows"),
    [
        ("16a4w", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (parse_recipe(MIXED), {"down_proj"}),
        (PRESETS["16a8w"].changed(overrides=(FOUR_BITS,)), {"gate_proj", "up_proj"}),
        (PRESETS["8a8w"].changed(overrides=(FOUR_BITS,)), set()),
    ],
    ids=["16a4w", "mixed", "16a8w", "8a8w"],
)
def test_four_bit_rows_are_one_block_each_with_the_scale_of_a_channel(recipe, rows) -> None:
    found = quantized("qwen3", recipe)
    weights = {
        name: module.weight.detach()
        for name, module in found.decoder.model.named_modules()
        if name.rpartition(".")[2] in rows
    }
    assert len(weights) == len(rows)
    for graph in (found.chunk_graph, *found.graphs.values()):
        blocks = blocks_of_rows(graph)
        for name, weight in weights.items():
            assert blocks[name.rpartition(".")[2]] == weight.shape[1]
    for name, weight in weights.items():
        encoding = found.encodings.parameters[f"{name}.weight"]
        assert (encoding.bits, encoding.axis, encoding.block) == (4, 0, None)
        torch.testing.assert_close(encoding.scale, weight.abs().amax(dim=1) / 7, rtol=1e-6, atol=0)


def test_a_block_size_for_rows_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="got block_size=16 for down_proj, accepted are"):
        quantized("qwen3", parse_recipe(MIXED), layer_block_sizes={"down_proj": 16})


def test_a_block_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="got block_size=24, which does not divide the"):
        quantized("qwen3", "16a4w_block", block_size=24)


@pytest.mark.parametrize(("recipe", "bits"), [("16a8w", 4), ("8a8w", 16), ("fp16a8w", 8)])
def test_cache_bits_that_do_not_fit_are_refused(recipe, bits) -> None:
    with pytest.raises(InvalidArgumentError, match=f"got kv_bits={bits} for recipe={recipe}"):
        quantized("qwen3", recipe, kv_bits=bits)


@pytest.mark.parametrize(
    "observer",
    [
        Percentile(kind="percentile", percentile=99.0),
        MovingAverage(kind="moving_average", constant=0.5),
        Mse(kind="mse"),
    ],
    ids=lambda each: each.kind,
)
def test_other_observers_give_every_value_a_range_within_the_extremes(observer) -> None:
    recipe = PRESETS["16a8w"].changed(observer=observer)
    widest, found = quantized("qwen3", "16a8w"), quantized("qwen3", recipe)
    ratios = {
        name: float(encoding.scale / widest.encodings[name].scale)
        for name, encoding in found.encodings.activations.items()
    }
    assert ratios.keys() == widest.encodings.activations.keys()
    assert max(ratios.values()) <= 1 + 1e-5
    assert (min(ratios.values()) < 0.9) == (observer.kind != "mse")


class _Divide(torch.nn.Module):
    def forward(self, x):
        return x / (x - x)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda mlp: mlp.up_proj.weight[:1, :1].fill_(float("nan")),
            r"in .*up_proj\.weight during",
        ),
        (lambda mlp: mlp.up_proj.weight.fill_(1e5), r"beyond fp16: got .*up_proj\.weight with"),
        (lambda mlp: setattr(mlp, "act_fn", _Divide()), r"not finite: got .* in .*mlp\.act_fn \("),
    ],
)
def test_what_is_not_finite_is_refused_and_named(damage, message) -> None:
    from edgepass.calibration.observe import observe
    from edgepass.models.cache_decoder import CacheIoDecoder, export_form
    from tests.models.tiny_models import tiny_model

    model = tiny_model("qwen3", num_hidden_layers=1)
    damage(model.model.layers[0].mlp)
    form = CacheIoDecoder(model, CONTEXT).form(CONTEXT)
    with pytest.raises(EncodingError, match=message):
        prepared = quantization("16a8w").prepare(export_form(form))
        observe(prepared, [form.inputs(tokens())])


def test_texts_of_two_lengths_are_refused() -> None:
    from edgepass.lowering.qnn_decoder import quantize_decoder

    found = quantized("qwen3", "fp16a8w")
    with pytest.raises(InvalidArgumentError, match=r"got lengths \[5, 6\]"):
        quantize_decoder(found.decoder, None, [tokens(5), tokens(6)], CHUNK)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2"])
def test_the_chunk_and_decode_find_equal_encodings_on_equal_tokens(family) -> None:
    from edgepass.lowering.qnn_decoder import MODEL_PREFIX, quantize_decoder
    from edgepass.models.cache_decoder import CacheIoDecoder, export_form
    from edgepass.passes.kv_pairs import kv_pairs_of
    from edgepass.passes.quantized_values import read_encodings
    from tests.models.tiny_models import tiny_model

    how, text = quantization("16a8w"), tokens(seed=1)
    decoder = CacheIoDecoder(tiny_model(family), CONTEXT)
    found = quantize_decoder(decoder, how, [text], CHUNK)
    form = found.forms["kv_forward"]
    prepared = how.prepare(export_form(form))
    run_chained(decoder, text, [(form, [1] * CONTEXT)], {form: prepared})
    calibrated = how.convert(prepared)
    joins = {join for _, join, _ in kv_pairs_of(calibrated.graph)}
    own = read_encodings(calibrated, MODEL_PREFIX, joins)
    shared = [name for name in own if name in found.encodings]
    assert len(shared) > 100 and any("softmax" in name for name in shared)
    differing = {each.name: each.reason for each in found.encodings.diff(own, 1e-4)}
    assert [differing[name] for name in shared if name in differing] == []


@pytest.mark.parametrize(
    ("recipe", "bits"), [("16a4w_block", 8), ("16a4w_block", 16), ("16a4w", 8), ("fp16a8w", 16)]
)
def test_encodings_from_a_file_give_the_same_graphs(recipe, bits, tmp_path) -> None:
    from edgepass.lowering.qnn_decoder import quantize_decoder
    from edgepass.ops.encodings_file import read_encodings_file, write_encodings_file

    found, file = quantized("qwen3", recipe, kv_bits=bits), tmp_path / "encodings.json"
    write_encodings_file(file, found.encodings)
    text, table = tokens(CHUNK, seed=5), read_encodings_file(file)
    how = quantization(recipe, kv_bits=bits)
    again = quantize_decoder(found.decoder, how, [text], CHUNK, encodings=table)
    assert not again.encodings.diff(found.encodings)
    for name, form in found.forms.items():
        inputs = form.inputs(tokens(form.tokens, seed=3))
        with torch.no_grad():
            one, other = (each.graphs[name](*inputs) for each in (found, again))
        assert all(map(torch.equal, one, other))
