"""An allocation as one page that needs no network: heat map, Pareto front, bit map, table."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from edgepass.calibration.analysis import Analysis, Site


def render_page(analysis: Analysis, result: dict[str, Any]) -> str:
    """The page of an analysis and of what ``edgepass allocate`` made of it, as HTML.

    All data stands in it as JSON, which its script writes into text nodes only. Needs jinja2.
    """
    from jinja2 import Environment

    source = files("edgepass").joinpath("allocation.html.jinja").read_text("utf-8")
    template = Environment(autoescape=True).from_string(source)
    data = {
        "by": result["by"],
        "chosen": {key: result[key] for key in ("bytes", "bits_per_weight", "kl", "loss", "gap")},
        "front": result["front"],
        "uniform": result["uniform"],
        "sites": [_row(site, result) for site in analysis.sites],
    }
    # A script element ends at the first "</": within JSON a slash may be escaped.
    text = json.dumps(data).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    return template.render(
        model=result["model"],
        backend=result["backend"],
        recipe=analysis.recipe.get("name", ""),
        megabytes=f"{result['bytes'] / 1e6:.2f}",
        bits=f"{result['bits_per_weight']:.3f}",
        kl=f"{result['kl']:.4g}",
        increase=f"{result['perplexity_increase']:+.1%}",
        least={"loss": "growth of the loss", "kl": "divergence"}[result["by"]],
        gap=f"{result['gap']:.1e}",
        tokens=analysis.chunks * analysis.chunk_tokens,
        data=text,
    )


def _row(site: Site, result: dict[str, Any]) -> dict[str, Any]:
    chosen = result["sites"].get(site.name)
    return {
        "name": site.name,
        "kind": site.kind,
        "layer": site.layer,
        "role": site.role,
        "values": site.values,
        "chosen": None if chosen is None else chosen["candidate"],
        "bytes": None if chosen is None else chosen["bytes"],
        "candidates": {
            c.label: {
                "kl": c.best_kl,
                "loss": None if c.slope is None else c.text_loss,
                "interval": c.kl_interval,
                "sqnr_db": c.sqnr_db,
            }
            for c in site.candidates
        },
    }
