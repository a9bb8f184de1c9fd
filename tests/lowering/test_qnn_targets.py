"""Whole decoders on the real HTP libraries: one delegate a method, and the simulator's numbers.

Minutes each: the default run has one such lowering in `tests/edgepass/test_qnn_commands.py`.
"""

import pytest

from tests.lowering.qnn_programs import needs_libraries, quantized, tokens

pytestmark = [pytest.mark.nightly, needs_libraries]

# Integers of 8 bits flip where HTP rounds inside its norms and softmax: see docs/benchmarks.md.
LEAST_DB = {"16a8w": 40, "16a16w": 40, "16a4w": 40, "16a4w_block": 40, "fp16a8w": 40}


@pytest.mark.parametrize("recipe", LEAST_DB)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_both_methods_in_one_delegate_each_and_right(family, recipe) -> None:
    from edgepass.lowering.qnn_check import device_sqnr_db
    from edgepass.lowering.qnn_lowering import lower_graphs
    from edgepass.lowering.qnn_recipes import find_chip
    from edgepass.lowering.report import delegates, outside_delegates

    found = quantized(family, recipe, layers=2)
    inputs = {name: form.inputs(tokens(form.tokens)) for name, form in found.forms.items()}
    fp16 = recipe == "fp16a8w"
    manager = lower_graphs(found.graphs, inputs, find_chip("SM8650"), fp16=fp16)
    assert delegates(manager) == dict.fromkeys(found.forms, 1)
    assert not any(outside_delegates(manager).values())
    measured = device_sqnr_db(found, bytes(manager.buffer), tokens(seed=1))
    logits = [values[0] for values in measured.values()]
    assert min(logits) >= LEAST_DB[recipe], measured
    # A row of a tiny cache has 64 values of 8 bits, of which one that rounds the other way shows.
    assert min(min(values) for values in measured.values()) >= 38, measured
