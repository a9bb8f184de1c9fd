"""Tiny decoders, quantized and lowered for QNN, and whether the libraries are here."""

from __future__ import annotations

import pytest
import torch

from edgepass.lowering.qnn_libraries import missing_libraries

MISSING = missing_libraries()
needs_libraries = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CONTEXT, CHUNK = 24, 6


def tokens(count: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed))


def quantization(recipe: str, **options):
    from edgepass.lowering.qnn_quantizer import QnnQuantization
    from edgepass.lowering.qnn_recipes import find_chip, find_qnn_recipe

    return QnnQuantization(find_qnn_recipe(recipe), find_chip("SM8650"), **options)


def quantized(family: str, recipe: str, layers: int = 1, embeddings: bool = False, **options):
    from edgepass.lowering.qnn_decoder import quantize_decoder
    from edgepass.models.cache_decoder import CacheIoDecoder
    from tests.models.tiny_models import tiny_model

    changes = {"layer_types": ["sliding_attention"]} if family == "gemma3_text" else {}
    model = tiny_model(family, num_hidden_layers=layers, **(changes if layers == 1 else {}))
    decoder = CacheIoDecoder(model, CONTEXT, embeddings)
    texts = [tokens(seed=1), tokens(seed=2)]
    if embeddings:
        texts = [model.get_input_embeddings()(text) for text in texts]
    return quantize_decoder(decoder, quantization(recipe, **options), texts, CHUNK)
