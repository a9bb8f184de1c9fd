"""AIMET's JSON, version 1.0.0: the exact inverse, known entries, and strict refusals."""

import copy
import json

import pytest
import torch
from hypothesis import given

from edgepass.ops.encodings import Encoding, EncodingTable
from edgepass.ops.encodings_file import (
    from_document,
    read_encodings_file,
    split_block_scales,
    to_document,
    write_encodings_file,
)
from edgepass.ops.errors import EncodingError, OutputError
from tests.ops.encoding_cases import (
    ACTIVATION_RANGES,
    PARAMETER_RANGES,
    block_encodings,
    encodings,
    tensor_encoding,
)

BLOCKS = Encoding(
    torch.tensor([[1.0, 16.0], [0.5, 8.0]]), torch.zeros(2, 2), -7, 7, axis=0, block=32
)
TABLE = EncodingTable(
    {"layers.0/matmul#0.output": tensor_encoding(0.5, 128), "tokens": tensor_encoding(2.0, 0)},
    {
        "head.weight": Encoding(torch.tensor([1.0, 2.0]), torch.zeros(2), -127, 127, axis=0),
        "proj.weight": BLOCKS,
    },
)


@given(encodings(ACTIVATION_RANGES), encodings(PARAMETER_RANGES), block_encodings())
def test_what_is_written_is_read_again(activation, parameter, block) -> None:
    table = EncodingTable({"a": activation}, {"p": parameter, "b": block})
    read = from_document(json.loads(json.dumps(to_document(table))))
    assert table.diff(read) == []
    assert list(read.activations) == ["a"] and list(read.parameters) == ["p", "b"]


def test_known_entries() -> None:
    document = to_document(TABLE)
    assert document["activation_encodings"][0] == {
        "name": "layers.0/matmul#0.output",
        "enc_type": "PER_TENSOR",
        "dtype": "INT",
        "bw": 8,
        "is_sym": False,
        "scale": [0.5],
        "offset": [-128],
    }
    channels, blocks = document["param_encodings"]
    assert (channels["enc_type"], channels["bw"], channels["is_sym"]) == ("PER_CHANNEL", 8, True)
    assert channels["offset"] == [-128, -128]
    assert blocks == {
        "name": "proj.weight",
        "enc_type": "LPBQ",
        "dtype": "INT",
        "bw": 8,
        "compressed_bw": 4,
        "is_sym": True,
        "block_size": 32,
        "scale": [1.0, 0.5],
        "offset": [-128, -128],
        "per_block_int_scale": [1, 16, 1, 16],
    }


def test_one_block_a_row_is_read_as_one_scale_a_channel() -> None:
    document = to_document(TABLE)
    document["param_encodings"][1] |= {"block_size": 64, "per_block_int_scale": [1, 16]}
    channels = Encoding(torch.tensor([1.0, 8.0]), torch.zeros(2), -7, 7, axis=0)
    assert from_document(document).parameters["proj.weight"].difference(channels) == 0


def test_a_file_appears_whole(tmp_path) -> None:
    path = tmp_path / "encodings.json"
    write_encodings_file(path, TABLE)
    assert read_encodings_file(path).diff(TABLE) == []
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_it_as_any_file(tmp_path) -> None:
    write_encodings_file(tmp_path / "encodings.json", TABLE)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_encodings_file(tmp_path / "encodings.json", TABLE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(OutputError, match="absent"):
        write_encodings_file(tmp_path / "absent" / "encodings.json", TABLE)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding(torch.ones(2), torch.zeros(2), -7, 7, axis=1), "got axis=1"),
        (tensor_encoding(1.0, 0, (-100, 127)), "got a range of -100 to 127"),
        (
            Encoding(torch.tensor([[1.0, 0.77]]), torch.zeros(1, 2), -7, 7, axis=0, block=8),
            "got block scales that are no multiples of 1 to 16",
        ),
    ],
)
def test_what_the_format_cannot_say_is_refused(encoding, message) -> None:
    with pytest.raises(EncodingError, match=f"w has no AIMET form: {message}"):
        to_document(EncodingTable({}, {"w": encoding}))


def _entry(document, section=1, index=0):
    return document[("activation_encodings", "param_encodings")[section]][index]


DAMAGES = {
    "got version='0.6.1'": lambda d: d.update(version="0.6.1"),
    "the file: got the unknown key 'more'": lambda d: d.update(more=1),
    "the file: got no 'param_encodings'": lambda d: d.pop("param_encodings"),
    "malformed param_encodings": lambda d: d.update(param_encodings={}),
    "without a name": lambda d: _entry(d).pop("name"),
    "head.weight: got the unknown key 'axis'": lambda d: _entry(d).update(axis=1),
    "head.weight: got no 'scale'": lambda d: _entry(d).pop("scale"),
    "head.weight: got enc_type='VECTOR'": lambda d: _entry(d).update(enc_type="VECTOR"),
    "head.weight: got dtype='FP'": lambda d: _entry(d).update(dtype="FP"),
    "head.weight: got is_sym=1": lambda d: _entry(d).update(is_sym=1),
    "head.weight: got nan in scale": lambda d: _entry(d).update(scale=[1.0, float("nan")]),
    "head.weight: got True in scale": lambda d: _entry(d).update(scale=[1.0, True]),
    "head.weight: got scale=-1.0": lambda d: _entry(d).update(scale=[1.0, -1.0]),
    "head.weight: got 2 values of offset, accepted are 3": lambda d: _entry(d).update(
        scale=[1.0, 2.0, 3.0]
    ),
    "head.weight: got scale of no values": lambda d: _entry(d).update(scale=[]),
    "head.weight: got bw=True": lambda d: _entry(d).update(bw=True),
    "head.weight: got 5 bits": lambda d: _entry(d).update(bw=5),
    "head.weight: got an offset that is not whole": lambda d: _entry(d).update(offset=[0.5, 0]),
    "proj.weight: got 3 values of per_block_int_scale": lambda d: _entry(d, 1, 1).update(
        per_block_int_scale=[1, 2, 3]
    ),
    "proj.weight: got 4 values of per_block_int_scale": lambda d: _entry(d, 1, 1).update(
        per_block_int_scale=[1, 2, 3, 17]
    ),
    "tokens: got 2 values of scale, accepted are 1": lambda d: _entry(d, 0, 1).update(
        scale=[1.0, 1.0]
    ),
    "tokens: got zero_point=300": lambda d: _entry(d, 0, 1).update(offset=[-300]),
    "got tokens twice": lambda d: _entry(d, 0, 0).update(name="tokens"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_refused_by_the_name_of_the_key(message, tmp_path) -> None:
    document = copy.deepcopy(to_document(TABLE))
    DAMAGES[message](document)
    path = tmp_path / "encodings.json"
    path.write_text(json.dumps(document))
    with pytest.raises(EncodingError) as caught:
        read_encodings_file(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]"])
def test_what_is_no_such_file_is_refused(text, tmp_path) -> None:
    path = tmp_path / "encodings.json"
    path.write_text(text)
    with pytest.raises(EncodingError, match=str(path)):
        read_encodings_file(path)


@given(block_encodings())
def test_splitting_block_scales_is_the_inverse_of_their_product(encoding) -> None:
    channel, counts = split_block_scales(encoding.scale)
    torch.testing.assert_close(channel[:, None] * counts, encoding.scale, rtol=1e-6, atol=0)
