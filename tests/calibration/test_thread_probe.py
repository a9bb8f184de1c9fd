"""What the probe times: a model's distinct linears and its attention, each weighted."""

import pytest
import torch
from torch import nn

from edgepass.calibration import thread_probe
from edgepass.calibration.thread_probe import ModelShapes, Probe
from edgepass.ops.errors import InvalidArgumentError
from edgepass.ops.threads import torch_threads
from tests.models.tiny_models import tiny_model


def test_shapes_of_a_decoder() -> None:
    shapes = ModelShapes(tiny_model("llama", tie_word_embeddings=True))
    found = {(each.inputs, each.outputs): len(each.modules) for each in shapes.linears}
    # Two layers: q and o, k and v, gate and up, down; then the head.
    assert found == {(64, 64): 4, (64, 32): 4, (64, 96): 5, (96, 64): 2}
    assert shapes.attention == thread_probe.AttentionShape(layers=2, heads=4, width=16)


def test_modules_of_two_dtypes_are_apart() -> None:
    half = nn.Linear(8, 8).half()
    assert len(ModelShapes(nn.Sequential(nn.Linear(8, 8), half, nn.Linear(8, 8))).linears) == 2


def test_the_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.long))
    assert ModelShapes(model).flops(20) == counter.get_total_flops()


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"got model=Conv2d with 0 modules"):
        ModelShapes(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("rows", [32, 8])
def test_a_measurement_stands_for_the_whole_forward(monkeypatch, rows: int) -> None:
    """With a clock that counts operations, the seconds are the forward's operations."""
    from torch.utils.flop_counter import FlopCounterMode

    def operations(run, turn: int) -> float:
        with FlopCounterMode(display=False) as counter:
            run(turn)
        return counter.get_total_flops()

    monkeypatch.setattr(thread_probe, "_time", operations)
    monkeypatch.setattr(thread_probe, "_MOST_OUTPUTS", 48)
    shapes = ModelShapes(tiny_model("llama"))
    probe = Probe(shapes, tokens=32, rows=rows)
    with torch_threads():
        assert [probe(1) for _ in range(5)] == pytest.approx([shapes.flops(32)] * 5)


def test_the_flops_of_one_pass(monkeypatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    probe = Probe(ModelShapes(tiny_model("llama")), tokens=32, rows=8, past=16)
    with torch_threads(), FlopCounterMode(display=False) as counter:
        probe(1)
    assert probe.flops == counter.get_total_flops()


def test_passes_take_the_layers_in_turn_and_set_the_threads(monkeypatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    seen = []
    linear = nn.functional.linear

    def spy(x, weight):
        seen.append((weight.data_ptr(), torch.get_num_threads()))
        return linear(x, weight)

    monkeypatch.setattr(nn.functional, "linear", spy)
    probe = Probe(ModelShapes(model), tokens=4, rows=4)
    with torch_threads():
        for threads in (1, 2, 1):
            assert probe(threads) > 0
    assert {pointer for pointer, _ in seen} == {layer.weight.data_ptr() for layer in model}
    assert [threads for _, threads in seen] == [1, 2, 1]
