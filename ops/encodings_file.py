"""Encodings as JSON in AIMET's format, version 1.0.0, which Qualcomm's other tools read.

Source: AIMET, "Encoding format specification" 1.0.0. There ``real = scale * (q + offset)`` with
``q`` counted from 0, so a signed grid has an offset of ``-2**(bw - 1)`` at a zero point of 0.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepass.ops.encodings import Encoding, EncodingTable
from edgepass.ops.errors import EncodingError
from edgepass.ops.whole_file import write_whole

VERSION = "1.0.0"
# HTP stores the scale of a block as 4 bits times a float scale of its channel.
BLOCK_SCALE_STEPS = 16
_SECTIONS = ("activation_encodings", "param_encodings")
_COMMON = {"name", "enc_type", "dtype", "bw", "is_sym", "scale", "offset"}
_EXTRA: dict[str, set[str]] = {
    "PER_TENSOR": set(),
    "PER_CHANNEL": set(),
    "LPBQ": {"block_size", "compressed_bw", "per_block_int_scale"},
}


def write_encodings_file(path: str | os.PathLike[str], table: EncodingTable) -> None:
    """Write ``table`` as JSON. The file appears whole or not at all.

    Raises EncodingError if the format cannot say what an encoding is (a channel axis other than 0,
    block scales that are not snapped, a range that is neither full nor, for a parameter,
    symmetric), and OutputError if it cannot be written.
    """
    text = json.dumps(to_document(table), indent=1) + "\n"
    write_whole(path, text, "encodings")


def read_encodings_file(path: str | os.PathLike[str]) -> EncodingTable:
    """Read a file of AIMET's format, strictly.

    Raises EncodingError, with the name of the key, for a file that cannot be read, another version,
    an unknown or missing key, a wrong length, or a scale that is not finite and positive.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncodingError(
            f"unreadable encodings: got {path}, accepted is AIMET's JSON, version {VERSION}"
        ) from error
    try:
        return from_document(document)
    except EncodingError as error:
        raise EncodingError(f"{path}: {error}") from error


def to_document(table: EncodingTable) -> dict[str, Any]:
    """The JSON object of ``table``."""
    return {
        "version": VERSION,
        _SECTIONS[0]: [_entry(name, e, False) for name, e in table.activations.items()],
        _SECTIONS[1]: [_entry(name, e, True) for name, e in table.parameters.items()],
    }


def from_document(document: Any) -> EncodingTable:
    """The encodings of a JSON object; see :func:`read_encodings_file`."""
    if not isinstance(document, dict) or document.get("version") != VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise EncodingError(f"unknown format: got version={version!r}, accepted is {VERSION!r}")
    # AIMET writes what its quantizers were asked for beside the encodings; nothing depends on it.
    _check_keys("the file", document, {"version", *_SECTIONS}, {"quantizer_args"})
    read = []
    for section in _SECTIONS:
        entries: dict[str, Encoding] = {}
        if not isinstance(document[section], list):
            raise EncodingError(f"malformed {section}: got no list, accepted is a list of objects")
        for entry in document[section]:
            name, encoding = _parse(entry, section == _SECTIONS[1])
            if name in entries:
                raise EncodingError(f"got {name} twice in {section}, accepted is each name once")
            entries[name] = encoding
        read.append(entries)
    return EncodingTable(*read)


def _ranges(bits: int, signed: bool, parameter: bool) -> tuple[int, int]:
    """The range that the format implies: parameters up to 16 bits are symmetric about zero."""
    if not signed:
        return 0, 2**bits - 1
    top = 2 ** (bits - 1) - 1
    return (-top if parameter and bits <= 16 else -top - 1), top


def _entry(name: str, encoding: Encoding, parameter: bool) -> dict[str, Any]:
    bits, signed = encoding.bits, encoding.signed
    if (encoding.quant_min, encoding.quant_max) != _ranges(bits, signed, parameter):
        raise EncodingError(
            f"{name} has no AIMET form: got a range of {encoding.quant_min} to "
            f"{encoding.quant_max}, accepted is {_ranges(bits, signed, parameter)}"
        )
    if encoding.axis not in (None, 0):
        raise EncodingError(f"{name} has no AIMET form: got axis={encoding.axis}, accepted is 0")
    lowest = -(2 ** (bits - 1)) if signed else 0
    kind = "PER_TENSOR" if encoding.axis is None else "PER_CHANNEL"
    entry: dict[str, Any] = {
        "name": name,
        "enc_type": kind,
        "dtype": "INT",
        "bw": bits,
        "is_sym": signed,
        "scale": encoding.scale.flatten().tolist(),
        "offset": (lowest - encoding.zero_point).flatten().tolist(),
    }
    return entry if encoding.block is None else _block_entry(entry, encoding)


def _block_entry(entry: dict[str, Any], encoding: Encoding) -> dict[str, Any]:
    # The format's PER_BLOCK is a flat list that does not say where a channel ends: never written.
    channel, counts = split_block_scales(encoding.scale)
    exact = torch.equal(channel[:, None] * counts, encoding.scale)
    if not exact or encoding.bits != 4 or encoding.zero_point.any():
        raise EncodingError(
            f"{entry['name']} has no AIMET form: got block scales that are no multiples of 1 to "
            f"{BLOCK_SCALE_STEPS} of a scale of their channel, accepted are those of "
            "`snap_block_scales`"
        )
    return entry | {
        "enc_type": "LPBQ",
        "compressed_bw": 4,
        "bw": 8,
        "block_size": encoding.block,
        "scale": channel.tolist(),
        "offset": [-128] * len(channel),
        "per_block_int_scale": counts.flatten().tolist(),
    }


def split_block_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Split block scales ``[C, B]`` as HTP stores them: float ``[C]`` and whole ``[C, B]``.

    The whole numbers are 1 to 16; their product with the first is what HTP computes with.
    """
    channel = scale.amax(dim=1) / BLOCK_SCALE_STEPS
    counts = torch.clamp(torch.round(scale / channel[:, None]), 1, BLOCK_SCALE_STEPS)
    return channel, counts.to(torch.int64)


def _parse(entry: Any, parameter: bool) -> tuple[str, Encoding]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise EncodingError("malformed encoding: got one without a name, accepted are objects")
    name, kind = entry["name"], entry.get("enc_type")
    if not isinstance(kind, str) or kind not in _EXTRA:
        raise EncodingError(
            f"{name}: got enc_type={kind!r}, accepted are {', '.join(sorted(_EXTRA))}"
        )
    _check_keys(name, entry, _COMMON | _EXTRA[kind], set())
    if entry["dtype"] != "INT":
        raise EncodingError(f"{name}: got dtype={entry['dtype']!r}, accepted is 'INT'")
    if not isinstance(entry["is_sym"], bool):
        raise EncodingError(f"{name}: got is_sym={entry['is_sym']!r}, accepted are true and false")
    try:
        return name, _encoding(name, kind, entry, parameter)
    except EncodingError as error:
        text = str(error)
        raise EncodingError(text if text.startswith(name) else f"{name}: {text}") from error


def _encoding(name: str, kind: str, entry: dict[str, Any], parameter: bool) -> Encoding:
    compressed = kind == "LPBQ"
    bits = _whole(name, entry, "compressed_bw" if compressed else "bw")
    if bits not in (4, 8, 16, 32):
        raise EncodingError(f"{name}: got {bits} bits, accepted are 4, 8, 16 and 32")
    low, high = _ranges(bits, entry["is_sym"], parameter)
    scales, offsets = _numbers(name, entry, "scale"), _numbers(name, entry, "offset")
    if kind == "PER_TENSOR":
        _check_length(name, "scale", scales, 1)
    _check_length(name, "offset", offsets, len(scales))
    scale = torch.tensor(scales, dtype=torch.float32)
    grid = _whole(name, entry, "bw")
    lowest = -(2 ** (grid - 1)) if entry["is_sym"] else 0
    if any(offset != round(offset) for offset in offsets):
        raise EncodingError(f"{name}: got an offset that is not whole, accepted are integers")
    zero = torch.tensor([lowest - round(offset) for offset in offsets], dtype=torch.int64)
    if kind == "PER_TENSOR":
        return Encoding(scale[0], zero[0], low, high)
    if kind == "PER_CHANNEL":
        return Encoding(scale, zero, low, high, axis=0)
    return _block_encoding(name, entry, scale, zero, (low, high))


def _block_encoding(
    name: str, entry: dict[str, Any], scale: Tensor, zero: Tensor, limits: tuple[int, int]
) -> Encoding:
    counts = _numbers(name, entry, "per_block_int_scale")
    whole = all(each == round(each) and 1 <= each <= BLOCK_SCALE_STEPS for each in counts)
    if not whole or len(counts) % len(scale):
        raise EncodingError(
            f"{name}: got {len(counts)} values of per_block_int_scale for {len(scale)} channels, "
            f"accepted are whole numbers from 1 to {BLOCK_SCALE_STEPS}, as many for each channel"
        )
    block = _whole(name, entry, "block_size")
    if len(counts) == len(scale):  # one block a row is a scale a channel
        return Encoding(scale * torch.tensor(counts), zero, *limits, axis=0)
    scale = scale[:, None] * torch.tensor(counts).reshape(len(scale), -1)
    return Encoding(scale, zero[:, None].expand_as(scale), *limits, axis=0, block=block)


def _numbers(name: str, entry: dict[str, Any], key: str) -> list[float]:
    values = entry[key]
    if not isinstance(values, list) or not values:
        raise EncodingError(f"{name}: got {key} of no values, accepted is a list of numbers")
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise EncodingError(f"{name}: got {value!r} in {key}, accepted are finite numbers")
    return values


def _whole(name: str, entry: dict[str, Any], key: str) -> int:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20:
        raise EncodingError(f"{name}: got {key}={value!r}, accepted are whole numbers from 1 on")
    return value


def _check_length(name: str, key: str, values: list[float], wanted: int) -> None:
    if len(values) != wanted:
        raise EncodingError(f"{name}: got {len(values)} values of {key}, accepted are {wanted}")


def _check_keys(name: str, entry: dict[str, Any], wanted: set[str], allowed: set[str]) -> None:
    unknown, missing = set(entry) - wanted - allowed, wanted - set(entry)
    if unknown:
        raise EncodingError(
            f"{name}: got the unknown key {min(unknown)!r}, accepted are {sorted(wanted)}"
        )
    if missing:
        raise EncodingError(
            f"{name}: got no {min(missing)!r}, accepted are all of {sorted(wanted)}"
        )
