"""The shape kernels that stock lacks: still lacking, and of the reference's shapes."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from edgepass.lowering.vulkan_kernels import MISSING_META_KERNELS

_LIST_STOCK_KERNELS = """
import torch, executorch.backends.vulkan.custom_ops_lib
for name in {names}:
    if torch._C._dispatch_has_kernel_for_dispatch_key("et_vk::" + name, "Meta"):
        print(name)
"""


def test_stock_has_none_of_them() -> None:
    """When this fails, stock has gained a kernel: remove ours from vulkan_kernels.py."""
    script = _LIST_STOCK_KERNELS.format(names=list(MISSING_META_KERNELS))
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def arguments(name: str, half: bool) -> tuple[object, ...]:
    dtype = torch.float16 if half else torch.float32
    x, packed = torch.ones(1, 3, 64, dtype=dtype), torch.zeros(24, 32, dtype=torch.uint8)
    scales, sums = torch.ones(2, 24, dtype=dtype), torch.zeros(2, 24, dtype=torch.int32)
    token = torch.ones(1, 3, dtype=dtype)
    zero = torch.zeros(1, 3, dtype=torch.int8)
    q, k = torch.ones(1, 3, 4, 16, dtype=dtype), torch.ones(1, 3, 2, 16, dtype=dtype)
    angles = torch.ones(8, 16, dtype=dtype)
    ids = torch.tensor([[1, 2, 3]])
    return {
        "linear_q4gsw": (x, packed, scales, 32),
        "linear_dq8ca_q4gsw": (x, token, zero, packed, sums, scales, 32),
        "embedding_q4gsw": (packed, torch.ones(24, 2), 32, ids, True),
        "rms_norm": (x, torch.ones(64, dtype=dtype), 1e-5),
        "apply_rotary_emb": (q, k, angles[:3, :8], angles[:3, :8]),
        "apply_rotary_emb_hf": (q, k, angles, angles, 2),
    }[name]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MISSING_META_KERNELS)
def test_shapes_are_those_of_the_reference(name: str, half: bool) -> None:
    operator = getattr(torch.ops.et_vk, name).default
    if half and "linear" in name:
        pytest.skip("the reference dequantizes to float32 and cannot multiply halves")
    real = operator(*arguments(name, half))
    with FakeTensorMode() as mode:
        inputs = arguments(name, half)
        fake = operator(*inputs)
    assert mode is not None
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True)
    assert all(r.shape == f.shape and r.dtype == f.dtype for r, f in pairs)
