"""What ``tune-threads`` does and shows: the sweeps of the calibration and of the decode step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from edgepass.console import TellProgress
from edgepass.ops.errors import InvalidArgumentError

_TITLES = {
    "calibration": "calibration: one forward of {forward_tokens} tokens",
    "decode": "decode: one step behind {context} tokens",
}


def tune_command(
    model: str,
    tokens: int,
    context: int,
    budget_s: float | None,
    layers: int | None,
    trust_remote_code: bool,
    progress: TellProgress,
) -> dict[str, Any]:
    """Sweep the thread counts of ``tokens`` tokens in chunks of ``context``, and of as many steps.

    Raises InvalidArgumentError for numbers that are not positive, and what loading the model
    raises.
    """
    for name, value in {"calibration_tokens": tokens, "context": context}.items():
        if value < 1:
            raise InvalidArgumentError(f"got {name}={value}, accepted are 1 and more")
    if budget_s is not None and not budget_s > 0:
        raise InvalidArgumentError(f"got budget={budget_s}, accepted are seconds above 0")
    progress("load")
    from edgepass.calibration.cpu_limits import cpu_limits
    from edgepass.calibration.thread_candidates import thread_candidates
    from edgepass.calibration.tuned_threads import choose_calibration_threads, choose_decode_threads
    from edgepass.models.load import load_model

    limits = cpu_limits()
    loaded, _ = load_model(model, layers=layers, trust_remote_code=trust_remote_code)
    progress("sweep calibration")
    calibration = choose_calibration_threads(loaded, tokens, context, budget_s, limits)
    progress("sweep decode")
    decode = choose_decode_threads(loaded, tokens, context, budget_s, limits)
    return {
        "model": model,
        "cpus": asdict(limits),
        "candidates": thread_candidates(limits),
        "tokens": tokens,
        "forward_tokens": min(context, tokens),
        "context": context,
        "calibration": calibration.report(),
        "decode": decode.report(),
    }


def print_tuning(tuning: dict[str, Any]) -> None:
    """Print both sweeps as tables with a bar a thread count, as long as its time."""
    console, cpus = Console(), tuning["cpus"]
    why = f" ({cpus['why']})" if cpus["why"] else ""
    console.print(f"{cpus['cores']} cores, {cpus['threads']} threads{why}")
    for kind, title in _TITLES.items():
        choice = tuning[kind]
        console.print(f"\n{title.format_map(tuning)}")
        if choice["sweep"] is not None and choice["sweep"]["trials"]:
            console.print(_picture(choice))
            sweep = choice["sweep"]
            console.print(
                f"sweep: {sweep['cost_s']:.3g} s, {sweep['cost_s'] / choice['work_s']:.2%} of the "
                f"{choice['work_s']:.3g} s that {tuning['tokens']} tokens take"
            )
        console.print(f"threads: {choice['threads']} ({choice['why']})")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _picture(choice: dict[str, Any]) -> Table:
    table = Table("threads", "time", "to the chosen", "rounds", "", box=None)
    trials = choice["sweep"]["trials"]
    longest = max(trial["relative"] for trial in trials)
    for trial in trials:
        chosen = trial["threads"] == choice["threads"]
        table.add_row(
            str(trial["threads"]),
            _time(trial["seconds"]),
            f"{trial['relative']:.3f}",
            str(trial["rounds"]),
            Bar(longest, 0, trial["relative"], width=40, color="green" if chosen else "blue"),
        )
    return table
