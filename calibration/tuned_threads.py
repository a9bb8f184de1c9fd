"""The thread count of a calibration: given, or found by a sweep that costs 2 % of it at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgepass.calibration.cpu_limits import CpuLimits, cpu_limits
from edgepass.calibration.thread_candidates import check_threads, thread_candidates
from edgepass.calibration.thread_probe import ModelShapes, Probe
from edgepass.calibration.thread_sweep import SHARE, ThreadChoice, sweep_threads
from edgepass.ops.threads import torch_threads

# The fewest tokens of a chunk that are timed.
FEWEST_ROWS = 32
# The part of the calibration's operations above which two passes of these are not worth running.
_PILOT_SHARE = SHARE / 4


@contextmanager
def tuned_threads(
    model: nn.Module, tokens: int, override: int | None = None, *, chunk: int = 1024
) -> Iterator[ThreadChoice]:
    """Run what calibrates ``model`` on ``tokens`` tokens with the best thread count for it.

    Enter it before observers are inserted. torch's thread count is as it was afterwards, whatever
    happens. ``override`` is taken without a sweep; ``chunk`` tokens are one forward. Processes of
    one ``torchrun`` keep what they are set to, within their share of the machine.

    Raises InvalidArgumentError for an ``override`` that this process may not use, and for a model
    without linears.
    """
    limits = cpu_limits()
    with torch_threads():
        if override is not None:
            check_threads("calibration_num_threads", override, limits)
            choice = ThreadChoice(override, "given")
        elif limits.processes > 1:
            # Sweeps at the same time would measure each other.
            choice = ThreadChoice(_candidates(limits)[1], f"as set: {limits.why}")
        else:
            choice = choose_calibration_threads(model, tokens, chunk, limits=limits)
        torch.set_num_threads(choice.threads)
        yield choice


def choose_calibration_threads(
    model: nn.Module,
    tokens: int,
    chunk: int,
    budget_s: float | None = None,
    limits: CpuLimits | None = None,
) -> ThreadChoice:
    """The thread count for ``tokens`` tokens in forwards of ``chunk``.

    The budget is 2 % of the time that the linears and the attention of these are estimated to take,
    or ``budget_s``. Restores torch's thread count. Raises InvalidArgumentError for a model without
    linears.
    """
    limits, shapes, chunk = limits or cpu_limits(), ModelShapes(model), min(chunk, tokens)
    candidates, present = _candidates(limits)
    if len(candidates) == 1:
        return _only_one(limits)
    fewest, forwards = min(FEWEST_ROWS, chunk), tokens / chunk

    def measure_rows(rows: int) -> Probe:
        return Probe(shapes, chunk, rows)

    pilot = 2 * measure_rows(fewest).flops
    if budget_s is None and pilot > _PILOT_SHARE * shapes.flops(chunk) * forwards:
        return ThreadChoice(present, f"as set: {tokens} tokens are too few to pay for a sweep")
    rows = range(fewest, chunk + 1)
    with torch_threads():
        return sweep_threads(candidates, present, measure_rows, rows, forwards, budget_s)


def choose_decode_threads(
    model: nn.Module,
    tokens: int,
    past: int,
    budget_s: float | None = None,
    limits: CpuLimits | None = None,
) -> ThreadChoice:
    """The thread count for ``tokens`` steps of one token each behind ``past`` cached ones.

    Budget, state and errors are as for :func:`choose_calibration_threads`.
    """
    limits, shapes = limits or cpu_limits(), ModelShapes(model)
    candidates, present = _candidates(limits)
    if len(candidates) == 1:
        return _only_one(limits)

    def measure_rows(rows: int) -> Probe:
        return Probe(shapes, 1, rows, past)

    with torch_threads():
        return sweep_threads(candidates, present, measure_rows, range(1, 2), tokens, budget_s)


def _candidates(limits: CpuLimits) -> tuple[list[int], int]:
    """The candidates, and torch's present count within what is allowed."""
    return thread_candidates(limits), min(torch.get_num_threads(), limits.threads)


def _only_one(limits: CpuLimits) -> ThreadChoice:
    why = f" ({limits.why})" if limits.why else ""
    return ThreadChoice(1, f"the only thread that this process may use{why}")
