"""What an analysis found: how much each quantized site hurts, candidate by candidate, as a file.

A site is one thing that a recipe may quantize: a linear's weight, the embedding, the head, the
input of linears, an attention product, the keys' and values' cache. A candidate is one way to
quantize it. Its errors are those of quantizing that site alone, everything else in float.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from edgepass.calibration.recipe_section import Section
from edgepass.calibration.recipe_sections import Activations, Backend, KvCache, Weights
from edgepass.ops.errors import InvalidArgumentError

ANALYSIS = "analysis.json"
# The part of a slope that counts. On SmolLM2-135M, allocated to 4.75 bits a weight, 0, 0.15, 0.25,
# 0.35, 0.5 and 1 leave 56, 60, 65, 71, 90 and 102 % of the uniform recipe's divergence, and 64, 49,
# 43, 40, 34 and 39 % of its loss on other text.
_SLOPE_PART = 0.25
SiteKind = Literal["weight", "embedding", "head", "activation", "attention", "kv_cache"]
# JSON knows lists only, which strict mode alone would refuse for tuples.
_LIST = Field(strict=False)


class Candidate(Section):
    """One way to quantize a site, and what that does.

    ``weights``, ``activations`` and ``kv_cache`` are what a recipe's section asks for; one of them
    is given. ``bytes``: by backend that holds it, the packed bytes of the site, scales and padding
    included (0 for a site that stores nothing); a backend that is not there cannot hold it.
    ``sqnr_db``: signal to noise at the site itself, averaged in power. ``kl``: the estimated
    divergence of the logits' distribution from the float model's, nats a token; ``kl_interval``:
    its 95 % confidence interval over the chunks, if there are several. ``exact_kl``: the same by
    running the model. ``slope``: by how much the loss of the analysed text changes to first order,
    nats a predicted token, less than 0 where it falls, None if the weight's algorithm was stood in
    for by another; ``slope_interval`` as for ``kl``.
    """

    label: str
    weights: Weights | None = None
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    bytes: dict[Backend, int]
    sqnr_db: float
    kl: Annotated[float, Field(ge=0)]
    kl_interval: Annotated[tuple[float, float] | None, _LIST] = None
    exact_kl: Annotated[float, Field(ge=0)] | None = None
    slope: float | None = None
    slope_interval: Annotated[tuple[float, float] | None, _LIST] = None

    @property
    def best_kl(self) -> float:
        """``exact_kl`` where it was computed, else the estimate."""
        return self.kl if self.exact_kl is None else self.exact_kl

    @property
    def text_loss(self) -> float:
        """By how much the loss of texts like the analysed one grows, nats a token.

        To second order of one site alone, the divergence and the slope. Of a slope only what its
        interval vouches for counts (the positive part of James and Stein's estimate), since a
        choice among many candidates would else be one of the luckiest, and of that a part: errors
        that follow the slope together flatten it, and a model is not to be bent to one text.
        """
        if not self.slope:
            return self.best_kl
        sure = self.slope
        if self.slope_interval is not None:
            error = (self.slope_interval[1] - self.slope) / 1.96
            sure *= max(0.0, 1 - (error / self.slope) ** 2)
        return max(0.0, self.best_kl + _SLOPE_PART * sure)


class Site(Section):
    """One thing that is quantized.

    ``modules``: the paths of the modules whose override in a recipe decides it (none for a cache).
    ``role``: the last part of the path, such as ``down_proj``. ``values``: how many numbers it
    stores, 0 for an activation. ``agrees``: sites of one name here take the same candidate.
    """

    name: Annotated[str, Field(min_length=1)]
    kind: SiteKind
    modules: Annotated[tuple[str, ...], _LIST] = ()
    layer: int | None = None
    role: str
    shape: Annotated[tuple[int, ...], _LIST]
    values: Annotated[int, Field(ge=0)]
    agrees: str | None = None
    candidates: Annotated[tuple[Candidate, ...], Field(strict=False, min_length=1)]


class Analysis(Section):
    """What ``edgepass analyze`` writes.

    ``recipe``: what was asked for, from which allocations take all that they do not choose.
    ``identity``: digests of model, text and candidates, by name. ``patterns``: what the sites were
    chosen by, empty for all of the model's.
    """

    format: Literal["edgepass analysis 1"] = "edgepass analysis 1"
    model: str
    layers: int | None = None
    recipe: dict[str, Any]
    identity: dict[str, str]
    chunks: Annotated[int, Field(ge=1)]
    chunk_tokens: Annotated[int, Field(ge=2)]
    seed: int
    patterns: Annotated[tuple[str, ...], _LIST] = ()
    sites: Annotated[tuple[Site, ...], Field(strict=False, min_length=1)]


def read_analysis(path: str | os.PathLike[str]) -> Analysis:
    """Return the analysis in a file, or in a folder that ``edgepass analyze`` wrote.

    Raises InvalidArgumentError for one that cannot be read, is no JSON, or is of another format.
    """
    file = Path(path)
    if file.is_dir():
        file /= ANALYSIS
    place = f"analysis={file}"
    try:
        found = json.loads(file.read_text("utf-8"))
        return Analysis.model_validate(found)
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot read {place}: {error.strerror}; accepted are folders that edgepass analyze "
            "wrote"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidArgumentError(
            f"{place}: {where or 'the file'}: {first['msg']}; accepted is what edgepass analyze "
            "writes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{place}: {error}; accepted is JSON") from error


def format_analysis(analysis: Analysis) -> str:
    """Return the text of its file."""
    return json.dumps(analysis.model_dump(mode="json", exclude_none=True), indent=1) + "\n"
