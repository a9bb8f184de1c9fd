"""Qualcomm's compiler and simulator: found, laid out as the stock backend wants them, and loaded.

The stock QNN backend reads ``$QNN_SDK_ROOT/lib/x86_64-linux-clang`` and opens its libraries by
name, which asks the user for ``LD_LIBRARY_PATH`` before the process starts. The wheel
``onnxruntime-qnn`` carries the same libraries in another layout. This module links them into a
cache folder in the layout of the SDK and opens them by path first: the loader then finds them by
name, and no environment variable is asked of the user.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgepass.ops.errors import InvalidArgumentError, LibraryError
from edgepass.ops.native_output import native_output_captured

WHEEL = "onnxruntime-qnn"
HOST_FOLDER = Path("lib", "x86_64-linux-clang")
# Their order is that of their dependencies.
OPENED = ("libQnnSystem.so", "libQnnHtp.so")
_INSTALL = "accepted is `pip install edgepass[qnn]`, or QNN_SDK_ROOT naming an installed SDK"


def prepare_libraries() -> Path:
    """Make the QNN libraries usable in this process and return the SDK's root folder.

    ``QNN_SDK_ROOT``, when set, wins; otherwise the extra ``qnn`` is laid out in the cache folder
    (``$XDG_CACHE_HOME/edgepass/qnn``) and ``QNN_SDK_ROOT`` is set in this process. A second call
    does nothing.

    Raises LibraryError if there are no libraries or the loader refuses them, and
    InvalidArgumentError for a ``QNN_SDK_ROOT`` that holds none.
    """
    asked = os.environ.get("QNN_SDK_ROOT")
    root = _checked_sdk(Path(asked)) if asked else _lay_out_wheel()
    _open(root)
    # Set even before the stock quantizer is built: without it, it downloads an SDK.
    os.environ["QNN_SDK_ROOT"] = str(root)
    return root


def missing_libraries() -> str | None:
    """Say why :func:`prepare_libraries` cannot succeed, or None if the libraries are there."""
    try:
        prepare_libraries()
    except (LibraryError, InvalidArgumentError) as error:
        return str(error)
    return None


def _checked_sdk(root: Path) -> Path:
    missing = [name for name in OPENED if not (root / HOST_FOLDER / name).is_file()]
    if missing:
        raise InvalidArgumentError(
            f"no QNN SDK: got QNN_SDK_ROOT={root} without {HOST_FOLDER / missing[0]}, accepted is "
            "the folder of an SDK for x86-64 Linux, or none to use the installed extra"
        )
    return root


def _lay_out_wheel() -> Path:
    """Link the wheel's libraries into the cache folder, whole or not at all."""
    libraries = _wheel_libraries()
    # The folder is named by what it links to: two environments never share one.
    key = hashlib.sha256("\n".join(map(str, libraries)).encode()).hexdigest()[:12]
    root = _cache_folder() / f"{_wheel_version()}-{key}"
    folder = root / HOST_FOLDER
    if folder.is_dir() and all((folder / path.name).is_file() for path in libraries):
        return root
    try:
        _link(libraries, folder)
    except OSError as error:
        raise LibraryError(
            f"cannot lay out the QNN libraries: got {root} ({error.strerror or error}), accepted "
            "is an XDG_CACHE_HOME that can be written"
        ) from error
    return root


def _link(libraries: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in libraries:
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            link = Path(staging) / path.name
            link.symlink_to(path)
            os.replace(link, folder / path.name)


def _wheel_libraries() -> list[Path]:
    # Found without importing it, which would load the runtime of another project.
    spec = importlib.util.find_spec("onnxruntime_qnn")
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        raise LibraryError(f"no QNN libraries for this host: got {machine}, {_INSTALL}")
    if spec is None or not spec.submodule_search_locations:
        raise LibraryError(f"no QNN libraries: got no package {WHEEL}, {_INSTALL}")
    package = Path(next(iter(spec.submodule_search_locations)))
    found = [*package.glob("libQnn*.so"), *package.with_name(f"{package.name}.libs").glob("*.so*")]
    absent = set(OPENED) - {path.name for path in found}
    if absent:
        raise LibraryError(
            f"incomplete QNN libraries: got {package} without {min(absent)}, {_INSTALL}"
        )
    return sorted(found)


def _wheel_version() -> str:
    try:
        return version(WHEEL)
    except PackageNotFoundError:
        return "unknown"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgepass" / "qnn"


@cache
def _open(root: Path) -> None:
    """Open the libraries by path, so that a later ``dlopen`` by name finds them."""
    for name in OPENED:
        path = (root / HOST_FOLDER / name).resolve()
        try:
            with native_output_captured():
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise LibraryError(f"unusable QNN library: got {path} ({error}), {_INSTALL}") from error
