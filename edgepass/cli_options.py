"""Options that several commands of the command line share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", help="A directory, .gguf file, hub id, or smollm2-135m.")
]
RecipeName = Annotated[
    str, typer.Option(help="How it is quantized: a name of `recipes list`, or a recipe file.")
]
Backend = Annotated[str, typer.Option(help="xnnpack, vulkan or (lower only) qnn.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights that share one scale, instead of the recipe's.")
]
WeightAlgorithm = Annotated[
    str | None, typer.Option(help="rtn, hqq, mse, seqmse or gptq, instead of the recipe's.")
]
KeepBlocks = Annotated[
    bool, typer.Option("--keep-blocks", help="Take a GGUF file's own 4-bit blocks as they are.")
]
TextTokens = Annotated[
    int | None,
    typer.Option(help="Calibrate on this many: 1024 by default for qnn, else 32768."),
]
Layers = Annotated[int | None, typer.Option(help="Keep the first N layers only.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
