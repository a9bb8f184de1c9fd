"""The text half of a vision-language model: a causal language model that is fed by embeddings.

The tower and the projector stay outside: they turn a prompt with images into vectors, once, and
the text half is quantized and lowered as any decoder is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgepass.models.architecture import check_architecture, first_line
from edgepass.ops.errors import CheckpointError, InvalidArgumentError

ACCEPTED = (
    "accepted are vision-language models whose decoder is a causal language model of its own with "
    "standard attention, such as llava, idefics3, smolvlm"
)
# What the decoder may be told beside the vectors, if it changes nothing for one whole text.
_UNREAD = {"past_key_values", "use_cache", "cache_position", "return_dict", "inputs_embeds"}
_UNREAD |= {"output_attentions", "output_hidden_states", "input_ids"}
# Two forwards of one decoder in float32 agree to this.
_EQUAL = 1e-4


def text_half(model: nn.Module) -> Any:
    """Return the decoder and head of ``model`` as a causal language model; weights are shared.

    ``model`` is a ``...ForConditionalGeneration`` of ``transformers``. The result is what
    ``CacheIoDecoder(..., embeddings=True)`` and ``lower_for_qnn`` take.

    Raises CheckpointError if the decoder is not a causal language model with standard attention,
    or predicts other tokens than the whole model does for the same text.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    decoder, head = _parts(model)
    config = decoder.config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise _refusal(model, f"its decoder of type {config.model_type} is none of its own")
    check_architecture(config, kind)
    with torch.device("meta"):
        causal: Any = kind(config)
    if type(causal.base_model) is not type(decoder):
        raise _refusal(model, f"its decoder is a {type(decoder).__name__}")
    setattr(causal, causal.base_model_prefix, decoder)
    causal.set_output_embeddings(head)
    left = [name for name, value in causal.named_parameters() if value.is_meta]
    if left:
        raise _refusal(model, f"it has no {left[0]}")
    causal.generation_config = getattr(model, "generation_config", causal.generation_config)
    causal.eval().requires_grad_(False)
    _check_equal(model, causal)
    return causal


def embed_prompt(model: nn.Module, **inputs: Any) -> Tensor:
    """Return what the decoder of ``model`` is fed for one prompt: float ``[S, H]``.

    ``inputs`` are those of the model's own processor (``input_ids [1, S]``, ``pixel_values`` and
    so on): its tower and projector run, its decoder does not.

    Raises CheckpointError if the model tells its decoder more than the vectors (a mask that is not
    causal, positions of several axes, features for inner layers), InvalidArgumentError for several
    prompts at once or inputs that the model refuses.
    """
    given: dict[str, Any] = {}
    decoder, _ = _parts(model)

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update(kwargs, **({"args": args} if args else {}))
        raise _Caught

    hook = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    except _Caught:
        pass
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"unusable prompt: got {', '.join(sorted(inputs))}: {first_line(error)}; accepted are "
            "the inputs that the model's own processor makes"
        ) from error
    finally:
        hook.remove()
    vectors = given.get("inputs_embeds")
    if not isinstance(vectors, Tensor):
        raise _refusal(model, "it feeds its decoder something else than vectors")
    if vectors.dim() != 3 or vectors.shape[0] != 1:
        raise InvalidArgumentError(
            f"several prompts: got embeddings of shape {list(vectors.shape)}, accepted is one "
            "prompt at a time"
        )
    for name, value in given.items():
        if value is not None and name not in _UNREAD and not _is_plain(name, value, vectors):
            raise _refusal(model, f"it tells its decoder {name} beside the vectors")
    return vectors[0].detach()


class _Caught(Exception):
    """Ends a forward at the decoder."""


def _is_plain(name: str, value: Any, vectors: Tensor) -> bool:
    """Whether an argument of the decoder says no more than that one whole text comes."""
    if isinstance(value, Tensor) and name == "attention_mask":
        return value.dim() == 2 and bool(value.all())
    if isinstance(value, Tensor) and name == "position_ids":
        return torch.equal(value.flatten(), torch.arange(vectors.shape[1]))
    return not isinstance(value, (Tensor, dict, list, tuple))


def _parts(model: Any) -> tuple[Any, Any]:
    """The decoder and the head. Raises CheckpointError if ``model`` has no such halves."""
    inner = getattr(model, "model", model)
    decoder = getattr(inner, "language_model", getattr(inner, "text_model", None))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if decoder is None or head is None:
        raise _refusal(model, "it has no decoder and head of its own")
    return decoder, head


def _check_equal(model: Any, causal: Any) -> None:
    """The text half must predict what the whole model does for a text without images."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(causal.config.vocab_size, (1, 8), generator=generator)
    # A placeholder for an image would ask for one.
    image = getattr(model.config, "image_token_id", None)
    if image is not None:
        tokens[tokens.eq(image)] = (image + 1) % causal.config.vocab_size
    with torch.no_grad():
        expected, found = model(input_ids=tokens).logits, causal(input_ids=tokens).logits
    error = (found - expected).norm() / expected.norm()
    if not error <= _EQUAL:
        raise _refusal(model, f"its decoder alone is off by {error:.1e} of the logits")


def _refusal(model: Any, why: str) -> CheckpointError:
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return CheckpointError(f"no text half: got model_type={name}: {why}; {ACCEPTED}")
