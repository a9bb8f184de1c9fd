"""Weight algorithms from the command line's point of view: which text they need, and with it."""

from pathlib import Path

import pytest
import torch

from edgepass.api import choose_recipe
from edgepass.calibration.recipes import quantize_model
from edgepass.ops.errors import CalibrationError, InvalidArgumentError
from edgepass.weight_calibration import check_text, read_text
from tests.models.tiny_models import tiny_model


def test_an_algorithm_takes_the_place_of_the_recipes() -> None:
    assert choose_recipe("8da4w", weight_algorithm="gptq").algorithms() == {"gptq"}
    assert choose_recipe("8da4w").algorithms() == {"rtn"}
    with pytest.raises(InvalidArgumentError, match="'gptk', did you mean 'gptq'"):
        choose_recipe("8da4w", weight_algorithm="gptk")


def test_a_text_that_is_needed_and_one_that_is_not() -> None:
    with pytest.raises(InvalidArgumentError, match="got weight algorithm gptq without --calib"):
        check_text(choose_recipe("8da4w", weight_algorithm="gptq"), None, None)
    with pytest.raises(InvalidArgumentError, match="for a recipe that reads no text"):
        check_text(choose_recipe("8da4w"), Path("text.txt"), None)
    check_text(choose_recipe("8da4w", weight_algorithm="gptq"), Path("text.txt"), 64)
    check_text(None, None, None)


def test_no_text_gives_no_chunks() -> None:
    assert read_text(None, None, None) is None


@pytest.mark.parametrize("algorithm", ["seqmse", "gptq"])
def test_a_tied_model_is_quantized_with_its_table(algorithm: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    recipe = choose_recipe("8da4w", 16, algorithm)
    with pytest.raises(InvalidArgumentError, match=f"algorithm={algorithm} for model.embed_tokens"):
        quantize_model(model, recipe)
    quantize_model(model, recipe, chunks=torch.randint(0, 96, (3, 20)))
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(head.qdata, table.qdata) and torch.equal(head.scale, table.scale)
    assert head.activation_quantization is not None and table.activation_quantization is None
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_a_text_that_is_too_short_says_how_many_tokens_it_has(tmp_path: Path) -> None:
    class Words:
        eos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split())))}

    text = tmp_path / "text.txt"
    text.write_text("seven words are not enough for this")
    with pytest.raises(CalibrationError, match="got 7 tokens"):
        read_text(Words(), text, 64)
    assert read_text(Words(), text, 6).shape == (1, 6)
