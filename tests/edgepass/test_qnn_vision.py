"""The text half of a vision-language model on the HTP libraries, fed by embeddings."""

import pytest
import torch

from edgepass import embed_prompt, lower_for_qnn, text_half
from edgepass.generation import load_decoder
from edgepass.ops.errors import InvalidArgumentError
from edgepass.qnn import QnnOptions
from tests.lowering.qnn_programs import needs_libraries
from tests.models.tiny_models import tiny_model, tiny_tokenizer
from tests.models.vision_models import prompt, tiny_vision_model

pytestmark = needs_libraries
OPTIONS = QnnOptions(recipe="16a8w", context=24, prefill_chunk=6)


def calibration_vectors(model) -> torch.Tensor:
    return torch.cat([embed_prompt(model, **prompt("llava", seed)) for seed in range(5)])[:48]


def noise(exact: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - exact).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("recipe", ["16a8w", "16a4w_block"])
def test_fake_quantized_it_predicts_what_the_whole_model_does(recipe) -> None:
    from edgepass.lowering.qnn_decoder import quantize_decoder
    from edgepass.models.cache_decoder import CacheIoDecoder
    from tests.lowering.qnn_programs import quantization
    from tests.models.cache_steps import run_chained

    model, given = tiny_vision_model("llava"), prompt("llava", seed=9)
    decoder = CacheIoDecoder(text_half(model), 24, embeddings=True)
    texts = list(calibration_vectors(model).split(24))
    found = quantize_decoder(decoder, quantization(recipe), texts, 6)
    prefill, decode = found.forms["prefill_forward"], found.forms["kv_forward"]
    run = {form: found.graphs[name] for name, form in found.forms.items()}
    plan = [(prefill, [6]), (decode, [1] * 4)]
    steps = run_chained(decoder, embed_prompt(model, **given), plan, run)
    assert noise(model(**given).logits[0], steps) < {"16a8w": 0.01, "16a4w_block": 0.1}[recipe]


@pytest.mark.nightly
def test_lowered_it_takes_a_prompt_with_an_image_and_no_ids(tmp_path, command) -> None:
    model, given = tiny_vision_model("llava"), prompt("llava", seed=9)
    vectors = embed_prompt(model, **given)
    result = lower_for_qnn(text_half(model), OPTIONS, calibration_vectors(model), check=True)
    assert result.report["inputs"] == "embeddings"
    assert result.report["delegates"] == {"kv_forward": 1, "prefill_forward": 1}
    assert not any(result.report["outside_delegates"].values())
    measured = result.report["numerics"]["device_sqnr_db"]
    assert min(values[0] for values in measured.values()) >= 40
    folder = result.save(tmp_path / "out", tiny_tokenizer())
    decoder = load_decoder(folder)
    assert noise(model(**given).logits[0, -1], decoder.prefill(vectors)) < 0.02
    # The next token is looked up in the model's own table.
    table = model.get_input_embeddings()
    longer = {**given, "input_ids": torch.cat([given["input_ids"], torch.tensor([[7]])], 1)}
    exact = model(**longer).logits[0, -1]
    assert noise(exact, decoder(table(torch.tensor([7])), len(vectors))) < 0.02
    assert decoder._program.constant("get_use_embeddings") == 1
    with pytest.raises(InvalidArgumentError, match=r"accepted are vectors float \[S, 64\]"):
        decoder.prefill([1, 2, 3])
    code, _, err = command("run", folder, "--prompt", "He", "--max-new-tokens", 4)
    assert code == 2 and "was lowered for them, with 1 token ids" in err


@pytest.mark.parametrize("given", [torch.ones(4, 32), torch.ones(4), torch.ones(4, 64).long()])
def test_what_is_no_text_of_vectors_is_refused(given) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no embeddings: got .*accepted are floats \[S"):
        lower_for_qnn(tiny_model(), OPTIONS, given)
