"""What the command line does for QNN, without its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepass import console
from edgepass.ops.encodings_file import read_encodings_file
from edgepass.ops.errors import InvalidArgumentError
from edgepass.qnn import QnnOptions, check_options, lower_for_qnn


def lower_command(
    model: str,
    out: Path,
    options: QnnOptions,
    calibration: Path | None,
    calibration_tokens: int,
    layers: int | None,
    trust_remote_code: bool,
    check: bool,
    encodings: Path | None = None,
) -> dict[str, Any] | None:
    """Load, lower and write; return the report. Bad options are refused before the model is read.

    Either ``calibration`` (a text) or ``encodings`` (a file) is given. The state of the calibration
    is kept beside ``out`` until all is written, so that the same command goes on where it was
    killed. Of several processes that torchrun started, the first lowers and the others only help to
    calibrate: theirs return None.

    Raises InvalidArgumentError for both or none of the two, and what ``lower_for_qnn`` raises.
    """
    with console.show_progress() as progress:
        progress("load")
        from edgepass.lowering.qnn_libraries import prepare_libraries
        from edgepass.lowering.qnn_recipes import check_chip, find_chip

        recipe = check_options(options)
        if calibration is None and encodings is None:
            raise InvalidArgumentError(
                "no calibration text: got calibration=None for backend=qnn, accepted is a UTF-8 "
                "file of text or JSONL like the model will see, or the encodings of an earlier "
                "lowering"
            )
        if calibration is not None and encodings is not None:
            raise InvalidArgumentError(
                f"got calibration={calibration} and encodings={encodings}, accepted is one of them"
            )
        table = None if encodings is None else read_encodings_file(encodings)
        prepare_libraries()
        check_chip(recipe, options.kv_bits, find_chip(options.soc))

        from edgepass.calibration.calibrate import Calibration
        from edgepass.calibration.chunks import chunks_of, read_chunks
        from edgepass.models.load import load_model

        loaded, tokenizer = load_model(model, layers=layers, trust_remote_code=trust_remote_code)
        if calibration is None:
            tokens = _check_tokens(loaded, options)
        else:
            length, count = chunks_of(calibration_tokens, options.context)
            tokens = read_chunks(tokenizer, calibration, length, count).flatten().tolist()
        kept = Calibration(
            out.absolute().parent / f".{out.name}.calibration" if calibration else None,
            progress=progress,
            log=console.say,
        )
        result = lower_for_qnn(
            loaded,
            options,
            tokens,
            encodings=table,
            check=check,
            model_name=model,
            progress=progress,
            calibration=kept,
        )
        if result is None:
            return None
        progress("write")
        result.save(out, tokenizer)
        kept.discard()
    return result.report


def _check_tokens(model: Any, options: QnnOptions) -> list[int]:
    """Where nothing is calibrated: any ids, the same each time, behind which both forms run."""
    count = min(options.context, 2 * options.prefill_chunk)
    return [(1 + 31 * index) % int(model.config.vocab_size) for index in range(count)]


def check_foreign_options(backend: str, **options: tuple[Any, Any]) -> None:
    """Refuse options of other backends: each is (what was given, what it is by default).

    Raises InvalidArgumentError.
    """
    for name, (given, default) in options.items():
        if given != default:
            raise InvalidArgumentError(
                f"got {name}={given} for backend={backend}, which has no such option; leave it out"
            )


def encoding_rows(file: Path) -> dict[str, str]:
    """Each encoding of a file as one line, by name."""
    from edgepass.ops.encodings import describe

    return {name: describe(encoding) for name, encoding in read_encodings_file(file).items()}


def difference_rows(first: Path, second: Path, tolerance: float) -> dict[str, str]:
    """What differs between two files by more than ``tolerance``, by name."""
    if not tolerance >= 0:
        raise InvalidArgumentError(f"got tolerance={tolerance}, accepted are 0 and more")
    found = read_encodings_file(first).diff(read_encodings_file(second), tolerance)
    return {each.name: each.reason for each in found}
