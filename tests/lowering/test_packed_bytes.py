"""The bytes that an analysis gives a candidate against those of programs with it."""

import pytest
import torch

from edgepass.calibration.candidates import packed_bytes
from edgepass.calibration.recipe_file import parse_recipe
from edgepass.calibration.recipe_resolution import WeightSpec
from edgepass.calibration.recipes import quantize_model
from edgepass.calibration.sites import SitePlace
from edgepass.lowering.lower import lower

N, K = 1024, 576
BASE = WeightSpec(4, "group", 32)


def program_bytes(spec: WeightSpec, backend: str) -> int:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False)).eval()
    size = "" if spec.group_size is None else f", group_size: {spec.group_size}"
    weights = f"{{bits: {spec.bits}, granularity: {spec.granularity}{size}}}"
    text = f"{{name: x, weights: {weights}, activations: {{kind: dynamic}}}}"
    quantize_model(module, parse_recipe(text))
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(3, K),))
    result = lower(program, backend=backend)
    assert result.report["linears"]["fused"] == 1
    return len(result.buffer)


@pytest.mark.parametrize(
    ("backend", "spec"),
    [
        ("xnnpack", WeightSpec(4, "group", 64)),
        ("xnnpack", WeightSpec(4, "group", 192)),
        ("xnnpack", WeightSpec(4, "channel", None)),
        ("xnnpack", WeightSpec(8, "channel", None)),
        ("vulkan", WeightSpec(4, "group", 16)),
        ("vulkan", WeightSpec(4, "group", 64)),
        ("vulkan", WeightSpec(4, "group", 192)),
        ("vulkan", WeightSpec(4, "channel", None)),
    ],
)
def test_bytes_are_those_of_the_program(backend: str, spec: WeightSpec) -> None:
    site = SitePlace("0", "weight", "0", "0", (N, K), ("0",))
    told = packed_bytes(backend, site, spec) - packed_bytes(backend, site, BASE)
    found = program_bytes(spec, backend) - program_bytes(BASE, backend)
    # Constants are aligned, headers differ by a few bytes; scales of another width would be 2 kB.
    assert abs(found - told) <= 512, (found, told)
