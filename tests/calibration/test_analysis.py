"""The file of an analysis: what is written is what is read, and what is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepass.calibration.analysis import (
    ANALYSIS,
    Analysis,
    Candidate,
    Site,
    format_analysis,
    read_analysis,
)
from edgepass.calibration.recipe_sections import Weights
from edgepass.ops.errors import InvalidArgumentError


def an_analysis() -> Analysis:
    candidates = tuple(
        Candidate(
            label=f"int{bits}",
            weights=Weights(bits=bits, granularity="group", group_size=32),
            bytes={"xnnpack": 64 * bits, "vulkan": 66 * bits},
            sqnr_db=6.0 * bits,
            kl=2.0**-bits,
            kl_interval=(2.0**-bits / 2, 2.0**-bits * 2),
        )
        for bits in (4, 8)
    )
    site = Site(
        name="model.layers.0.mlp.up_proj",
        kind="weight",
        modules=("model.layers.0.mlp.up_proj",),
        layer=0,
        role="up_proj",
        shape=(8, 64),
        values=512,
        candidates=candidates,
    )
    return Analysis(
        model="tiny",
        recipe={"name": "8da4w"},
        identity={"model": "1f"},
        chunks=2,
        chunk_tokens=16,
        seed=0,
        sites=(site,),
    )


def test_a_written_analysis_is_read_again(tmp_path: Path) -> None:
    analysis = an_analysis()
    (tmp_path / ANALYSIS).write_text(format_analysis(analysis), "utf-8")
    assert read_analysis(tmp_path) == analysis
    assert read_analysis(tmp_path / ANALYSIS) == analysis


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "edgepass analysis 9", "format"),
        ("unknown", 1, "unknown key 'unknown'"),
        ("sites", [], "sites"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, key: str, value: object, said: str) -> None:
    content = json.loads(format_analysis(an_analysis())) | {key: value}
    (tmp_path / ANALYSIS).write_text(json.dumps(content), "utf-8")
    with pytest.raises(InvalidArgumentError, match=said):
        read_analysis(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3"])
def test_what_is_no_analysis_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / ANALYSIS).write_text(text, "utf-8")
    with pytest.raises(InvalidArgumentError, match="analysis="):
        read_analysis(tmp_path)


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="edgepass analyze"):
        read_analysis(tmp_path)
