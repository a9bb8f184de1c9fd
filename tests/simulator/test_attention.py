"""Attention with caches, against torch's own in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepass.ops.errors import InvalidArgumentError, SimulatorError
from edgepass.simulator.attention import FLOAT, HALF_STORED, HALF_SUMS, Precision, attend
from edgepass.simulator.delegate import Delegate
from tests.simulator.graphs import activation, constant, one_call

CONTEXT, HEADS, KV_HEADS, WIDTH = 12, 4, 2, 8


def expected(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Of ``[1, S, H, D]`` with ``[1, rows, Hkv, D]``, by an explicit mask."""
    q, keys, values = (x.double().transpose(1, 2) for x in (q, keys, values))
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    tokens, rows = q.shape[2], keys.shape[2]
    mask = torch.arange(rows)[None] <= start + torch.arange(tokens)[:, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)


def cached(**changes: object) -> Delegate:
    cache = constant(torch.full((1, CONTEXT, KV_HEADS, WIDTH), math.nan))
    options = {"mask": None, "dropout": 0.0, "causal": True, "scale": None} | changes
    return one_call(
        "sdpa_with_kv_cache.default",
        [
            activation(1, 8, HEADS, WIDTH),
            activation(1, 8, KV_HEADS, WIDTH),
            activation(1, 8, KV_HEADS, WIDTH),
            *(cache, cache, 3, 1, *options.values()),
        ],
        activation(1, 8, HEADS, WIDTH),
    )


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 7), (5, 0), (4, 6)])
def test_attend_is_causal_from_the_position_on(tokens: int, start: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(1, tokens, HEADS, WIDTH, generator=generator)
    keys, values = torch.randn(2, 1, CONTEXT, KV_HEADS, WIDTH, generator=generator)
    keys[:, start + tokens :] = math.nan  # rows behind the last token are not read
    values[:, start + tokens :] = math.nan
    found = attend(q, keys, values, start)
    wanted = expected(q, *(x[:, : start + tokens] for x in (keys, values)), start)
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("precision", [HALF_STORED, HALF_SUMS])
@pytest.mark.parametrize("tokens", [1, 4])
def test_half_rounds_scores_and_weights(precision: Precision, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, tokens, HEADS, WIDTH, generator=generator)
    keys, values = torch.randn(2, 1, CONTEXT, KV_HEADS, WIDTH, generator=generator)
    found, exact = (attend(q, keys, values, 5, kind) for kind in (precision, FLOAT))
    assert 0 < (found - exact).abs().max() < 1e-2


def test_the_position_is_the_programs() -> None:
    delegate = cached()
    q, k, v = (torch.randn(1, 2, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    found = delegate.run([q, k, v])[0]
    # Rows 0 to 2 were never written: the simulator starts them as zeros.
    before = torch.zeros(1, 3, KV_HEADS, WIDTH)
    keys, values = (torch.cat((before, x), 1) for x in (k, v))
    assert (found - expected(q, keys, values, 3)).abs().max() < 1e-5
    with pytest.raises(InvalidArgumentError, match="outside the cache: got position=3 with 10"):
        delegate.steps[0].kernel(*(torch.randn(1, 10, h, WIDTH) for h in (4, 2, 2)), None, None, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": 0.5}, "scale=0.5, accepted is None"),
        ({"causal": False}, "causal=False, accepted is True"),
        ({"dropout": 0.5}, "dropout=0.5, accepted is 0.0"),
    ],
)
def test_what_the_runtime_refuses_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(SimulatorError, match=words):
        cached(**changes)


def test_update_cache_writes_its_argument_in_place() -> None:
    delegate = one_call(
        "update_cache.default",
        [activation(1, 4, 1, 4), activation(1, CONTEXT, 1, 4), 5],
        activation(1, CONTEXT, 1, 4),
    )
    cache = torch.zeros(1, CONTEXT, 1, 4)
    found = delegate.run([torch.ones(1, 3, 1, 4), cache])[0]
    assert found[0, :, 0, 0].tolist() == [0.0] * 5 + [1.0] * 3 + [0.0] * 4
    assert not cache.any()  # the caller's tensor is copied at the delegate's border
