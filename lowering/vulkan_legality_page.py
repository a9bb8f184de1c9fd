"""The page ``docs/vulkan-legality.md``: ``python -m edgepass.lowering.vulkan_legality_page``."""

from __future__ import annotations

from itertools import groupby

from edgepass.lowering.vulkan_legality import TABLE, Row

_HEAD = """# What the Vulkan runtime computes right

Made from `lowering/vulkan_legality.py` by `python -m edgepass.lowering.vulkan_legality_page`.
Outside these values the runtime gives wrong numbers without an error, or ends the process. edgepass
rewrites what it can into these forms, exactly; what it cannot stays outside the delegate, and
`edgepass explain --backend vulkan` gives the reason.

| a linear with | becomes |
|---|---|
| long groups (96, 100, 256, 512, a whole row) | equal legal groups with repeated scales |
| groups that no legal size divides (50, 7) | groups padded with columns of zeros |
| output features that are no multiple of 8 | padded rows, and a slice of the result |
| a batch, or one token without a batch | one matrix, and a view of the result |
| zero points | a weight without them if it fits, else a correction by the activation's group sums |
| small activations in float32 | activations times a power of two, weight scales divided by it |
| scales of another dtype than the activation | scales in the wider of the two |
| a bias in float16 | an addition |
| bfloat16 | float32 inside, casts outside the delegate |

Zero points: with the activation as the kernel sees it, `sum_g s_g sum_k x_k (w_k - z_g)` is the
symmetric kernel's result less `sum_g s_g z_g sum_k x_k`. The group sums come from the same kernel
and the same encodings, so that they are right both for several tokens, whose activation it
quantizes, and for one, whose activation it reads as floats.

Eight-bit weights, and five and six, stay float linears (inside a delegate where their weight is
constant), with unfused quantization of the activation in plain operators outside. The runtime has
three linears of int8 weights, and none means what the modules do: `et_vk.linear_q8ta_q8csw` and
`et_vk.q8ta_linear` take one scale of the whole activation, a number known when the program is
written, where torchao's and PT2E's dynamic quantization choose a scale for each token or call;
its dynamic form refuses all but four bits (`VK_CHECK_COND(nbits == 4)`). `et_vk.linear_q8csw`
would compute weight-only int8 by channels, but stock 1.5.1 has neither its schema nor a row in its
table, and it was not tried on a device.

A number of tokens and a batch that are both dynamic are declined: flattening them to one matrix and
restoring them takes a view of two dynamic sizes, of which the runtime infers one. The report and
`explain` give that reason.

One token: programs quantize the activation, the runtime does not. A reference for one token is
weight-only.
"""


def render() -> str:
    """Return the page, a table for each operator and a column for each runtime."""
    runtimes = list(TABLE[0].accepted)
    tables = [
        _table(operator, list(rows), runtimes)
        for operator, rows in groupby(TABLE, key=lambda row: row.operator)
    ]
    return "\n".join([_HEAD, *tables])


def _table(operator: str, rows: list[Row], runtimes: list[str]) -> str:
    lines = [
        f"## {operator}\n",
        f"| quantity | {' | '.join(runtimes)} | because |",
        "|---" * (len(runtimes) + 2) + "|",
    ]
    for row in rows:
        accepted = " | ".join(str(row.accepted[runtime]) for runtime in runtimes)
        lines.append(f"| {row.quantity} | {accepted} | {row.reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
