"""The house rules: where imports may go, how long files are, and pages that hold true."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgepass.ops import errors

ROOT = Path(__file__).resolve().parent.parent

# Which rooms each room may import, itself aside (docs/architecture.md).
BELOW = {
    "ops": set(),
    "models": {"ops"},
    "passes": {"ops"},
    "calibration": {"ops", "passes"},
    "lowering": {"ops", "models", "passes", "calibration"},
    "simulator": {"ops", "models", "passes", "calibration"},
    "edgepass": {"ops", "models", "passes", "calibration", "lowering", "simulator"},
}
BACKENDS = {"vulkan": "vulkan", "xnnpack": "xnnpack", "qnn": "qualcomm"}
MAX_LINES = 450


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def package_of(path: Path) -> list[str]:
    """The dotted package that holds the file, as its parts: ``ops/int4.py`` is in edgepass.ops."""
    parts = list(path.relative_to(ROOT).parent.parts)
    return parts if parts[0] == "edgepass" else ["edgepass", *parts]


def imports(path: Path) -> set[str]:
    """Every module the file imports, at whatever depth, with relative names made absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    own = [name.split(".") for name in imports(path) if name.split(".")[0] == "edgepass"]
    return {parts[1] for parts in own if len(parts) > 1 and parts[1] in BELOW}


@pytest.mark.parametrize("room", BELOW)
def test_imports_only_go_down(room: str) -> None:
    upward = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in sources(room)
        for other in rooms_imported(path) - BELOW[room] - {room}
    }
    assert not upward


def test_ops_imports_torch_and_numpy_only() -> None:
    accepted = set(sys.stdlib_module_names) | {"torch", "numpy", "edgepass"}
    foreign = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("ops")
        for name in imports(path)
        if name.split(".")[0] not in accepted
    }
    assert not foreign


def test_passes_know_no_backend() -> None:
    known = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("passes")
        for name in imports(path)
        if name.startswith("executorch.backends")
    }
    assert not known


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_knows_no_other_backend(backend: str) -> None:
    others = {
        prefix
        for name, folder in BACKENDS.items()
        if name != backend
        for prefix in (f"executorch.backends.{folder}", f"edgepass.lowering.{name}")
    }
    known = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("lowering")
        if path.relative_to(ROOT).parts[1].startswith(backend)
        for name in imports(path)
        if any(name.startswith(other) for other in others)
    }
    assert not known


@pytest.mark.parametrize("room", [*BELOW, "benchmarks", "tests"])
def test_no_file_is_too_long(room: str) -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in sources(room)}
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_each_error_code_has_its_section() -> None:
    codes = sorted(
        error.code
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.EdgepassError)
    )
    page = (ROOT / "docs" / "errors.md").read_text()
    assert sorted(re.findall(r"^## (\S+)$", page, re.MULTILINE)) == codes


COMMAND = r"\s*(?:\$ )?edgepass ((?:recipes |encodings )?[\w-]+)(.*)"


def documented_commands() -> dict[str, set[str]]:
    """Each command in a shell block of the pages, with the options it is shown with.

    Of a group (``recipes check``) both words are the command.
    """
    commands: dict[str, set[str]] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(COMMAND, line):
                    options = re.findall(r"(?<!\S)--[a-z-]+", match[2])
                    commands.setdefault(match[1], set()).update(options)
    return commands


@pytest.mark.parametrize("command", sorted(documented_commands()))
def test_documented_commands_exist(command: str) -> None:
    script = "import sys; from edgepass.cli import main; sys.exit(main())"
    shown = subprocess.run(
        [sys.executable, "-c", script, *command.split(), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert shown.returncode == 0, shown.stderr
    missing = documented_commands()[command] - set(re.findall(r"--[a-z-]+", shown.stdout))
    assert not missing


def test_the_makefile_has_the_documented_targets() -> None:
    text = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", text, re.MULTILINE)) <= targets
