"""What ``edgepass analyze`` does, without its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from edgepass import console
from edgepass.calibration.analysis import ANALYSIS, Analysis, Site, format_analysis
from edgepass.calibration.recipe_file import find_recipe
from edgepass.ops.errors import OutputError
from edgepass.ops.whole_file import write_whole

_SHOWN = 20
_WIDTH = 110  # what a site's path needs beside its figures


def analyze_command(
    model: str,
    recipe: str,
    calibration: Path,
    tokens: int,
    chunk_tokens: int,
    out: Path,
    exact: int,
    seed: int,
    sites: list[str],
    layers: int | None,
    trust_remote_code: bool,
) -> Analysis | None:
    """Load, analyse and write ``out/analysis.json``; return it, None in all but the first process.

    The state is kept beside ``out`` until it is written, so that the same command goes on where it
    was killed. Raises what ``edgepass.analyze`` raises, OutputError for a folder that cannot be
    written.
    """
    with console.show_progress() as progress:
        progress("load")
        from edgepass.analysis import analyze, backends_of
        from edgepass.calibration.checkpoint import discard_states
        from edgepass.calibration.chunks import chunks_of, read_chunks
        from edgepass.calibration.workers import Workers
        from edgepass.models.load import load_model

        chosen = find_recipe(recipe)
        backends_of(chosen)
        loaded, tokenizer = load_model(model, layers=layers, trust_remote_code=trust_remote_code)
        chunks = read_chunks(tokenizer, calibration, *chunks_of(tokens, chunk_tokens))
        state = out.absolute().parent / f".{out.name}.analysis"
        found = analyze(
            loaded,
            chosen,
            chunks,
            exact=exact,
            seed=seed,
            sites=sites,
            name=model,
            layers=layers,
            checkpoint=state,
            progress=progress,
            log=console.say,
        )
        if Workers.here().rank:
            return None
        progress("write")
        write_file(out / ANALYSIS, format_analysis(found))
        discard_states(state)
    return found


def write_file(path: Path, text: str) -> None:
    """Write a file whole, and its folder if there is none. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write out={path.parent}: {error.strerror}; give a folder that can be made"
        ) from error
    write_whole(path, text)


def print_analysis(analysis: Analysis, out: Path) -> None:
    """Print the sites whose coarsest candidate hurts most, and where the whole table is."""
    table = Table("candidate", "KL, nats a token", "exact", "loss", "SQNR dB")
    table.columns.insert(0, Column("site", no_wrap=True, overflow="fold"))
    rows = sorted(analysis.sites, key=lambda site: -_candidate(site).kl)
    for site in rows[:_SHOWN]:
        worst = _candidate(site)
        interval = worst.kl_interval
        spread = "" if interval is None else f" ({interval[0]:.2g} to {interval[1]:.2g})"
        table.add_row(
            site.name,
            worst.label,
            f"{worst.kl:.2g}{spread}",
            "" if worst.exact_kl is None else f"{worst.exact_kl:.2g}",
            f"{worst.text_loss:+.2g}",
            f"{worst.sqnr_db:.1f}",
        )
    Console(width=max(Console().width, _WIDTH)).print(table)
    print(f"{len(analysis.sites)} sites, {_count(analysis)} candidates: {out / ANALYSIS}")


def _candidate(site: Site) -> Any:
    """The candidate that a table shows of a site: 4 bits by groups of 32, or the first."""
    shown = [c for c in site.candidates if c.label in ("int4-g32", "int4-b32")]
    return (shown or list(site.candidates))[0]


def _count(analysis: Analysis) -> int:
    return sum(len(site.candidates) for site in analysis.sites)
