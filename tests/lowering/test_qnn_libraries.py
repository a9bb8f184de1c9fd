"""The QNN libraries are found, laid out in a cache folder, and loaded without a variable set."""

import subprocess
import sys

import pytest

from edgepass.lowering import qnn_libraries
from edgepass.lowering.qnn_libraries import HOST_FOLDER, missing_libraries, prepare_libraries
from edgepass.ops.errors import InvalidArgumentError, LibraryError

MISSING = missing_libraries()
needs_libraries = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def without_sdk_root(monkeypatch) -> None:
    # Set first, so that the value that the code under test sets is taken back as well.
    monkeypatch.setenv("QNN_SDK_ROOT", "")
    monkeypatch.delenv("QNN_SDK_ROOT")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    without_sdk_root(monkeypatch)
    return tmp_path


@needs_libraries
def test_the_wheel_is_laid_out_as_an_sdk(own_cache) -> None:
    root = prepare_libraries()
    assert root.is_relative_to(own_cache / "edgepass" / "qnn")
    assert (root / HOST_FOLDER / "libQnnHtp.so").resolve().is_file()
    assert prepare_libraries() == root


@needs_libraries
def test_a_damaged_layout_is_repaired(own_cache) -> None:
    link = qnn_libraries._lay_out_wheel() / HOST_FOLDER / "libQnnHtp.so"
    link.unlink()
    qnn_libraries._lay_out_wheel()
    assert link.is_file()


@needs_libraries
def test_the_stock_backend_finds_them_without_a_loader_path(own_cache) -> None:
    script = (
        "from edgepass.lowering.qnn_libraries import prepare_libraries; import ctypes;"
        "prepare_libraries(); ctypes.CDLL('libQnnHtp.so'); ctypes.CDLL('libQnnSystem.so')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_sdk_without_libraries_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    with pytest.raises(InvalidArgumentError, match=f"got QNN_SDK_ROOT={tmp_path} without lib/"):
        prepare_libraries()


def test_without_the_extra_the_message_names_it(own_cache, monkeypatch) -> None:
    monkeypatch.setattr(qnn_libraries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LibraryError, match=r"pip install edgepass\[qnn\]"):
        prepare_libraries()
    assert "edgepass[qnn]" in str(missing_libraries())
    assert list(own_cache.iterdir()) == []


def test_another_host_is_named(own_cache, monkeypatch) -> None:
    monkeypatch.setattr(qnn_libraries.platform, "machine", lambda: "riscv64")
    with pytest.raises(LibraryError, match="got Linux riscv64"):
        prepare_libraries()


@needs_libraries
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    without_sdk_root(monkeypatch)
    with pytest.raises(LibraryError, match="cannot lay out the QNN libraries"):
        prepare_libraries()
