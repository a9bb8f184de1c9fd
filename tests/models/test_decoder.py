"""The decoder with a static cache says what the model itself says, chunk by chunk and step by step.

The reference is the model's own forward over the whole text, without a cache.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from edgepass.models.architecture import TESTED_FAMILIES
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.ops.errors import CheckpointError, InvalidArgumentError
from tests.models.tiny_models import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

CONTEXT = 20


def random_tokens(count: int, vocab_size: int = 96) -> torch.Tensor:
    return torch.randint(vocab_size, (1, count), generator=torch.Generator().manual_seed(count))


def in_chunks(decoder, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of every chunk, side by side."""
    outputs, position = [], 0
    for size in sizes:
        chunk = tokens[:, position : position + size]
        outputs.append(decoder(chunk, torch.tensor([position])).clone())
        position += size
    return torch.cat(outputs, dim=1)


def test_each_tested_family_is_tested() -> None:
    assert set(FAMILIES) == TESTED_FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_then_decode_equals_the_model(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(CONTEXT)
    decoder = StaticCacheDecoder(model, CONTEXT, all_logits=True)
    logits = in_chunks(decoder, tokens, [9, 4, 1, 1, 1, 1, 1, 1, 1])
    assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_program_equals_the_model_at_every_token_count(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(CONTEXT)
    program = export_decoder(StaticCacheDecoder(model, CONTEXT)).module()
    sizes = [5, 1, 11, 1, 2]
    ends = torch.tensor(sizes).cumsum(0) - 1
    logits = in_chunks(program, tokens, sizes)
    assert_close(logits, model(tokens).logits[:, ends], rtol=1e-4, atol=1e-4)


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=CONTEXT).filter(lambda s: sum(s) <= CONTEXT)
)
@settings(max_examples=15)
def test_any_chunking_gives_the_same_logits(sizes: list[int]) -> None:
    model, tokens = tiny_model("gemma3_text"), random_tokens(sum(sizes))
    decoder = StaticCacheDecoder(model, CONTEXT, all_logits=True)
    logits = in_chunks(decoder, tokens, sizes)
    assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_last_logits_are_the_last_of_all_logits() -> None:
    model, tokens, start = tiny_model(), random_tokens(7), torch.tensor([0])
    last = StaticCacheDecoder(model, CONTEXT)(tokens, start)
    every = StaticCacheDecoder(model, CONTEXT, all_logits=True)(tokens, start)
    assert last.shape == (1, 1, 96)
    assert_close(last, every[:, -1:], rtol=1e-5, atol=1e-5)


def test_reset_forgets_the_text() -> None:
    decoder = StaticCacheDecoder(tiny_model(), CONTEXT)
    decoder(random_tokens(9), torch.tensor([0]))
    decoder.reset()
    assert all(not buffer.any() for name, buffer in decoder.named_buffers() if "_cache_" in name)


def test_the_model_still_works_outside_of_the_decoder() -> None:
    model, tokens = tiny_model(), random_tokens(6)
    before = model(tokens).logits
    StaticCacheDecoder(model, CONTEXT)(tokens, torch.tensor([0]))
    assert torch.equal(model(tokens).logits, before)


def test_the_exported_program_keeps_what_the_passes_match() -> None:
    program = export_decoder(StaticCacheDecoder(tiny_model(), CONTEXT))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.scaled_dot_product_attention.default") == 2
    assert targets.count("aten.index_copy_.default") == 4
    assert targets.count("aten.le.Tensor") == 1


def test_caches_are_persistent_buffers_of_the_key_heads() -> None:
    state = StaticCacheDecoder(tiny_model("qwen3"), CONTEXT).state_dict()
    caches = {name: tuple(tensor.shape) for name, tensor in state.items() if "_cache_" in name}
    expected = ["k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"]
    assert caches == dict.fromkeys(expected, (1, 2, CONTEXT, 32))


def test_half_precision_decodes_like_the_model() -> None:
    model, tokens = tiny_model().half(), random_tokens(8)
    decoder = StaticCacheDecoder(model, CONTEXT, all_logits=True)
    logits = in_chunks(decoder, tokens, [5, 1, 1, 1])
    assert_close(logits, model(tokens).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings_equal_the_model(rope: dict) -> None:
    model = tiny_model(rope_parameters={"rope_theta": 100.0, **rope})
    tokens = random_tokens(CONTEXT)
    program = export_decoder(StaticCacheDecoder(model, CONTEXT)).module()
    logits = in_chunks(program, tokens, [18, 1, 1])
    assert_close(logits, model(tokens).logits[:, -3:], rtol=1e-4, atol=1e-4)


def long_rope_model(original: int):
    """A Phi-3 whose rotary frequencies change beyond ``original`` tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8}
    rope["long_factor"] = [2.0 + i for i in range(8)]
    return tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=original)


def test_longrope_within_its_first_length_equals_the_model() -> None:
    model, tokens = long_rope_model(CONTEXT), random_tokens(CONTEXT)
    model(random_tokens(40))  # leaves the long frequencies behind
    decoder = StaticCacheDecoder(model, CONTEXT, all_logits=True)
    logits = in_chunks(decoder, tokens, [10, 9, 1])
    assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_longrope_beyond_its_first_length_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="context=17, accepted are 2 to 16"):
        StaticCacheDecoder(long_rope_model(16), 17)


@pytest.mark.parametrize("context", [-1, 0, 1, 65, 10**9])
def test_context_out_of_range_is_refused(context: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"context={context}, accepted are 2 to 64"):
        StaticCacheDecoder(tiny_model(), context)


def test_an_untested_family_is_compared_and_accepted() -> None:
    model, tokens = tiny_model("granite"), random_tokens(9)
    decoder = StaticCacheDecoder(model, CONTEXT, all_logits=True)
    logits = in_chunks(decoder, tokens, [4, 4, 1])
    assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_an_untested_family_that_attends_both_ways_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no static KV cache: got model=BertLMHeadModel"):
        StaticCacheDecoder(tiny_model("bert"), CONTEXT)


def test_tiny_parts_fit_together() -> None:
    text = "Hello, world"
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tiny_tokenizer().decode(ids) == text
    assert max(ids) < tiny_config().vocab_size
