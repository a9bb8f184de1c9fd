"""The forms with caches as inputs and outputs say what the model itself says.

The reference is the model's own forward over the whole text, without a cache.
"""

import pytest
import torch
from torch.testing import assert_close

from edgepass.models.cache_decoder import CacheIoDecoder, export_form
from edgepass.models.cache_mask import MASKED
from edgepass.ops.errors import CheckpointError, InvalidArgumentError
from tests.models.cache_steps import run_chained
from tests.models.tiny_models import FAMILIES, tiny_config, tiny_model

CONTEXT = 24


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunk_equals_the_model(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(CONTEXT)
    form = CacheIoDecoder(model, CONTEXT).form(CONTEXT)
    assert form.kv_pairs() == []
    logits = form(*form.inputs(tokens))[0]
    assert_close(logits, model(tokens[None]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_then_decode_equals_the_model(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(20)
    decoder = CacheIoDecoder(model, CONTEXT)
    logits = run_chained(decoder, tokens, [(decoder.form(6), [6, 5]), (decoder.form(1), [1] * 9)])
    assert_close(logits, model(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_exported_forms_equal_the_model(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(12)
    decoder = CacheIoDecoder(model, CONTEXT)
    prefill, decode = decoder.form(8), decoder.form(1)
    run = {form: export_form(form).module(check_guards=False) for form in (prefill, decode)}
    logits = run_chained(decoder, tokens, [(prefill, [8]), (decode, [1] * 4)], run)
    assert_close(logits, model(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_embeddings_in_the_place_of_tokens() -> None:
    model, tokens = tiny_model("qwen2"), random_tokens(10)
    vectors = model.get_input_embeddings()(tokens)
    vectors[3:6] += 0.5  # features that are no token's
    decoder = CacheIoDecoder(model, CONTEXT, embeddings=True)
    logits = run_chained(decoder, vectors, [(decoder.form(7), [7]), (decoder.form(1), [1] * 3)])
    expected = model(inputs_embeds=vectors[None]).logits[0]
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_forms_share_the_weights_and_leave_the_model_as_it_was() -> None:
    model, tokens = tiny_model("gemma2"), random_tokens(8)
    before = model(tokens[None]).logits
    decoder = CacheIoDecoder(model, CONTEXT)
    states = [export_form(decoder.form(n)).state_dict for n in (1, 4)]
    name = "decoder.model.model.layers.0.self_attn.q_proj.weight"
    assert states[0][name].data_ptr() == states[1][name].data_ptr()
    assert torch.equal(model(tokens[None]).logits, before)


def test_graphs_hold_whole_norms_and_rotary_tables() -> None:
    program = export_form(CacheIoDecoder(tiny_model("gemma3_text"), CONTEXT).form(1))
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "aten.rms_norm.default" in operators
    assert not operators & {"aten.cos.default", "aten.sin.default", "aten.rsqrt.default"}


def test_inputs_have_names_and_pair_with_outputs() -> None:
    form = CacheIoDecoder(tiny_model("gemma3_text"), CONTEXT).form(4)
    program = export_form(form)
    names = list(program.graph_signature.user_inputs)
    assert names[:4] == ["tokens", "masks_0", "masks_1", "input_pos"]
    assert [names[i] for i, _ in form.kv_pairs()] == [
        *("k_cache_0", "k_cache_1", "v_cache_0", "v_cache_1")
    ]
    assert [j for _, j in form.kv_pairs()] == [1, 2, 3, 4]


def test_a_norm_of_another_kind_stays_as_it_is() -> None:
    model = tiny_model("llama")
    norm = model.model.norm

    def doubled(x):
        return type(norm).forward(norm, x) * (1 + x.abs().mean())

    norm.forward = doubled
    decoder = CacheIoDecoder(model, CONTEXT)
    assert "model/norm" not in decoder.norms.epsilons
    assert len(decoder.norms.epsilons) == 4


def test_the_mask_hides_empty_cache_padding_and_what_is_behind_the_window() -> None:
    form = CacheIoDecoder(tiny_model("gemma3_text"), 8).form(3)
    mask = form.mask(start=2, count=2, window=3)[0, 0]
    seen = [[int(i) for i in (row == 0).nonzero().flatten()] for row in mask]
    assert seen == [[0, 1, 5], [1, 5, 6], [7]]
    assert set(mask.unique().tolist()) == {0.0, MASKED}


@pytest.mark.parametrize("tokens", [0, 25])
def test_a_form_that_does_not_fit_is_refused(tokens: int) -> None:
    decoder = CacheIoDecoder(tiny_model(), CONTEXT)
    with pytest.raises(InvalidArgumentError, match=f"got tokens={tokens} and context=24"):
        decoder.form(tokens)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="context=65, accepted are 2 to 64"):
        CacheIoDecoder(tiny_model(), 65)


def test_an_encoder_is_refused() -> None:
    model = tiny_model()
    model.config = tiny_config().__class__(**{**model.config.to_dict(), "kv_lora_rank": 8})
    with pytest.raises(CheckpointError, match="compressed"):
        CacheIoDecoder(model, CONTEXT)
