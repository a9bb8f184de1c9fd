"""Stand-ins for delegates' original graphs: their shapes, and nothing else."""

import torch
from torch import Tensor, nn

from edgepass.lowering.shapes_only import shapes_only
from tests.lowering.vulkan_programs import Decoder, export_decoder, export_tokens


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


def test_a_decoder_gives_logits_of_zeros() -> None:
    stand_in = shapes_only(export_decoder(Decoder(vocabulary=64)))
    logits = stand_in.module()(torch.zeros(1, 9, dtype=torch.long), torch.tensor([0]))
    assert torch.equal(logits, torch.zeros(1, 1, 64))


def test_a_dynamic_size_is_taken_from_the_input() -> None:
    stand_in = shapes_only(export_tokens(nn.Linear(16, 24), 16))
    assert stand_in.module()(torch.ones(1, 9, 16)).shape == (1, 9, 24)
    assert stand_in.state_dict == {}


def test_a_size_that_no_input_has_keeps_the_program() -> None:
    program = export_tokens(Doubled(), 16)
    assert shapes_only(program) is program
