"""Writing small GGUF files as llama.cpp's converter does, for the tests that read them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.models.tiny_models import tiny_tokenizer


def pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of Q and K: the two of a rotary pair side by side."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    leave_out: str | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    **numbers: int,
) -> Path:
    """Write ``model`` (llama, qwen2, qwen3) with its tokenizer; matrices are stored as ``kind``.

    ``leave_out``: a stored tensor's name; ``extra``: further tensors; ``numbers``: metadata.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    _add_metadata(writer, config)
    for key, number in numbers.items():
        writer.add_uint32(f"{config.model_type}.{key}", number)
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, (".weight", ".bias"))
        if stored is not None and stored != leave_out:
            _add_tensor(writer, stored, _as_stored(name, weight, config), kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    if config.model_type == "llama" and "q_proj" in name:
        return pairs_from_halves(weight, config.num_attention_heads)
    if config.model_type == "llama" and "k_proj" in name:
        return pairs_from_halves(weight, config.num_key_value_heads)
    return weight


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, kind: Any) -> None:
    values = weight.contiguous().numpy()
    if values.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    vocabulary = tiny_tokenizer(config.vocab_size).get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3, 3, 3, *[1] * (len(vocabulary) - 3)])
    writer.add_token_merges(["H e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_array(f"{config.model_type}.unused_numbers", np.arange(4).tolist())
