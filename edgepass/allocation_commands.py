"""What ``edgepass allocate`` does, without its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgepass.analysis import allocate_within, choose_backend
from edgepass.analysis_commands import write_file
from edgepass.calibration.allocated_recipe import allocated_recipe
from edgepass.calibration.allocation import Allocation, AllocationProblem, Cost
from edgepass.calibration.analysis import Analysis, read_analysis
from edgepass.calibration.recipe_file import format_recipe
from edgepass.ops.errors import LibraryError

RECIPE, RESULT = "recipe.yaml", "allocation.json"
PAGE, QNN_RECIPE = "allocation.html", "qnn_recipe.py"
_NAMES = {"loss": "loss", "kl": "KL"}


def allocate_command(
    folder: Path,
    backend: str | None,
    target_mb: float | None,
    target_bpw: float | None,
    max_perplexity_increase: float | None,
    same: list[str],
    by: Cost | None,
    html: bool,
) -> dict[str, Any]:
    """Allocate, write what was chosen into ``folder``, and return it as ``allocation.json`` has it.

    Raises what ``edgepass.allocate`` raises, OutputError if nothing can be written there,
    LibraryError for a page without the extra that draws it.
    """
    if html:
        _need_jinja()
    analysis = read_analysis(folder)
    problem = AllocationProblem(analysis, choose_backend(analysis, backend), same, by)
    chosen = allocate_within(
        problem,
        target_mb=target_mb,
        target_bpw=target_bpw,
        max_perplexity_increase=max_perplexity_increase,
    )
    recipe = allocated_recipe(analysis, chosen, f"{analysis.recipe['name']}-{_size(chosen)}")
    result = describe(problem, chosen, analysis)
    files = {RESULT: json.dumps(result, indent=1) + "\n"}
    if chosen.backend == "qnn":
        from edgepass.lowering.qnn_recipe_source import qnn_recipe_source

        files[QNN_RECIPE] = qnn_recipe_source(
            recipe, [s.modules[0] for s in _stored(analysis, chosen)]
        )
    if html:
        from edgepass.allocation_page import render_page

        files[PAGE] = render_page(analysis, result)
    # The recipe goes last: it is there only if all that belongs to it is.
    files[RECIPE] = format_recipe(recipe)
    for name, text in files.items():
        write_file(folder / name, text)
    for name in {PAGE, QNN_RECIPE} - files.keys():
        (folder / name).unlink(missing_ok=True)  # of an earlier allocation
    return result


def describe(problem: AllocationProblem, chosen: Allocation, analysis: Analysis) -> dict[str, Any]:
    """An allocation, the whole front and the uniform recipes as plain values."""
    labels = {c.label: None for site in _stored(analysis, chosen) for c in site.candidates}
    uniform = {label: problem.uniform(label) for label in labels}
    return {
        "model": analysis.model,
        "backend": chosen.backend,
        "by": chosen.cost,
        **_point(chosen),
        "smallest_bytes": problem.smallest,
        "sites": {
            name: {
                "candidate": c.label,
                "bytes": c.bytes[chosen.backend],
                "kl": c.best_kl,
                "loss": None if c.slope is None else c.text_loss,
            }
            for name, c in chosen.choice.items()
        },
        "front": [_point(each) for each in problem.front()],
        "uniform": [
            {"candidate": label, **_point(each)} for label, each in uniform.items() if each
        ],
    }


def _stored(analysis: Analysis, chosen: Allocation) -> list[Any]:
    return [site for site in analysis.sites if site.name in chosen.choice]


def _point(each: Allocation) -> dict[str, Any]:
    return {
        "bytes": each.bytes,
        "bits_per_weight": each.bits_per_weight,
        "kl": each.kl,
        "loss": each.loss,
        "perplexity_increase": each.perplexity_increase,
        "gap": each.gap,
    }


def _size(chosen: Allocation) -> str:
    return f"{chosen.bits_per_weight:.2f}bpw"


def _need_jinja() -> None:
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise LibraryError("no jinja2, which --html needs: install edgepass[report]") from error


def print_allocation(result: dict[str, Any], folder: Path) -> None:
    """Print what was chosen: the counts of each candidate, and the figures."""
    counts: dict[str, list[int]] = {}
    for site in result["sites"].values():
        entry = counts.setdefault(site["candidate"], [0, 0])
        entry[0] += 1
        entry[1] += site["bytes"]
    table = Table("candidate", "sites", "MB")
    for label, (count, size) in sorted(counts.items()):
        table.add_row(label, str(count), f"{size / 1e6:.2f}")
    Console().print(table)
    print(
        f"{result['bytes'] / 1e6:.2f} MB of weights for {result['backend']}, "
        f"{result['bits_per_weight']:.3f} bits a weight, perplexity about "
        f"{result['perplexity_increase']:+.1%}, summed KL {result['kl']:.4g} nats a token, "
        f"within {result['gap']:.2g} of the least {_NAMES[result['by']]}: {folder / RECIPE}"
    )
