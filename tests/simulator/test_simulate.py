"""Whole programs in the simulator, against their graphs run eagerly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import edgepass
from edgepass.lowering.vulkan import lower_vulkan
from edgepass.lowering.vulkan_rewrite import rewrite_for_vulkan
from edgepass.ops import unpack_int4
from edgepass.ops.errors import InvalidArgumentError, ProgramError
from edgepass.simulator.simulate import SimulatedProgram, simulate
from tests.lowering.vulkan_programs import (
    Decoder,
    EagerRun,
    Mlp,
    export_decoder,
    export_tokens,
    sqnr_db,
)


class WeightOnlyRun(EagerRun):
    """The rewritten graph with float activations in its linears: what one token is computed by."""

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:
        if target is torch.ops.et_vk.linear_dq8ca_q4gsw.default:
            return weight_only(*args)
        return super().call_function(target, args, kwargs)


def weight_only(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    packed: Tensor,
    sums: Tensor,
    scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    w = unpack_int4(packed, packed.shape[1] * 2)[:, : x.shape[-1]].double()
    w = w * scales.double().repeat_interleave(group_size, 0).t()
    y = x.double() @ w.t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return export_decoder(Decoder(layers=2))


@pytest.fixture(scope="module")
def buffer(program: ExportedProgram) -> bytes:
    return lower_vulkan(program).buffer


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (1, count), generator=torch.Generator().manual_seed(seed))


def agreement(
    simulated: SimulatedProgram, eager: Callable[..., Tensor], counts: list[int]
) -> list[float]:
    """Agreement in dB of chunks of ``counts`` tokens, one behind the other."""
    found, position = [], 0
    for count in counts:
        inputs = tokens(count, position), torch.tensor([position])
        found.append(sqnr_db(simulated.run(inputs)[0], eager(*inputs)))
        position += count
    return found


def test_a_decoder_agrees_with_its_graph_in_chunks_up_and_down(
    program: ExportedProgram, buffer: bytes
) -> None:
    eager = EagerRun(rewrite_for_vulkan(program, merge=True, half=False))
    assert min(agreement(SimulatedProgram(buffer), eager, [5, 2, 9, 3, 12])) > 110


def test_one_token_is_computed_with_float_activations(
    program: ExportedProgram, buffer: bytes
) -> None:
    rewritten = rewrite_for_vulkan(program, merge=True, half=False)
    steps = [1] * 6
    assert min(agreement(SimulatedProgram(buffer), WeightOnlyRun(rewritten), steps)) > 110
    assert max(agreement(SimulatedProgram(buffer), EagerRun(rewritten), steps)) < 60


def test_caches_persist_until_reset(buffer: bytes) -> None:
    simulated = SimulatedProgram(buffer)
    first = tokens(4), torch.tensor([0])
    begun = simulated.run(first)[0]
    simulated.run((tokens(3, 1), torch.tensor([4])))
    behind = tokens(3, 2), torch.tensor([4])
    assert torch.equal(simulated.run(first)[0], begun)
    after = simulated.run(behind)[0]
    simulated.reset()
    assert not torch.allclose(simulated.run(behind)[0], after)
    simulated.run(first)
    assert torch.equal(simulated.run(behind)[0], after)


def test_half_precision_stays_near_float(program: ExportedProgram, buffer: bytes) -> None:
    half = SimulatedProgram(lower_vulkan(program, dtype="fp16").buffer)
    found = agreement(half, lambda *x: simulate(buffer, x)[0], [5])
    assert 25 < min(found) < 80


def test_an_mlp_with_bias_agrees() -> None:
    program = export_tokens(Mlp(), 64)
    eager = EagerRun(rewrite_for_vulkan(program, merge=True, half=False))
    simulated = edgepass.SimulatedProgram(lower_vulkan(program).buffer)
    for count in (5, 31, 2):
        x = torch.randn(1, count, 64, generator=torch.Generator().manual_seed(count))
        assert sqnr_db(simulated.run([x])[0], eager(x)) > 120


@pytest.mark.parametrize(
    ("ids", "position", "words"),
    [
        ([[1, 64]], 0, "id=64, accepted are 0 to 63"),
        ([[1, -1]], 0, "id=-1, accepted are 0 to 63"),
        ([[1, 2]], -1, "position=-1 with 2 tokens"),
        ([[1, 2]], 31, "position=31 with 2 tokens"),
    ],
)
def test_what_the_runtime_does_not_check_is_refused(
    buffer: bytes, ids: list[list[int]], position: int, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        simulate(buffer, (torch.tensor(ids), torch.tensor([position])))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((torch.zeros(1, 2, dtype=torch.long),), "got 1, accepted are 2"),
        ((torch.zeros(1, 2), torch.tensor([0])), r"input 0: got dtype=torch\.float32"),
        (
            (torch.zeros(1, 32, dtype=torch.long), torch.tensor([0])),
            r"shape=\[1, 32\], accepted is at most \[1, 31\]",
        ),
        ((torch.zeros(2, dtype=torch.long), torch.tensor([0])), r"input 0: got shape=\[2\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(buffer: bytes, inputs: tuple, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        simulate(buffer, inputs)


def test_an_unknown_method_is_refused_with_those_known(buffer: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="method='decode', accepted are forward"):
        simulate(buffer, (), method="decode")


def test_a_program_without_a_vulkan_delegate_is_refused() -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    from executorch.exir import to_edge

    plain = to_edge(program).to_executorch().buffer
    with pytest.raises(ProgramError, match=r"no Vulkan delegate: .* with delegates=none"):
        simulate(plain, (torch.ones(2),))
