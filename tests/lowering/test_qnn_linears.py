"""Single linears in HTP's simulator against the fake-quantized graph."""

import pytest
import torch
from torch import nn

from tests.lowering.qnn_programs import needs_libraries, quantization
from tests.passes.programs import sqnr_db

pytestmark = needs_libraries


def simulated_sqnr_db(recipe: str, width: int, folder, **options) -> float:
    """SQNR in dB of the simulator's outputs for eight rows of ``width`` random features."""
    from edgepass.lowering.qnn_io import dequantize_tensor, io_encodings, quantize_tensor
    from edgepass.lowering.qnn_lowering import lower_graphs
    from edgepass.lowering.qnn_simulator import SimulatedProgram

    torch.manual_seed(0)
    module, x = nn.Linear(width, 48), torch.randn(1, 8, width)
    how = quantization(recipe, **options)
    with torch.no_grad():
        prepared = how.prepare(torch.export.export(module, (x,)))
        prepared(x)
        graph = how.convert(prepared)
        path = folder / "model.pte"
        path.write_bytes(lower_graphs({"forward": graph}, {"forward": (x,)}, how.soc).buffer)
        (entering,), (leaving,) = io_encodings(graph)
        (found,) = SimulatedProgram(path).run("forward", [quantize_tensor(x, entering)])
        return sqnr_db(graph(x)[0], dequantize_tensor(found, leaving)[0])


@pytest.mark.parametrize(
    ("recipe", "width", "options"),
    [
        ("16a4w", 64, {}),
        ("16a4w", 100, {}),
        ("16a4w", 576, {}),
        ("16a8w", 64, {}),
        ("16a16w", 64, {}),
        ("16a4w_block", 128, {"block_size": 16}),
        ("16a4w_block", 288, {"block_size": 96}),
    ],
)
def test_a_16_bit_linear_is_the_fake_quantized_one_to_two_steps(
    recipe, width, options, tmp_path
) -> None:
    assert simulated_sqnr_db(recipe, width, tmp_path, **options) > 80
