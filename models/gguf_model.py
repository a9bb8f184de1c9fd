"""A ``transformers`` model from a GGUF file, reading only the layers that are asked for.

``transformers`` can load GGUF files too, but parses the header three times and dequantizes every
tensor of the file, needed or not; and it drops the scaling of rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgepass.models.gguf_file import GgufFile
from edgepass.ops.errors import CheckpointError

# GGUF key after "<architecture>." to the name in a transformers config.
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TOKEN_KEYS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def gguf_config(file: GgufFile) -> Any:
    """Return the ``transformers`` config that the metadata of ``file`` describe.

    Raises:
        CheckpointError: another architecture than :data:`ARCHITECTURES`, a mixture of experts,
            partial or length-dependent rotary embedding, or a missing key.
    """
    from transformers import AutoConfig

    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES or _key(file, "expert_count", 0):
        raise CheckpointError(
            f"unsupported architecture in a GGUF file: got architecture={architecture} (experts: "
            f"{_key(file, 'expert_count', 0)}) in path={file.path}; accepted are dense "
            f"{', '.join(ARCHITECTURES)} (others load from a directory with safetensors)"
        )
    fields = {name: _required(file, key) for key, name in _CONFIG_KEYS.items()}
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = _key(file, "attention.key_length", hidden // heads)
    tokens = {
        name: file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in _TOKEN_KEYS.items()
    }
    return AutoConfig.for_model(
        architecture,
        **fields,
        **tokens,
        head_dim=head_dim,
        num_key_value_heads=_key(file, "attention.head_count_kv", heads),
        vocab_size=_required_tensor(file, "token_embd.weight").shape[0],
        tie_word_embeddings="output.weight" not in file.tensors,
        rope_parameters=_rope_parameters(file, head_dim),
    )


def load_gguf_weights(file: GgufFile, config: Any, dtype: torch.dtype) -> Any:
    """Return the model of ``config`` with the weights of ``file`` in ``dtype``.

    Raises:
        CheckpointError: a tensor is missing or of another shape than ``config`` asks for.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in model_class(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    stored = name_map(file, config)
    state = {name: _weight(file, config, name, stored(name), shapes[name]) for name in shapes}
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if "rope_freqs.weight" in file.tensors:
        # Llama 3's frequency scaling, computed by the converter: the metadata do not hold it.
        model.model.rotary_emb.inv_freq.div_(file.dequantize("rope_freqs.weight"))
    return model


def _weight(file: GgufFile, config: Any, name: str, stored_name: str, shape: torch.Size) -> Tensor:
    tensor = _required_tensor(file, stored_name)
    if tensor.shape != tuple(shape):
        raise CheckpointError(
            f"tensor of another shape: got {stored_name} shape={list(tensor.shape)} in "
            f"path={file.path}; its metadata ask for {list(shape)}"
        )
    weight = file.dequantize(stored_name)
    if stores_pairs(config, name):
        return halves_from_pairs(weight, config.head_dim)
    return weight


def stores_pairs(config: Any, name: str) -> bool:
    """Whether llama.cpp stores the rows of this weight with rotary pairs side by side."""
    return config.model_type == "llama" and ("q_proj" in name or "k_proj" in name)


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's order of Q and K rows (rotary pairs side by side): rows ``[H * D, ...]``."""
    heads = weight.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).reshape(weight.shape)


def name_map(file: GgufFile, config: Any) -> Callable[[str], str]:
    """What the file calls a parameter that ``transformers`` calls by a name."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[config.model_type]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)

    def stored(name: str) -> str:
        base, _, suffix = name.rpartition(".")
        return f"{names.get_name(base)}.{suffix}"

    return stored


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    rotated = _key(file, "rope.dimension_count", head_dim)
    scaling = _key(file, "rope.scaling.type", "none")
    if rotated != head_dim or scaling not in ("none", "linear"):
        raise CheckpointError(
            f"unsupported rotary embedding in a GGUF file: got dimension_count={rotated} of "
            f"{head_dim}, scaling={scaling} in path={file.path}; accepted are whole heads with "
            "scaling none or linear"
        )
    parameters = {"rope_type": "default", "rope_theta": _key(file, "rope.freq_base", 10000.0)}
    factor = _key(file, "rope.scaling.factor", 1.0)
    if scaling == "linear" and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def _key(file: GgufFile, key: str, default: Any) -> Any:
    return file.metadata.get(f"{file.metadata.get('general.architecture')}.{key}", default)


def _required(file: GgufFile, key: str) -> Any:
    value = _key(file, key, None)
    if value is None:
        raise CheckpointError(
            f"incomplete GGUF file: got path={file.path} without the metadata key {key}; accepted "
            "are files that llama.cpp runs"
        )
    return value


def _required_tensor(file: GgufFile, name: str) -> Any:
    if name not in file.tensors:
        raise CheckpointError(
            f"incomplete GGUF file: got path={file.path} without the tensor {name}; accepted are "
            "whole models, not their parts"
        )
    return file.tensors[name]
