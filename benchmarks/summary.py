"""Print one table over folders that ``edgepass lower`` wrote.

python benchmarks/summary.py out/xnnpack out/vulkan
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measuring import table

HEADER = ["backend", "recipe", "linears fused", "delegates", ".pte MB", "lowering s", "peak MB"]


def row(report: dict[str, Any]) -> list[object]:
    """Return the cells of one ``report.json``."""
    linears, stages = report["linears"], report["stages"]
    return [
        report["backend"],
        report["recipe"],
        f"{linears['fused']} of {linears['total']}",
        sum(report["delegates"].values()),
        report["pte_bytes"] / 1e6,
        sum(stage["seconds"] for stage in stages),
        max(stage["peak_rss_bytes"] for stage in stages) / 1e6,
    ]


def main() -> None:
    reports = [json.loads((Path(folder) / "report.json").read_text()) for folder in sys.argv[1:]]
    print(table(HEADER, [row(report) for report in reports]))


if __name__ == "__main__":
    main()
