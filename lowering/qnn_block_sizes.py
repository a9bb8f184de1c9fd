"""Which block of input features each LPBQ weight has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from edgepass.lowering.qnn_recipes import QnnRecipe
from edgepass.ops.errors import InvalidArgumentError


@dataclass(frozen=True)
class BlockSizes:
    """``size`` for every projection but those that a key of ``others`` names.

    A key is the end of a module's path (``down_proj``, ``layers.0.mlp.down_proj``) in which ``*``
    stands for anything (``layers.0.*``); of several that name one module the last counts.
    """

    size: int
    others: Mapping[str, int]

    def of(self, path: str, width: int) -> int:
        """The block of the module at ``path``, whose weights have ``width`` input features.

        Raises InvalidArgumentError if it does not divide the width, or HTP computes it wrong.
        """
        own = [size for key, size in self.others.items() if _names(key, path)]
        size = own[-1] if own else self.size
        if size < 1 or width % size:
            problem = f"does not divide the {width} input features of {path}"
        elif not is_computed(width, size):
            problem = f"HTP computes wrong for the {width} input features of {path}"
        else:
            return size
        sizes = [each for each in range(1, width + 1) if is_computed(width, each)]
        raise InvalidArgumentError(
            f"got block_size={size}, which {problem}; accepted are {', '.join(map(str, sizes))}"
        )

    def check_used(self, paths: Iterable[str]) -> None:
        """Raise InvalidArgumentError for a key that names none of the modules ``paths``."""
        paths = list(paths)
        for key in self.others:
            if not any(_names(key, path) for path in paths):
                ends = sorted({path.rpartition(".")[2] for path in paths})
                raise InvalidArgumentError(
                    f"no such module: got block_size={self.others[key]} for {key}, accepted are "
                    f"ends of paths such as {', '.join(ends)}, with * for anything"
                )


def is_computed(width: int, size: int) -> bool:
    """Whether HTP computes blocks of ``size`` in rows of ``width`` features as the encoding says.

    Found in the simulator of QNN 2.49: with blocks that fill no whole vectors of 32 its results
    are noise, 16 aside, and on 7 to 9 blocks a row, of other sizes than 16 and 32, it crashes.
    """
    if width % size:
        return False
    small = size in (16, 32) and width % 32 == 0
    return size == width or small or (size % 32 == 0 and width // size not in (7, 8, 9))


def check_blocks(recipe: QnnRecipe, size: int | None, others: Mapping[str, int]) -> None:
    """Raise InvalidArgumentError for block sizes with a recipe that has no blocks."""
    if not recipe.blocks and (others or size is not None):
        given = next(iter(others.values()), size)
        raise InvalidArgumentError(
            f"got block_size={given} for recipe={recipe.name}, which has no blocks; accepted is "
            "recipe=16a4w_block"
        )


def read_block_sizes(given: Iterable[str]) -> dict[str, int]:
    """``NAME=SIZE`` of a command line by name. Raises InvalidArgumentError for another form."""
    found: dict[str, int] = {}
    for each in given:
        name, _, size = each.rpartition("=")
        if not name or not size.isdecimal():
            raise InvalidArgumentError(
                f"unknown block size: got block_size_for={each}, accepted are NAME=SIZE such as "
                "down_proj=64 or layers.0.*=64"
            )
        # The last of the same name counts, as of different ones.
        found.pop(name, None)
        found[name] = int(size)
    return found


def _names(key: str, path: str) -> bool:
    return fnmatchcase(path, key) or fnmatchcase(path, f"*.{key}")
