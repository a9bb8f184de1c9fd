"""The formats that are written down are those of the installed ExecuTorch."""

import re
from importlib import resources

import pytest

from edgepass.simulator.flatbuffer import Schema
from edgepass.simulator.schemas import PROGRAM, VULKAN

SAME = {"int64": "long", "uint64": "ulong", "uint32": "uint"}


def installed(package: str, name: str) -> str:
    text = (resources.files(package) / name).read_text()
    return re.sub(r"//.*|\(force_align: \d+\)", "", text)


def enums(text: str) -> dict[str, dict[str, int]]:
    found = {}
    for name, body in re.findall(r"enum (\w+) : \w+ \{(.*?)\}", text, re.DOTALL):
        pairs = re.findall(r"(\w+) = (\d+)", body)
        found[name] = {key: int(value) for key, value in pairs}
    return found


def kinds(text: str) -> dict[str, str]:
    """What each enum is stored as."""
    return dict(re.findall(r"enum (\w+) : (\w+)", text))


def tables(text: str) -> dict[str, list[tuple[str, str, int]]]:
    stored, values = kinds(text) | {"ScalarType": "byte"}, enums(text)
    found = {}
    for name, body in re.findall(r"table (\w+) \{(.*?)\}", text, re.DOTALL):
        fields = re.findall(r"(\w+)\s*:\s*(\[?\w+\]?)(?:\s*=\s*(\w+))?", body)
        found[name] = [
            (
                field,
                stored.get(kind, re.sub(r"\w+", lambda m: SAME.get(m[0], m[0]), kind)),
                values.get(kind, {}).get(default, default or 0) if default != "0" else 0,
            )
            for field, kind, default in fields
        ]
    return found


def unions(text: str) -> dict[str, tuple[str, ...]]:
    found = re.findall(r"union (\w+) \{(.*?)\}", text, re.DOTALL)
    return {name: tuple(re.findall(r"\w+", body)) for name, body in found}


@pytest.mark.parametrize(
    ("schema", "package", "name"),
    [
        (PROGRAM, "executorch.schema", "program.fbs"),
        (VULKAN, "executorch.backends.vulkan.serialization", "schema.fbs"),
    ],
)
def test_schemas_are_the_installed_ones(schema: Schema, package: str, name: str) -> None:
    text = installed(package, name)
    assert re.search(r'file_identifier "(\w+)"', text)[1].encode() == schema.identifier
    ours = {
        table: [(field.name, field.type, field.default) for field in fields]
        for table, fields in schema.tables.items()
    }
    assert ours == tables(text)
    assert dict(schema.unions) == unions(text)
