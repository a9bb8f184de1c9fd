"""The groups of small commands: ``edgepass recipes`` and ``edgepass encodings``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepass import console
from edgepass.cli_options import Json, Layers, Trust

recipes = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")


@recipes.command(name="list")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that have a name, and the backends that hold each."""
    from edgepass import recipe_commands

    rows = recipe_commands.list_recipes()
    console.show(rows, as_json, lambda: console.print_recipes(rows))


@recipes.command(name="show")
def show_recipe(
    recipe: Annotated[str, typer.Argument(help="A name of `recipes list`, or a file.")],
    as_json: Json = False,
) -> None:
    """Print a recipe as the file that would hold it."""
    from edgepass.calibration.recipe_file import find_recipe, format_recipe

    found = find_recipe(recipe)
    console.show(found.asked(), as_json, lambda: print(format_recipe(found), end=""))


@recipes.command(name="check")
def check_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name of `recipes list`.")],
    backend: Annotated[str | None, typer.Option(help="Must it hold the recipe?")] = None,
    model: Annotated[str | None, typer.Option(help="Must the recipe fit this model?")] = None,
    layers: Layers = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check a recipe: its schema, the backends that hold it, the modules that it matches."""
    from edgepass import recipe_commands

    checked = recipe_commands.check_recipe(recipe, backend, model, layers, trust_remote_code)
    console.show(checked, as_json, lambda: console.print_recipe_check(checked))


encodings = typer.Typer(no_args_is_help=True, help="Read files of quantization encodings.")


@encodings.command(name="show")
def show_encodings(
    file: Annotated[Path, typer.Argument(help="An encodings.json.")], as_json: Json = False
) -> None:
    """Print each encoding of a file: bits, granularity, range."""
    from edgepass.qnn_commands import encoding_rows

    rows = encoding_rows(file)
    console.show(rows, as_json, lambda: console.print_pairs(rows))


@encodings.command(name="diff")
def diff_encodings(
    first: Annotated[Path, typer.Argument(help="An encodings.json.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    tolerance: Annotated[float, typer.Option(help="Relative difference of scales.")] = 1e-4,
    as_json: Json = False,
) -> None:
    """Print what differs between two files; exit code 1 if anything does."""
    from edgepass.qnn_commands import difference_rows

    rows = difference_rows(first, second, tolerance)
    console.show(rows, as_json, lambda: console.print_pairs(rows))
    raise typer.Exit(1 if rows else 0)
