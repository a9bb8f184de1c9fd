"""Blocks by the ends of modules' paths; what names nothing or does not divide is refused."""

import pytest

from edgepass.lowering.qnn_block_sizes import BlockSizes, check_blocks, read_block_sizes
from edgepass.lowering.qnn_recipes import find_qnn_recipe
from edgepass.ops.errors import InvalidArgumentError

PATHS = [f"decoder.model.layers.{i}.mlp.{name}" for i in (0, 10) for name in ("up_proj", "o_proj")]


@pytest.mark.parametrize(
    ("others", "sizes"),
    [
        ({}, [32, 32, 32, 32]),
        ({"up_proj": 64}, [64, 32, 64, 32]),
        ({"proj": 64, "*proj": 16}, [16, 16, 16, 16]),
        ({"layers.0.*": 64}, [64, 64, 32, 32]),
        ({"layers.0.*": 64, "up_proj": 16}, [16, 64, 16, 32]),
        ({"0.mlp.o_proj": 64}, [32, 64, 32, 32]),
        ({PATHS[3]: 16}, [32, 32, 32, 16]),
    ],
)
def test_a_key_is_the_end_of_a_path_and_the_last_counts(others, sizes) -> None:
    assert [BlockSizes(32, others).of(path, 128) for path in PATHS] == sizes


@pytest.mark.parametrize("size", [0, 48, 256])
def test_a_size_that_does_not_divide_is_refused(size) -> None:
    with pytest.raises(InvalidArgumentError, match=f"got block_size={size}, which does not divide"):
        BlockSizes(32, {"up_proj": size}).of(PATHS[0], 128)


@pytest.mark.parametrize(
    ("width", "wrong", "accepted"),
    [
        (576, 64, "16, 32, 96, 192, 288, 576"),
        (1536, 192, "16, 32, 64, 96, 128, 256, 384, 512, 768, 1536"),
        (512, 8, "16, 32, 128, 256, 512"),
        (288, 48, "16, 32, 96, 288"),
        (112, 16, "112"),
        (100, 50, "100"),
    ],
)
def test_blocks_that_htp_computes_wrong_are_refused(width, wrong, accepted) -> None:
    message = f"got block_size={wrong}, which HTP computes wrong for the {width} input features of "
    with pytest.raises(InvalidArgumentError, match=f"{message}.*; accepted are {accepted}$"):
        BlockSizes(wrong, {}).of(PATHS[0], width)
    for size in map(int, accepted.split(", ")):
        assert BlockSizes(size, {}).of(PATHS[0], width) == size


def test_a_name_of_no_module_is_refused() -> None:
    BlockSizes(32, {"up_proj": 64, "layers.10.*": 8}).check_used(PATHS)
    with pytest.raises(InvalidArgumentError, match=r"block_size=64 for p_proj, .*o_proj, up_proj"):
        BlockSizes(32, {"p_proj": 64}).check_used(PATHS)


def test_a_recipe_without_blocks_takes_none() -> None:
    check_blocks(find_qnn_recipe("16a4w_block"), 64, {"up_proj": 16})
    check_blocks(find_qnn_recipe("16a4w"), None, {})
    for size, others in ((64, {}), (None, {"up_proj": 64})):
        with pytest.raises(InvalidArgumentError, match=r"got block_size=64 for recipe=16a4w, "):
            check_blocks(find_qnn_recipe("16a4w"), size, others)


def test_the_command_line_s_form() -> None:
    given = ["up_proj=64", "layers.0.*=16", "up_proj=8"]
    assert list(read_block_sizes(given).items()) == [("layers.0.*", 16), ("up_proj", 8)]


@pytest.mark.parametrize("given", ["up_proj", "=64", "up_proj=", "up_proj=-2", "up_proj=6.4"])
def test_another_form_is_refused(given) -> None:
    with pytest.raises(InvalidArgumentError, match=f"unknown block size: got .*={given}, "):
        read_block_sizes([given])
