"""The one function that turns an exported program into a ``.pte`` and says what became of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from edgepass.lowering.report import delegates, outside_delegates
from edgepass.lowering.stages import Stages
from edgepass.ops.errors import InvalidArgumentError, OutputError
from edgepass.ops.weight_cache import keep_no_forms
from edgepass.passes.explain_linears import explain_linears
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.verification import run_program, signal_to_noise_db

BACKENDS = ("vulkan", "xnnpack")
DTYPES = ("fp32", "fp16")


@dataclass(frozen=True)
class LoweredProgram:
    """A finished program: ``buffer`` (the ``.pte`` bytes), ``report``, and the fused program."""

    buffer: bytes
    report: dict[str, Any]
    fused: ExportedProgram

    def save(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
        """Write ``model.pte``, ``report.json`` and the tokenizer; the folder appears at once.

        ``folder`` may exist: its files of these names are replaced. Raises OutputError if it
        cannot be written; nothing half-written stays.
        """
        return save_folder(folder, self.buffer, self.report, tokenizer)


def save_folder(
    folder: str | os.PathLike[str],
    buffer: bytes,
    report: dict[str, Any],
    tokenizer: Any = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a program, its report and its tokenizer into ``folder``, whole or not at all.

    ``write_more`` is given the folder in which the files are staged. Raises OutputError.
    """
    target = Path(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write out={target}: {error.strerror or error}; give a folder whose "
            "parent is writable"
        ) from error
    try:
        (staging / "model.pte").write_bytes(buffer)
        (staging / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        if write_more is not None:
            write_more(staging)
        _publish(staging, target)
    except OSError as error:
        raise OutputError(f"cannot write out={target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _publish(staging: Path, target: Path) -> None:
    """Move the finished files into place: a new folder by one rename, else file by file."""
    if not target.exists():
        staging.chmod(0o755)
        staging.rename(target)
        return
    for path in sorted(staging.iterdir()):
        os.replace(path, target / path.name)


def lower(
    program: ExportedProgram,
    *,
    backend: str,
    recipe: str | None = None,
    model_name: str | None = None,
    dtype: str = "fp32",
    verify: bool = False,
    sample_inputs: Sequence[Any] | None = None,
    progress: Callable[[str], None] | None = None,
    facts: dict[str, Any] | None = None,
) -> LoweredProgram:
    """Fuse, pack and lower an exported program for ``backend``.

    ``program`` is what ``torch.export.export`` returns and is not changed. ``recipe`` and
    ``model_name`` are only reported, and so is what ``facts`` holds. ``dtype`` is what a Vulkan
    program computes in (``fp32`` or ``fp16``). ``sample_inputs`` (default: the program's own
    examples) serve the numeric comparison in the report and ``verify``, which checks each pass.
    ``progress`` is called with each stage's name.

    Raises InvalidArgumentError for an unknown backend or dtype, ProgramError for a program that
    is no ExportedProgram or is lowered already, VerificationError if a pass changes the outputs.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("dtype", dtype, DTYPES)
    stages = Stages(progress)
    samples = tuple(sample_inputs if sample_inputs is not None else _example_inputs(program))
    with stages.stage("fuse"):
        working = WorkingProgram(program)
        pipeline = fusion_pipeline(int8_weights=backend == "xnnpack")
        pipeline.apply(working, verify=verify, sample_inputs=samples)
        linears = [
            {"name": row.name, "fused": row.fused, "reason": row.reason}
            for row in explain_linears(working)
        ]
        fused = working.to_exported()
    with stages.stage("compare"):
        sqnr = _fused_against_unfused(program, fused, samples)
    manager, declined = _lower_fused(fused, backend, dtype, stages)
    buffer = bytes(manager.buffer)
    report = {
        "edgepass": version("edgepass"),
        "backend": backend,
        "recipe": recipe,
        "model": model_name,
        **(facts or {}),
        "linears": _summary(linears, declined),
        "delegates": delegates(manager),
        "outside_delegates": outside_delegates(manager),
        "pte_bytes": len(buffer),
        "stages": stages.rows,
        "numerics": {"sqnr_db": sqnr},
    }
    return LoweredProgram(buffer, report, fused)


def _lower_fused(
    fused: ExportedProgram, backend: str, dtype: str, stages: Stages
) -> tuple[Any, list[tuple[str, str]]]:
    """The finished program, and (name, reason) of each linear that the backend declined."""
    if backend == "xnnpack":
        if dtype != "fp32":
            raise InvalidArgumentError(f"got dtype={dtype} for backend=xnnpack, accepted is fp32")
        from edgepass.lowering.xnnpack import lower_xnnpack

        finished, refused = lower_xnnpack(fused, stages=stages)
        return finished, [(each.weight, each.reason) for each in refused]
    from edgepass.lowering.vulkan import lower_vulkan

    with stages.stage("delegate"):
        lowered = lower_vulkan(fused, dtype=dtype)
    return lowered.manager, [
        (each.weight or each.node, each.reason) for each in lowered.facts.declined
    ]


def _summary(linears: list[dict[str, Any]], declined: list[tuple[str, str]]) -> dict[str, Any]:
    """Linears by their fate; one that the backend declined counts as unfused."""
    rows = {row["name"]: dict(row) for row in linears}
    for weight, reason in declined:
        for name, row in rows.items():
            if weight.startswith(name + "."):
                row.update(fused=False, reason=reason)
    unfused = [
        {"name": name, "reason": row["reason"]} for name, row in rows.items() if not row["fused"]
    ]
    return {"total": len(rows), "fused": len(rows) - len(unfused), "unfused": unfused}


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise InvalidArgumentError(
            f"unknown {name}: got {name}={value!r}, accepted are {', '.join(accepted)}"
        )


def _example_inputs(program: Any) -> Sequence[Any]:
    examples = getattr(program, "example_inputs", None)
    return pytree.tree_leaves(examples) if examples else ()


def _fused_against_unfused(
    program: ExportedProgram, fused: ExportedProgram, samples: Sequence[Any]
) -> float | None:
    """SQNR in dB of the fused graph's worst output; None if there is nothing to run it on."""
    before, after = WorkingProgram(program), WorkingProgram(fused)
    if len(samples) != len(before.user_inputs):
        return None
    with keep_no_forms():
        pairs = zip(run_program(before, samples), run_program(after, samples), strict=True)
    agreements = [
        signal_to_noise_db(one, other) for one, other in pairs if isinstance(one, torch.Tensor)
    ]
    worst = min(agreements, default=None)
    # JSON has no infinity: equal to the last bit is reported as the most that float32 can tell.
    return None if worst is None else round(min(worst, 999.0), 2)
