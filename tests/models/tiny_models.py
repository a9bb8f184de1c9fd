"""Tiny random models of each family, for tests that need a whole decoder in a moment."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "layer_types": _SLIDING}

# Model type to what its config needs beyond the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "layer_types": _SLIDING},
    "qwen3": {"head_dim": 32},
    "phi3": {"sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """A config of 2 layers, 64 wide, 96 tokens, 64 positions; ``changes`` override."""
    options = _SIZES | FAMILIES.get(family, {}) | changes
    return transformers.AutoConfig.for_model(family, **options)


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of ``family`` whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        # Norm weights begin at exactly 0 or 1, which would hide a norm that is left out.
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.15)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(vocab_size: int = 96) -> Any:
    """Byte-level: ids 0 to 2 are special, 3 a space, then ASCII from ``!`` on, last ``He``."""
    characters = [chr(code) for code in range(33, 33 + vocab_size - 5)]
    tokens = ["<pad>", "<s>", "</s>", "Ġ", *characters, "He"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges=[("H", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_checkpoint(folder: Any, family: str = "llama", **changes: Any) -> Any:
    """Write a model with its tokenizer as ``config.json`` and safetensors; return the model."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return model
