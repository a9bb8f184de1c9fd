"""Recipes as YAML and JSON files; whatever is wrong in one is told in a line with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from reprlib import repr as short
from typing import Any

import yaml
from pydantic import ValidationError

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_presets import find_preset
from edgepass.ops.errors import InvalidArgumentError
from edgepass.ops.whole_file import write_whole

AnyRecipe = str | os.PathLike[str] | Recipe
SUFFIXES = (".yaml", ".yml", ".json")


def find_recipe(recipe: AnyRecipe) -> Recipe:
    """The recipe itself, the preset or alias of that name, or what the file of that path holds.

    A name with a path separator or one of ``SUFFIXES`` is a file. Raises InvalidArgumentError.
    """
    if isinstance(recipe, Recipe):
        return recipe
    text = os.fspath(recipe)
    if not isinstance(recipe, str) or os.sep in text or text.endswith(SUFFIXES):
        return read_recipe(text)
    return find_preset(text)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe that a YAML (or, by its suffix, JSON) file holds.

    Raises InvalidArgumentError for a file that cannot be read, is not UTF-8, is not of its format,
    names a key twice, or does not keep to the schema.
    """
    place = f"recipe={os.fspath(path)}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot read {place}: {error.strerror}; accepted are recipe files that exist"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{place}: got byte {error.object[error.start]:#04x} at {error.start}, accepted is "
            "UTF-8"
        ) from error
    return parse_recipe(text, place, is_json=os.fspath(path).endswith(".json"))


def parse_recipe(text: str, place: str = "recipe", *, is_json: bool = False) -> Recipe:
    """The recipe that ``text`` holds; ``place`` is what errors call it.

    Raises InvalidArgumentError.
    """
    try:
        if is_json:
            found = json.loads(text, object_pairs_hook=_unique)
        else:
            found = yaml.load(text, _StrictLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        what = " ".join(str(error).split())
        if isinstance(error, RecursionError):
            what = "nested too deeply"
        kind = "JSON" if is_json else "YAML"
        raise InvalidArgumentError(f"{place}: {what}; accepted is {kind}") from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(
            f"{place}: got {short(found)}, accepted is a mapping with a name and weights"
        )
    try:
        return Recipe.model_validate(found)
    except ValidationError as error:
        raise InvalidArgumentError(f"{place}: {_first(error)}") from error


def format_recipe(recipe: Recipe, *, as_json: bool = False) -> str:
    """The text of a file that holds ``recipe``: what it asks for, no defaults."""
    if as_json:
        return json.dumps(recipe.asked(), indent=2) + "\n"
    asked = recipe.asked()
    # YAML takes separators such as U+0085 for line ends: what is not printable is escaped.
    printable = json.dumps(asked, ensure_ascii=False).isprintable()
    return yaml.safe_dump(asked, sort_keys=False, allow_unicode=printable)


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Write ``recipe`` as YAML or, by the suffix, JSON; the file appears whole or not at all.

    Raises OutputError.
    """
    return write_whole(path, format_recipe(recipe, as_json=Path(path).suffix == ".json"), "recipe")


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, by the path of its key, what was given, what is accepted."""
    found = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in found["loc"])
    given, said, context = found["input"], found["msg"], found.get("ctx", {})
    if found["type"] == "value_error":
        said = str(context["error"])
        # A value's own check says what is accepted; a section's says what is wrong, and where.
        if said.startswith("accepted"):
            return f"got {path}={short(given)}, {said}"
        return f"{path}: {said}" if path else said
    if found["type"] == "missing":
        return f"no {path}, which a recipe needs"
    expected = context.get("expected") or context.get("expected_tags")
    accepted = said.replace("Input should be", "accepted is")
    if expected:
        accepted = f"accepted are {expected}"
    elif found["type"] == "union_tag_not_found":
        accepted = "accepted is a mapping with a kind"
    return f"got {path}={short(given)}, {accepted}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, and no key twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key, _), value in zip(node.value, keys, strict=True):
            if keys.count(value) > 1 and value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {value!r} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)
