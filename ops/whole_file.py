"""Writing a file that appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from edgepass.ops.errors import OutputError


def write_whole(path: str | os.PathLike[str], text: str, what: str = "out") -> Path:
    """Write ``text`` as UTF-8 and return the path; a killed process leaves the old file.

    ``what`` is what errors call it. Raises OutputError if it cannot be written.
    """
    target = Path(path)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, target)
    except OSError as error:
        if staged.parent.is_dir():
            staged.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {what}={target}: {error.strerror or error}; give a folder that can be "
            "written"
        ) from error
    return target
