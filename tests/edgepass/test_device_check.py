"""A lowered program run on the host, against what it was made of."""

import pytest
import torch

import edgepass
from edgepass.device_check import decoder_samples, worst_db
from edgepass.lowering.lower import lower
from edgepass.ops.errors import InvalidArgumentError
from tests.lowering.vulkan_programs import Mlp, export_tokens


@pytest.mark.parametrize("backend", ["vulkan", "xnnpack"])
def test_a_program_agrees_with_its_fused_graph(backend: str) -> None:
    report = edgepass.lower(export_tokens(Mlp(), 64), backend=backend, check=True).report
    # XNNPACK rounds the scales to bfloat16.
    assert report["numerics"]["device_sqnr_db"]["forward"] > (40 if backend == "vulkan" else 25)
    assert report["numerics"]["device_sqnr_unquantized_db"] is None


def test_without_check_nothing_is_run() -> None:
    report = edgepass.lower(export_tokens(Mlp(), 64), backend="vulkan").report
    assert set(report["numerics"]) == {"sqnr_db"}


def test_a_wrong_program_is_seen() -> None:
    from edgepass.device_check import add_device_check

    right, wrong = Mlp(), Mlp()
    wrong.second.scales *= 2
    lowered = lower(export_tokens(right, 64), backend="vulkan")
    other = lower(export_tokens(wrong, 64), backend="vulkan")
    mixed = type(lowered)(other.buffer, lowered.report, lowered.fused)
    add_device_check(mixed, [torch.randn(1, 5, 64)])
    assert mixed.report["numerics"]["device_sqnr_db"]["forward"] < 10


def test_samples_must_be_the_programs_inputs() -> None:
    with pytest.raises(InvalidArgumentError, match="got samples=2, accepted are 1 inputs"):
        edgepass.lower(
            export_tokens(Mlp(), 64),
            backend="vulkan",
            check=True,
            sample_inputs=[torch.zeros(1, 2, 64)] * 2,
        )


def test_the_worst_output_counts() -> None:
    one, two = torch.ones(4), torch.full((4,), 1.1)
    assert worst_db([one, one], [one, two]) == pytest.approx(20, abs=0.1)
    assert worst_db([one], [one]) == 999.0
    assert worst_db([one], [torch.ones(3)]) == -999.0


def test_samples_of_a_decoder_fit_its_context() -> None:
    ids, position = decoder_samples(50, 8)
    assert ids.shape == (1, 7)
    assert ids.max() < 50
    assert position.tolist() == [0]
