"""Kept forms of weights: found again, noticed when stale, gone with their weight, bounded."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from edgepass.ops import reference, set_weight_cache_limit
from edgepass.ops.errors import InvalidArgumentError
from edgepass.ops.weight_cache import DEFAULT_LIMIT, WeightCache, keep_no_forms, weight_cache
from tests.ops.cases import Weight, make_tokens, make_weight, sqnr_db

linear = torch.ops.edgepass.linear_qga4w
K, N = 640, 400


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    weight_cache.clear()
    yield
    set_weight_cache_limit(DEFAULT_LIMIT)


def tokens(rows: int) -> Tensor:
    return make_tokens((rows, K), torch.float32, rows)


def assert_right(weight: Weight, rows: int = 1) -> None:
    exact = reference.linear_qga4w(tokens(rows), *weight.arguments())
    assert sqnr_db(exact, linear(tokens(rows), *weight.arguments())) >= 120


def test_a_form_is_made_once() -> None:
    weight = make_weight(N, K // 32, 32)
    entry = weight_cache.find(weight.packed, weight.scales, weight.zeros, 32)
    assert_right(weight)
    forms = dict(entry.forms)
    assert_right(weight)
    assert [entry.forms[key] is form for key, form in forms.items()] == [True]


@pytest.mark.parametrize("name", ["packed", "scales", "zeros"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_write_is_noticed(name: str, rows: int) -> None:
    weight = make_weight(N, K // 32, 32)
    assert_right(weight, rows)
    getattr(weight, name)[3:7].fill_(3)
    assert_right(weight, rows)


def test_other_scales_of_one_packed_tensor() -> None:
    weight = make_weight(N, K // 32, 32)
    other = Weight(weight.values, weight.packed, 32, weight.scales * 2, weight.zeros, None)
    for each in (weight, other, weight):
        assert_right(each)
        assert_right(each, 5)


def test_another_group_size_of_one_packed_tensor() -> None:
    weight = make_weight(N, 4, K // 4)
    scales, zeros = (part.repeat_interleave(2, 1) for part in (weight.scales, weight.zeros))
    assert_right(weight)
    assert_right(Weight(weight.values, weight.packed, K // 8, scales, zeros, None))


def test_equal_scales_in_a_new_tensor_keep_the_form() -> None:
    weight = make_weight(N, K // 32, 32)
    assert_right(weight)
    kept = weight_cache.find(weight.packed, weight.scales, weight.zeros, 32)
    assert weight_cache.find(weight.packed, weight.scales.clone(), weight.zeros, 32) is kept


def test_numbers_of_tokens_in_any_order() -> None:
    weight = make_weight(N, K // 32, 32, bias=True)
    for rows in (5, 5, 1, 6, 7, 7, 5, 1, 6, 6):
        assert_right(weight, rows)


def test_forms_die_with_their_weight() -> None:
    weight = make_weight(N, K // 32, 32)
    assert_right(weight)
    assert weight_cache.nbytes() == N * K * 4
    del weight
    gc.collect()
    assert weight_cache.nbytes() == 0


def test_the_limit_bounds_the_forms_and_not_the_numbers() -> None:
    set_weight_cache_limit(N * K * 4)
    pair = [make_weight(N, K // 32, 32, seed=seed) for seed in (0, 1)]
    for weight in (*pair, *pair):
        for rows in (1, 5, 5, 6):
            assert_right(weight, rows)
            assert weight_cache.nbytes() <= N * K * 4


def test_one_token_and_many_have_a_form_each_where_there_is_room() -> None:
    weight = make_weight(N, K // 32, 32)
    for rows in (5, 1, 6, 1):
        assert_right(weight, rows)
    assert weight_cache.nbytes() == 2 * N * K * 4


def test_the_latest_form_of_a_weight_takes_the_place_of_the_other() -> None:
    set_weight_cache_limit(N * K * 4)
    weight = make_weight(N, K // 32, 32)
    entry = weight_cache.find(weight.packed, weight.scales, weight.zeros, 32)
    for rows, kinds in ((5, ["blocks"]), (1, ["token"]), (6, ["blocks"])):
        assert_right(weight, rows)
        assert list(entry.forms) == kinds
    other = make_weight(N, K // 32, 32, seed=1)
    assert_right(other)
    assert list(entry.forms) == ["blocks"]


def test_no_new_form_drops_no_kept_one() -> None:
    weight = make_weight(N, K // 32, 32)
    entry = weight_cache.find(weight.packed, weight.scales, weight.zeros, 32)
    assert_right(weight, 5)
    with keep_no_forms():
        assert_right(weight, 1)
    assert list(entry.forms) == ["blocks"]


def test_a_limit_of_nothing_keeps_nothing() -> None:
    set_weight_cache_limit(0)
    assert_right(make_weight(N, K // 32, 32))
    assert weight_cache.nbytes() == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="got nbytes=-1; expected 0 or more"):
        set_weight_cache_limit(-1)


def test_inference_tensors_are_not_kept() -> None:
    with torch.inference_mode():
        weight = make_weight(N, K // 32, 32)
        assert_right(weight)
        weight.packed[2].fill_(0)
        assert_right(weight)
        assert_right(weight, 5)
    assert weight_cache.nbytes() == 0


def test_a_form_made_under_inference_mode_serves_outside() -> None:
    weight = make_weight(N, K // 32, 32)
    with torch.inference_mode():
        assert_right(weight)
        assert_right(weight, 5)
    assert_right(weight)
    assert_right(weight, 5)


def test_a_recycled_identity_is_not_taken_for_the_old_weight() -> None:
    cache = WeightCache()
    first = make_weight(4, 2, 8)
    entry = cache.find(first.packed, first.scales, first.zeros, 8)
    key = id(first.packed)
    second = make_weight(4, 2, 8, seed=1)
    cache._entries[id(second.packed)] = cache._entries.pop(key)
    assert cache.find(second.packed, second.scales, second.zeros, 8) is not entry


def test_threads_share_a_weight() -> None:
    weight = make_weight(N, K // 32, 32)
    exact = {rows: reference.linear_qga4w(tokens(rows), *weight.arguments()) for rows in (1, 3, 9)}
    wrong = []

    def work(rows: int) -> None:
        for _ in range(20):
            if sqnr_db(exact[rows], linear(tokens(rows), *weight.arguments())) < 120:
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 3, 9, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
