"""One value of a recipe that a backend does not hold as it is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """The value of a ``key``, and the ``nearest`` that the backend holds.

    ``place`` is the section or the module, with a dot behind it. ``as_float``: the backend
    computes it right, but in float, so that nothing is gained.
    """

    key: str
    value: object
    nearest: object
    as_float: bool = False
    place: str = ""

    def __str__(self) -> str:
        how = "computed in float, nearest" if self.as_float else "nearest"
        return f"{self.place}{self.key}={self.value} ({how}: {self.nearest})"
