"""The text half of a vision-language model predicts what the whole model predicts.

The reference is the model's own forward over ids and pixels.
"""

import pytest
import torch
from torch.testing import assert_close

from edgepass.models.cache_decoder import CacheIoDecoder
from edgepass.models.vision_language import embed_prompt, text_half
from edgepass.ops.errors import CheckpointError, InvalidArgumentError
from tests.models.cache_steps import run_chained
from tests.models.tiny_models import tiny_model
from tests.models.vision_models import prompt, tiny_vision_model

GOOD = ["llava", "idefics3", "smolvlm"]


@pytest.mark.parametrize("family", GOOD)
def test_prefill_and_decode_of_a_prompt_with_an_image(family) -> None:
    model, given = tiny_vision_model(family), prompt(family)
    exact = model(**given).logits[0]
    vectors = embed_prompt(model, **given)
    decoder = CacheIoDecoder(text_half(model), 24, embeddings=True)
    plan = [(decoder.form(6), [6]), (decoder.form(1), [1] * (len(vectors) - 6))]
    assert_close(run_chained(decoder, vectors, plan), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**given).logits[0], exact)


def test_the_image_is_in_the_vectors_and_the_weights_are_shared() -> None:
    model, given = tiny_vision_model("llava"), prompt("llava")
    other = {**given, "pixel_values": given["pixel_values"] + 1}
    one, two = embed_prompt(model, **given), embed_prompt(model, **other)
    assert [bool((a != b).any()) for a, b in zip(one, two, strict=True)] == (
        (given["input_ids"][0] == 95).tolist()
    )
    half = text_half(model)
    assert half.lm_head.weight is model.lm_head.weight
    assert half.model is model.model.language_model


@pytest.mark.parametrize("family", ["paligemma", "gemma3"])
def test_a_mask_that_is_not_causal_is_refused(family) -> None:
    with pytest.raises(CheckpointError, match="it tells its decoder attention_mask beside"):
        embed_prompt(tiny_vision_model(family), **prompt(family))


def test_a_model_without_images_is_refused() -> None:
    with pytest.raises(CheckpointError, match="got model_type=llama: it has no decoder and head"):
        text_half(tiny_model("llama"))


def test_a_decoder_that_only_this_model_has_is_refused() -> None:
    import transformers

    config = transformers.Qwen2VLConfig(
        text_config={"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 96},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(CheckpointError, match="of type qwen2_vl_text is none of its own"):
        text_half(model)


def test_a_head_that_changes_the_logits_is_refused() -> None:
    model = tiny_vision_model("llava")
    inner = model.model.forward

    def doubled(*args, **kwargs):
        result = inner(*args, **kwargs)
        result.last_hidden_state = result.last_hidden_state * 2
        return result

    model.model.forward = doubled
    with pytest.raises(CheckpointError, match="its decoder alone is off by"):
        text_half(model)


def test_an_image_that_does_not_fit_its_placeholders_is_refused() -> None:
    given = prompt("llava")
    given["input_ids"] = given["input_ids"][:, 3:]
    with pytest.raises(InvalidArgumentError, match=r"got input_ids, pixel_values: .*do not match"):
        embed_prompt(tiny_vision_model("llava"), **given)


def test_several_prompts_are_refused() -> None:
    given = {name: torch.cat([each, each]) for name, each in prompt("llava").items()}
    with pytest.raises(InvalidArgumentError, match=r"shape \[2, 10, 64\], accepted is one"):
        embed_prompt(tiny_vision_model("llava"), **given)
