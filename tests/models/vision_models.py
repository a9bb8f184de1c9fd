"""Tiny random vision-language models, and prompts with an image in them."""

from typing import Any

import torch
import transformers

from tests.models.tiny_models import tiny_config

IMAGE = 95
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Whole model to its text half's family and what its config needs beside.
VISION_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("qwen2", {"image_token_index": IMAGE, "vision_feature_layer": -1}),
    "idefics3": ("llama", {"image_token_id": IMAGE, "scale_factor": 1}),
    "smolvlm": ("llama", {"image_token_id": IMAGE, "scale_factor": 1}),
    # These are refused: their decoder is told which tokens are an image's.
    "paligemma": ("gemma", {"image_token_index": IMAGE, "projection_dim": 64}),
    "gemma3": ("gemma3_text", {"image_token_id": IMAGE, "mm_tokens_per_image": 4}),
}


def tiny_vision_model(family: str, seed: int = 0) -> Any:
    """A model that sees images of 16 by 16 as four vectors of its text half."""
    torch.manual_seed(seed)
    text, options = VISION_FAMILIES[family]
    tower = "clip_vision_model" if family == "llava" else "siglip_vision_model"
    vision = _VISION if family in ("idefics3", "smolvlm") else {"model_type": tower, **_VISION}
    config = transformers.AutoConfig.for_model(
        family, text_config=tiny_config(text).to_dict(), vision_config=vision, **options
    )
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.15)
    return model.eval().requires_grad_(False)


def prompt(family: str, seed: int = 0) -> dict[str, Any]:
    """Six words with an image between them: ids ``[1, 10]`` and pixels."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (6,), generator=generator).tolist()
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    if family in ("idefics3", "smolvlm"):
        pixels = pixels[None]
    ids = torch.tensor([[*words[:2], *[IMAGE] * 4, *words[2:]]])
    extra = {}
    if family in ("paligemma", "gemma3"):
        extra["token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, "pixel_values": pixels, **extra}
