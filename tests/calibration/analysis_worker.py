"""One process of an analysis under torchrun: writes what it found into the folder given."""

import sys
from pathlib import Path

import torch

from edgepass.calibration.analysis import format_analysis
from edgepass.calibration.analyze import AnalysisRun
from edgepass.calibration.recipe_file import find_recipe
from tests.models.tiny_models import tiny_model

CHUNKS = torch.randint(0, 96, (5, 16), generator=torch.Generator().manual_seed(5))


def analysed(log=None, checkpoint=None, progress=None, model=None, **options):
    """An analysis of a tiny model: two of its sites exactly, too."""
    torch.set_num_threads(1)
    recipe = options.pop("recipe", None) or find_recipe("8da4w")
    run = AnalysisRun(
        ("xnnpack",),
        lambda *_: True,
        exact=options.pop("exact", 2),
        checkpoint=checkpoint,
        progress=progress,
        log=log,
        **options,
    )
    return run.run(model or tiny_model(), recipe, CHUNKS, name="tiny")


if __name__ == "__main__":
    lines: list[str] = []
    found = analysed(lines.append)
    rank = torch.distributed.get_rank()
    folder = Path(sys.argv[1])
    (folder / f"{rank}.json").write_text(format_analysis(found))
    (folder / f"{rank}.log").write_text("\n".join(lines))
