"""What all parts of a recipe have in common: strict, immutable, and without unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a recipe: immutable, without conversions between types, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, given: Any) -> Any:
        """Refuse a key that is none of the section's, naming the one that was probably meant."""
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}{suggest(key, cls.model_fields)}")
        return given

    def changed(self, **fields: Any) -> Self:
        """A copy with other ``fields``, checked as a new one is."""
        return type(self)(
            **{**{key: getattr(self, key) for key in self.model_fields_set}, **fields}
        )


def suggest(given: object, known: Iterable[str]) -> str:
    """What follows the report of an unknown name: the nearest known one, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ","
    return f"{hint} accepted are {', '.join(names)}"
