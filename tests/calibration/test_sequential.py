"""Rounding a decoder layer by layer: what is rounded, what stays tied, and that it pays."""

import copy

import pytest
import torch
from torch import nn

from edgepass.calibration.decoder_layers import first_hidden_states, observe_layers
from edgepass.calibration.grids import RoundedWeight
from edgepass.calibration.sequential import round_decoder
from edgepass.calibration.weight_rounding import quantize_weight
from edgepass.ops.errors import CalibrationError
from tests.calibration.rounding_cases import Spec
from tests.models.tiny_models import tiny_model

FAMILIES = ["llama", "qwen3", "gemma3_text"]


def chunks(count: int = 6, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 96, (count, length), generator=generator)


def specs(model: nn.Module, algorithm: str) -> dict[str, Spec]:
    kinds = (nn.Linear, nn.Embedding)
    spec = Spec(3, 8, algorithm=algorithm)
    return {name: spec for name, module in model.named_modules() if isinstance(module, kinds)}


def rounded_error(model: nn.Module, algorithm: str) -> float:
    """How far the logits of ``model``, rounded, are from its own, relative."""
    with torch.no_grad():
        expected = model(chunks()).logits
        rounded = copy.deepcopy(model)
        round_decoder(rounded, specs(rounded, algorithm), chunks())
        return float((rounded(chunks()).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_alone_are_the_model(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(chunks(), output_hidden_states=True, use_cache=False).hidden_states
        hidden = first_hidden_states(model, chunks())
        for index, layer in enumerate(observe_layers(model, chunks()[0])[:-1]):
            hidden = [layer.run(states) for states in hidden]
            torch.testing.assert_close(torch.cat(hidden), expected[index + 1])


def test_a_tied_head_of_its_own_bits_is_rounded_from_the_float_values() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    values = model.get_input_embeddings().weight.detach().clone()
    asked = specs(model, "mse")
    (head,) = (name for name, module in model.named_modules() if module is model.lm_head)
    asked[head] = Spec(8, 8, algorithm="mse")
    found = round_decoder(model, asked, chunks())
    expected = quantize_weight(values, asked[head])
    assert torch.equal(found[head].dequantize(), expected.dequantize())
    del asked[head]
    again = tiny_model("llama", tie_word_embeddings=True)
    again.load_state_dict({"lm_head.weight": values}, strict=False)
    round_decoder(again, asked, chunks())
    assert torch.equal(again.get_output_embeddings().weight, values)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma3_text", False)])
def test_every_weight_is_left_as_it_was_rounded(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    asked = specs(model, "gptq")
    found = round_decoder(model, asked, chunks())
    assert set(found) == set(asked)
    for name, rounded in found.items():
        assert isinstance(rounded, RoundedWeight)
        assert torch.equal(model.get_submodule(name).weight, rounded.dequantize())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (table is head) == tied


def test_data_pay() -> None:
    model = tiny_model("llama")
    nearest, gptq = (rounded_error(model, name) for name in ("rtn", "gptq"))
    assert gptq < 0.85 * nearest


def test_the_same_chunks_give_the_same_bits() -> None:
    first, second = (
        round_decoder(m, specs(m, "gptq"), chunks())
        for m in [tiny_model("llama") for _ in range(2)]
    )
    for name, rounded in first.items():
        assert torch.equal(rounded.values, second[name].values)
        assert torch.equal(rounded.scale, second[name].scale)


def test_what_has_no_specification_stays() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "model.layers.1.mlp.down_proj"
    told: list[tuple[int, int]] = []
    found = round_decoder(
        model, {name: Spec(4, 8, algorithm="gptq")}, chunks(), lambda *done: told.append(done)
    )
    assert list(found) == [name]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{name}.weight"}
    assert told == [(i + 1, len(told)) for i in range(model.config.num_hidden_layers)]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no decoder layers: got model=Linear"):
        observe_layers(nn.Linear(2, 2), chunks()[0])


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(CalibrationError, match=rf"infinity as input of {name}"):
        round_decoder(model, {name: Spec(4, 8, algorithm="gptq")}, chunks())
