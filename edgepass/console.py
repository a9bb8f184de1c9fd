"""What the command line shows: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class TellProgress(Protocol):
    """Called with the present stage and, where its parts are counted, how many are done."""

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None: ...


@contextmanager
def show_progress() -> Iterator[TellProgress]:
    """A bar on a terminal's standard error, else one line a stage; with the time left of parts.

    Of several processes that torchrun started each writes lines.
    """
    console = Console(stderr=True)
    if not console.is_terminal or "TORCHELASTIC_RUN_ID" in os.environ:
        yield _tell_lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=None)

        def tell(stage: str, done: int = 0, total: int | None = None) -> None:
            if progress.tasks[0].description != stage:
                progress.reset(task)  # the speed of one stage says nothing of the next
            progress.update(task, description=stage, completed=done, total=total)

        yield tell


def say(line: str) -> None:
    """Print a line on standard error, with the number of this process if torchrun started it."""
    rank = f"[{os.environ['RANK']}] " if "TORCHELASTIC_RUN_ID" in os.environ else ""
    print(f"edgepass: {rank}{line}", file=sys.stderr, flush=True)


def _tell_lines() -> TellProgress:
    first: dict[str, tuple[int, float]] = {}

    def tell(stage: str, done: int = 0, total: int | None = None) -> None:
        counted = ""
        if total is not None:
            begun, at = first.setdefault(stage, (done, time.monotonic()))
            counted = f" {done} of {total}"
            if begun < done < total:
                left = (time.monotonic() - at) / (done - begun) * (total - done)
                counted += f", {left:.0f} s left"
        say(f"{stage}{counted}")

    return tell


def show(result: Any, as_json: bool, pretty: Callable[[], None]) -> None:
    """Print ``result`` as one JSON object, or as ``pretty`` does."""
    if as_json:
        print(json.dumps(result))
    else:
        pretty()


def print_report(report: dict[str, Any], out: Path) -> None:
    """Print what `lower` wrote, as a table."""
    linears, sqnr = report["linears"], report["numerics"]["sqnr_db"]
    table = Table(title=f"{report['model']} for {report['backend']}", show_header=False)
    table.add_row("file", f"{out / 'model.pte'}, {report['pte_bytes'] / 1e6:.1f} MB")
    table.add_row("linears fused", f"{linears['fused']} of {linears['total']}")
    table.add_row("delegates", ", ".join(f"{k}: {v}" for k, v in report["delegates"].items()))
    table.add_row("fused against unfused", "not compared" if sqnr is None else f"{sqnr} dB")
    for name, kind in (("fused", "device_sqnr_db"), ("unquantized", "device_sqnr_unquantized_db")):
        for method, decibels in (report["numerics"].get(kind) or {}).items():
            table.add_row(f"{method} on the host against {name}", f"{decibels} dB")
    table.add_row("seconds", f"{sum(stage['seconds'] for stage in report['stages']):.1f}")
    for row in linears["unfused"]:
        table.add_row("not fused", f"{row['name']}: {row['reason']}")
    Console().print(table)


def print_qnn_report(report: dict[str, Any], out: Path) -> None:
    """Print what `lower --backend qnn` wrote, as a table."""
    table = Table(title=f"{report['model']} for {report['soc']}", show_header=False)
    table.add_row("file", f"{out / 'model.pte'}, {report['pte_bytes'] / 1e6:.1f} MB")
    table.add_row("recipe", f"{report['recipe']}, {report['kv_bits']}-bit KV cache")
    table.add_row("encodings", f"{report['encodings']} in {out / 'encodings.json'}")
    table.add_row("delegates", ", ".join(f"{k}: {v}" for k, v in report["delegates"].items()))
    for name, values in (report["numerics"]["device_sqnr_db"] or {}).items():
        table.add_row(f"{name}, simulator", f"logits {values[0]} dB, least {min(values)} dB")
    table.add_row("seconds", f"{sum(stage['seconds'] for stage in report['stages']):.1f}")
    Console().print(table)


def print_pairs(rows: dict[str, str]) -> None:
    """Print each name with what is said of it."""
    for name, text in rows.items():
        print(f"{name}: {text}")


class Typewriter:
    """Prints text as it comes, after the prompt that it continues."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def __call__(self, text: str) -> None:
        print(self.prompt + text, end="", flush=True)
        self.prompt = ""


def print_speed(result: dict[str, Any]) -> None:
    """Print the rates of a generation, below the text that is there already."""
    print()
    for phase in ("prefill", "decode"):
        print(f"{phase}: {result[f'{phase}_tokens_per_second']:.1f} tokens per second")


def tell_simulated(simulated: bool) -> None:
    """Say on standard error that the device's runtime is simulated, if it is."""
    if simulated:
        print("edgepass: simulated on the CPU", file=sys.stderr, flush=True)


def print_inventory(listed: dict[str, Any]) -> None:
    """Print what a Vulkan program holds, as tables."""
    console = Console()
    for side in ("inputs", "outputs"):
        for place, value in enumerate(listed[side]):
            console.print(f"{side[:-1]} {place}: {value['dtype']} {_sizes(value)}")
    largest_first = sorted(listed["memory"].items(), key=lambda each: -each[1])
    console.print(_counts("memory", "bytes", dict(largest_first)))
    for number, delegate in enumerate(listed["delegates"]):
        title = f"delegate {number}"
        console.print(_counts(f"{title}: operators", "calls", delegate["operators"]))
        console.print(_constants(f"{title}: constants", delegate["constants"]))
        for place, name in enumerate(delegate.get("calls", ())):
            console.print(f"{place}: {name}")
    if listed["outside"]:
        console.print(_counts("outside the delegates", "calls", listed["outside"]))
    for place, value in enumerate(listed.get("results", ())):
        console.print(f"result {place}: {value['dtype']} {value['shape']} {value['values']}")


def _sizes(value: dict[str, Any]) -> str:
    return f"{'at most ' if value['dynamic'] else ''}{value['shape']}"


def _counts(title: str, unit: str, counts: dict[str, int]) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column(unit, justify="right")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    return table


def _constants(title: str, entries: list[dict[str, Any]]) -> Table:
    table = Table("role", "dtype", "shape", "constants", "bytes", "uses", title=title)
    for entry in group_constants(entries):
        numbers = (f"{entry[key]:,}" for key in ("count", "nbytes", "uses"))
        table.add_row(entry["role"], entry["dtype"], str(entry["shape"]), *numbers)
    return table


def group_constants(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join constants of one role, dtype and shape: their ``count`` and sums, most bytes first."""
    groups: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        key = entry["role"], entry["dtype"], tuple(entry["shape"])
        group = groups.setdefault(key, {**entry, "count": 0, "nbytes": 0, "uses": 0})
        group["count"] += 1
        group["nbytes"] += entry["nbytes"]
        group["uses"] += entry["uses"]
    return sorted(groups.values(), key=lambda group: -group["nbytes"])


def print_linears(rows: list[dict[str, Any]]) -> None:
    """Print each linear with its fate, and the count."""
    for row in rows:
        why_not = f"not fused: {row['reason']} (at {row['node']})"
        print(f"{row['name']}: {row['how'] if row['fused'] else why_not}")
    print(f"{sum(row['fused'] for row in rows)} of {len(rows)} linears fused")


def print_recipes(rows: list[dict[str, Any]]) -> None:
    """Print the recipes as a table."""
    table = Table()
    table.add_column("recipe", no_wrap=True)
    for title in ("weights", "activations", "KV cache", "backends"):
        table.add_column(title)
    for row in rows:
        backends = ", ".join(row["backends"]) or "none"
        table.add_row(row["name"], row["weights"], row["activations"], row["kv_cache"], backends)
    Console().print(table)


def print_recipe_check(checked: dict[str, Any]) -> None:
    """Print what was found of a recipe."""
    for form, count in checked.get("modules", {}).items():
        print(f"{count} modules: {form}")
    for backend, verdict in checked["backends"].items():
        if isinstance(verdict, str):
            print(f"{backend}: no, {verdict}")
        else:
            print(f"{backend}: yes{''.join(f', {part}' for part in verdict)}")
