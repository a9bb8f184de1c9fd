"""What `eval` measures: a lowered folder or an eager model, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepass.api import choose_recipe
from edgepass.calibration.recipes import check_training, quantize_model
from edgepass.generation import load_decoder
from edgepass.models.load import load_blocks, load_model, load_tokenizer
from edgepass.models.rotary import longest_context
from edgepass.ops.errors import InvalidArgumentError
from edgepass.perplexity import (
    Perplexity,
    WindowLogits,
    of_model,
    of_program,
    perplexity,
    read_tokens,
)
from edgepass.weight_calibration import check_text, read_text


@dataclass(frozen=True)
class Subject:
    """Something that predicts tokens; ``simulated`` if by the simulator of a device's runtime."""

    tokenizer: Any
    window_logits: WindowLogits
    simulated: bool = False

    @staticmethod
    def of_folder(folder: Path, context: int) -> Subject:
        """Load a folder that `lower` wrote. Raises InvalidArgumentError beyond its context."""
        decoder = load_decoder(folder)
        _check_context(context, decoder.context)
        return Subject(load_tokenizer(folder), of_program(decoder), decoder.simulated)

    @staticmethod
    def of_model(
        spec: str,
        context: int,
        recipe: str | None = None,
        group_size: int | None = None,
        layers: int | None = None,
        trust_remote_code: bool = False,
        weight_algorithm: str | None = None,
        calibration: Path | None = None,
        calibration_tokens: int | None = None,
        keep_blocks: bool = False,
    ) -> Subject:
        """Load a model to run eagerly, quantized by ``recipe`` if one is given.

        ``weight_algorithm`` takes the place of the recipe's; ``calibration`` is the text that it
        may need. ``keep_blocks`` takes the 4-bit blocks of a GGUF file as they are.

        Raises InvalidArgumentError for an unknown recipe, a group size that does not fit, or a
        ``context`` beyond the model's.
        """
        chosen = None
        if recipe is not None:
            chosen = choose_recipe(recipe, group_size, weight_algorithm)
            check_training(chosen, None)
        elif weight_algorithm is not None:
            raise InvalidArgumentError(
                f"got weight_algorithm={weight_algorithm} without a recipe, accepted is --recipe "
                "with it"
            )
        elif keep_blocks:
            raise InvalidArgumentError(
                "got keep_blocks without a recipe, accepted is --recipe with it"
            )
        check_text(chosen, calibration, calibration_tokens)
        model, tokenizer = load_model(spec, layers=layers, trust_remote_code=trust_remote_code)
        _check_context(context, longest_context(model.config))
        if chosen is not None:
            chunks = read_text(tokenizer, calibration, calibration_tokens)
            blocks = load_blocks(spec, model) if keep_blocks else None
            quantize_model(model, chosen, chunks=chunks, blocks=blocks)
        return Subject(tokenizer, of_model(model))

    def perplexity(
        self,
        text: Path,
        context: int,
        max_tokens: int | None,
        on_window: Callable[[int, int], None],
    ) -> Perplexity:
        """Perplexity of the first ``max_tokens`` of ``text``: see ``edgepass.perplexity``."""
        tokens = read_tokens(self.tokenizer, text, max_tokens)
        return perplexity(tokens, context, self.window_logits, on_window)


def refuse_model_options(**given: object) -> None:
    """Raise InvalidArgumentError for an option of an eager model beside a lowered folder."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise InvalidArgumentError(
                f"got {name}={value} with a folder, which is quantized already; accepted is "
                f"--{name.replace('_', '-')} with --model"
            )


def _check_context(context: int, longest: int | None) -> None:
    if longest is not None and context > longest:
        raise InvalidArgumentError(
            f"context out of range: got context={context}, accepted are 2 to {longest}, the most "
            "that the model holds"
        )
