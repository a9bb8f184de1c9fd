"""Recipe files: what is written is read again; whatever is wrong is one line with its place."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import (
    find_recipe,
    format_recipe,
    parse_recipe,
    read_recipe,
    write_recipe,
)
from edgepass.ops.errors import InvalidArgumentError, OutputError

SIZED = st.one_of(
    st.fixed_dictionaries({"granularity": st.sampled_from(["tensor", "channel"])}),
    st.fixed_dictionaries(
        {"granularity": st.just("group")}, optional={"group_size": st.integers(2, 512)}
    ),
    st.fixed_dictionaries(
        {"granularity": st.just("block")}, optional={"block_size": st.integers(2, 512)}
    ),
    st.just({}),
)
OTHER_WEIGHTS = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, "none"]),
        "mapping": st.sampled_from(["symmetric", "asymmetric", "float_offset"]),
        "algorithm": st.sampled_from(["rtn", "hqq", "mse", "seqmse", "gptq"]),
    },
)
WEIGHTS = st.builds(lambda sizes, others: {**sizes, **others}, SIZED, OTHER_WEIGHTS)
ACTIVATIONS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["dynamic", "static", "none"]),
        "bits": st.sampled_from([8, 16]),
        "granularity": st.sampled_from(["tensor", "token"]),
        "mapping": st.sampled_from(["symmetric", "asymmetric"]),
    },
)
OBSERVER = st.one_of(
    st.just({"kind": "min_max"}),
    st.fixed_dictionaries(
        {"kind": st.just("moving_average")}, optional={"constant": st.floats(0.001, 1)}
    ),
    st.fixed_dictionaries({"kind": st.just("histogram")}, optional={"bins": st.integers(16, 4096)}),
    st.fixed_dictionaries({"kind": st.just("percentile"), "percentile": st.floats(51, 100)}),
    st.fixed_dictionaries({"kind": st.just("mse")}, optional={"steps": st.integers(2, 500)}),
)
MODULE = {"weights": WEIGHTS, "activations": ACTIVATIONS, "observer": OBSERVER}
OVERRIDE = st.fixed_dictionaries(
    {"modules": st.text(min_size=1, max_size=20), "weights": st.just({"bits": 8})},
    optional={"activations": ACTIVATIONS, "observer": OBSERVER},
)
RECIPE = st.fixed_dictionaries(
    {"name": st.text(min_size=1, max_size=20)},
    optional={
        **MODULE,
        "backend": st.sampled_from(["xnnpack", "vulkan", "qnn"]),
        "embedding": WEIGHTS,
        "head": st.fixed_dictionaries({}, optional=MODULE),
        "kv_cache": st.sampled_from([{}, {"bits": 8}, {"bits": 16}, {"bits": "none"}]),
        "rotation": st.sampled_from(["none", "spinquant"]),
        "qat": st.booleans(),
        "overrides": st.lists(OVERRIDE, max_size=3),
    },
)


@given(RECIPE)
@example({"name": "\x85"})
@example({"name": "\u2028 größer"})
@settings(max_examples=60)
def test_what_is_written_is_read_again(asked: dict) -> None:
    # A size may stand with a granularity that another section changes: such recipes are refused.
    try:
        recipe = Recipe.model_validate(asked)
    except ValueError as error:
        assert "_size=" in str(error)
        return
    assert parse_recipe(format_recipe(recipe)) == recipe
    assert parse_recipe(format_recipe(recipe, as_json=True), is_json=True) == recipe


@given(st.sampled_from(["weights", "activations", "kv_cache", "head"]), st.text(min_size=1))
@settings(max_examples=40)
def test_no_unknown_key_is_taken(section: str, key: str) -> None:
    known = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    if key not in known:
        with pytest.raises(InvalidArgumentError, match="unknown key") as caught:
            parse_recipe(json.dumps({"name": "x", section: {key: 4}}), is_json=True)
        assert "\n" not in str(caught.value)


WRONG = [
    ("weigths: {bits: 4}", "unknown key 'weigths', did you mean 'weights'?"),
    ("weights: {group_siz: 9}", "weights: unknown key 'group_siz', did you mean 'group_size'?"),
    ("weights: {bits: 9}", "got weights.bits=9, accepted are 2, 3, 4, 5, 6, 7, 8, 16 or none"),
    ("weights: {bits: true}", "got weights.bits=True, accepted are 2"),
    ("weights: {bits: 4.0}", "got weights.bits=4.0, accepted are 2"),
    ("weights: {bits: '4'}", "got weights.bits='4', accepted are 2"),
    (
        "weights: {group_size: 1}",
        "got weights.group_size=1, accepted is greater than or equal to 2",
    ),
    ("weights: {group_size: 32.0}", "got weights.group_size=32.0, accepted is a valid integer"),
    ("weights: {granularity: row}", "weights.granularity='row', accepted are 'tensor', 'channel'"),
    (
        "weights: {granularity: channel, group_size: 32}",
        "weights: got group_size=32 with granularity=channel, accepted is granularity=group",
    ),
    (
        "overrides: [{modules: a, weights: {block_size: 32}}]",
        "overrides.0: got block_size=32 with granularity=group, accepted is granularity=block",
    ),
    ("overrides: [{modules: a}]", "overrides.0: asks for nothing, accepted are weights"),
    ("overrides: [{weights: {bits: 4}}]", "no overrides.0.modules, which a recipe needs"),
    ("overrides: {a: b}", "got overrides={'a': 'b'}"),
    ("activations: {bits: 4}", "got activations.bits=4, accepted are 8 or 16"),
    ("observer: {kind: median}", "observer={'kind': 'median'}, accepted are 'min_max', 'moving"),
    ("observer: {}", "got observer={}, accepted is a mapping with a kind"),
    ("observer: {kind: mse, stps: 3}", "observer.mse: unknown key 'stps', did you mean 'steps'?"),
    ("backend: coreml", "got backend='coreml', accepted are 'xnnpack', 'vulkan' or 'qnn'"),
    ("name: y", "the key 'name' is there twice"),
    ("weights: !!python/object:os.system {}", "could not determine a constructor for the tag"),
    ("weights: {bits: 4", "accepted is YAML"),
    ("? [a]\n: 3", "found unhashable key"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_recipe(f"name: x\n{text}", "recipe=mine.yaml")
    assert str(caught.value).startswith("recipe=mine.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got None, accepted is a mapping"),
        ("- a", "got ['a'], accepted is a mapping"),
        ("weights: {}", "no name, which a recipe needs"),
        ("[" * 100_000, "nested too deeply; accepted is YAML"),
        ("&a [*a]", "accepted is a mapping"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_recipe(text)
    assert message in str(caught.value)


def test_json_with_a_key_twice_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match="the key 'bits' is there twice; accepted is JSON"
    ):
        parse_recipe('{"name": "x", "weights": {"bits": 4, "bits": 8}}', is_json=True)


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.yml", "recipe.json"])
def test_a_file_is_found_by_its_path(tmp_path, name: str) -> None:
    recipe = find_recipe("16a4w_block").changed(name="mine")
    path = write_recipe(recipe, tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert find_recipe(str(path)) == find_recipe(path) == read_recipe(path) == recipe
    assert path.read_text().startswith("{") == name.endswith("json")


def test_a_file_that_cannot_be_read_is_refused(tmp_path) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"cannot read recipe=\S+none.yaml: No such file"
    ):
        find_recipe(tmp_path / "none.yaml")
    with pytest.raises(InvalidArgumentError, match="Is a directory"):
        find_recipe(tmp_path)
    foreign = tmp_path / "foreign.yaml"
    foreign.write_bytes("name: gr\xf6\xdfe".encode("latin-1"))
    with pytest.raises(InvalidArgumentError, match="got byte 0xf6 at 8, accepted is UTF-8"):
        find_recipe(foreign)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(OutputError, match="cannot write recipe="):
        write_recipe(find_recipe("8da4w"), tmp_path / "folder.yaml")
    with pytest.raises(OutputError, match="No such file"):
        write_recipe(find_recipe("8da4w"), tmp_path / "no" / "recipe.yaml")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.yaml"]
