"""Which ``transformers`` architectures can become a decoder with a static KV cache."""

from __future__ import annotations

from typing import Any

from edgepass.models.rotary import LENGTH_DEPENDENT_ROPE, STATIC_ROPE, rope_types
from edgepass.ops.errors import CheckpointError

# Families whose decoder is tested against the model's own forward. Others are compared with it
# when the decoder is built (see `StaticCacheDecoder`).
TESTED_FAMILIES = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
ACCEPTED_ARCHITECTURES = (
    "accepted are decoder-only text models with standard attention, such as "
    + ", ".join(sorted(TESTED_FAMILIES))
)
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_architecture(config: Any, model_class: type | None = None) -> None:
    """Accept ``config`` if its model has standard attention in every layer.

    ``model_class`` defaults to the causal language model that ``transformers`` has for ``config``.

    Raises:
        CheckpointError: an encoder, an encoder-decoder, a recurrent or hybrid model, several
            modalities, compressed keys and values, or an unknown rotary embedding.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if model_class is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(config, "it has no causal language model")
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    _check_class(config, model_class)
    odd_layers = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if odd_layers:
        raise _refusal(config, f"it has layers of type {', '.join(sorted(odd_layers))}")
    if getattr(config, "kv_lora_rank", None):
        raise _refusal(config, "its keys and values are compressed (kv_lora_rank)")
    odd_rope = set(rope_types(config)) - STATIC_ROPE - LENGTH_DEPENDENT_ROPE
    if odd_rope:
        raise _refusal(config, f"its rotary embedding is of type {', '.join(sorted(odd_rope))}")


def _check_class(config: Any, model_class: Any) -> None:
    named = getattr(config, "architectures", None) or [model_class.__name__]
    if model_class.__name__.endswith("ForConditionalGeneration") or config.is_encoder_decoder:
        raise _refusal(config, "it reads more than one text")
    if not named[0].endswith(("ForCausalLM", "LMHeadModel")):
        raise _refusal(config, f"{named[0]} generates no text")
    standard = getattr(model_class, "_supports_attention_backend", False)
    if not standard or getattr(model_class, "_is_stateful", False):
        raise _refusal(config, "it has no standard attention")


def first_line(error: Exception) -> str:
    """Return what another library's exception says, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refusal(config: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"unsupported architecture: got model_type={config.model_type}: {why}; "
        f"{ACCEPTED_ARCHITECTURES}"
    )
