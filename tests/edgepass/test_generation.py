"""Generation on the stock runtime: right tokens, right ends, and bounds that the runtime lacks."""

import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgepass.generation import LoweredDecoder, generate
from edgepass.ops.errors import InvalidArgumentError, ProgramError
from tests.edgepass.conftest import CONTEXT
from tests.models.tiny_models import tiny_tokenizer


class Counter:
    """A decoder of 96 tokens that always continues with the next id, and remembers its calls."""

    def __init__(self, context: int = CONTEXT, end_tokens: tuple[int, ...] = ()) -> None:
        self.context, self.report = context, {"end_tokens": list(end_tokens)}
        self.calls: list[tuple[list[int], int]] = []

    def __call__(self, tokens: list[int], position: int) -> torch.Tensor:
        self.calls.append((tokens, position))
        assert position + len(tokens) <= self.context
        return torch.nn.functional.one_hot(torch.tensor((tokens[-1] + 1) % 96), 96).float()

    def prefill(self, tokens: list[int], chunk: int) -> torch.Tensor:
        return [self(tokens[i : i + chunk], i) for i in range(0, len(tokens), chunk)][-1]


@pytest.fixture(scope="module")
def decoder(lowered) -> LoweredDecoder:
    return LoweredDecoder(lowered.folder)


def signal_to_noise_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


def test_logits_are_those_of_the_eager_model(lowered, decoder) -> None:
    tokens = list(range(10, 30))
    expected = lowered.eager(torch.tensor([tokens])).logits[0]
    decoder.prefill(tokens[:5])
    found = torch.stack([decoder([t], i).clone() for i, t in enumerate(tokens[5:], 5)])
    # XNNPACK keeps its scales in bfloat16: 29 to 41 dB a linear.
    assert signal_to_noise_db(found, expected[5:]) > 25


def test_a_run_leaves_the_threads_of_torch_as_they_were(decoder) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        decoder([1], 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@given(st.integers(1, CONTEXT), st.integers(1, 40))
@settings(max_examples=10)
def test_prefill_gives_the_same_in_any_chunks(decoder, count: int, chunk: int) -> None:
    tokens = [(7 * i) % 96 for i in range(count)]
    at_once = decoder.prefill(tokens, CONTEXT).clone()
    assert signal_to_noise_db(decoder.prefill(tokens, chunk), at_once) > 80


def test_generates_the_likeliest_token_each_time(lowered, decoder) -> None:
    result = generate(decoder, lowered.tokenizer, "Hello", 8)
    ids = lowered.tokenizer("Hello")["input_ids"]
    for _ in range(result.generated_tokens):
        ids.append(int(decoder.prefill(ids).argmax()))
    assert result.text == lowered.tokenizer.decode(ids[-8:], skip_special_tokens=True)
    assert result.prompt_tokens == 4
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0


@given(st.text("abcHe ", min_size=1, max_size=10), st.integers(1, 12), st.integers(1, 9))
@example("He", 4, 1)
def test_each_position_is_run_once_in_order(prompt: str, new: int, chunk: int) -> None:
    decoder, tokenizer = Counter(), tiny_tokenizer()
    result = generate(decoder, tokenizer, prompt, new, chunk)
    ids = tokenizer(prompt)["input_ids"]
    # The counter wraps around (`He` is its last id), and so may meet the end token.
    counted = [(ids[-1] + 1 + i) % 96 for i in range(new)]
    expected = list(takewhile(lambda token: token != tokenizer.eos_token_id, counted))
    steps = min(len(expected), new - 1)
    assert [t for tokens, _ in decoder.calls for t in tokens] == ids + expected[:steps]
    assert [p for tokens, at in decoder.calls for p in range(at, at + len(tokens))] == list(
        range(len(ids) + steps)
    )
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert result.generated_tokens == len(expected)


def test_stops_at_an_end_token() -> None:
    letters = tiny_tokenizer().get_vocab()
    decoder = Counter(end_tokens=(letters["e"],))
    result = generate(decoder, tiny_tokenizer(), "a", 20)
    assert (result.text, result.generated_tokens) == ("bcd", 3)


def test_an_end_at_once_generates_nothing() -> None:
    decoder = Counter(end_tokens=(tiny_tokenizer().get_vocab()["b"],))
    result = generate(decoder, tiny_tokenizer(), "a", 20)
    assert (result.text, result.generated_tokens, result.decode_tokens_per_second) == ("", 0, 0.0)


def test_text_is_told_piece_by_piece() -> None:
    pieces: list[str] = []
    result = generate(Counter(), tiny_tokenizer(), "a", 6, on_text=pieces.append)
    assert pieces == list("bcdefg")
    assert "".join(pieces) == result.text


def test_fills_the_context_to_the_last_row() -> None:
    decoder = Counter()
    assert generate(decoder, tiny_tokenizer(), "a" * (CONTEXT - 3), 4).generated_tokens == 4
    assert decoder.calls[-1] == ([decoder.calls[-1][0][0]], CONTEXT - 1)


@pytest.mark.parametrize(("length", "new"), [(CONTEXT + 1, 1), (CONTEXT, 2), (10**4, 1)])
def test_a_prompt_longer_than_the_context_is_refused(length: int, new: int) -> None:
    message = f"prompt too long: got {length} tokens and max_new_tokens={new}"
    with pytest.raises(InvalidArgumentError, match=message):
        generate(Counter(), tiny_tokenizer(), "a" * length, new)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "chunk": 0}])
def test_counts_below_one_are_refused(options: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="=0, accepted are 1 and more"):
        generate(Counter(), tiny_tokenizer(), "a", **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="empty prompt"):
        generate(Counter(), tiny_tokenizer(), "", 1)


@pytest.mark.parametrize(
    ("count", "position"), [(1, CONTEXT), (1, -1), (CONTEXT, 0), (5, CONTEXT - 4), (0, 0)]
)
def test_positions_beyond_the_context_are_refused(decoder, count: int, position: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"got {count} tokens at position={position}"):
        decoder([5] * count, position)


@pytest.mark.parametrize("token", [-1, 96, 2**40])
def test_ids_beyond_the_vocabulary_are_refused(decoder, token: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"token={token}, accepted are 0 to 95"):
        decoder([5, token, 6], 0)


def changed_folder(lowered, folder: Path, **report) -> Path:
    shutil.copytree(lowered.folder, folder)
    old = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(old | report))
    return folder


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"backend": "qnn"}, "backend=qnn, which needs a device; accepted are .* xnnpack, vulkan"),
        ({"backend": None}, "backend=None"),
        ({"context": None}, "context=None"),
        ({"vocabulary": "many"}, "vocabulary=many"),
    ],
)
def test_a_program_that_cannot_run_here_is_named(lowered, tmp_path, report, message) -> None:
    with pytest.raises(ProgramError, match=message):
        LoweredDecoder(changed_folder(lowered, tmp_path / "copy", **report))


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_a_folder_without_a_report_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ProgramError, match=f"no lowered model: got {tmp_path}"):
        LoweredDecoder(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_program_is_named(lowered, tmp_path: Path, part: float) -> None:
    path = changed_folder(lowered, tmp_path / "copy") / "model.pte"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ProgramError, match=f"truncated or foreign file: got {path}"):
        LoweredDecoder(path.parent)


def test_a_foreign_or_missing_program_is_named(lowered, tmp_path: Path) -> None:
    path = changed_folder(lowered, tmp_path / "copy") / "model.pte"
    path.write_bytes(b"GGUF" * 5000)
    with pytest.raises(ProgramError, match=f"foreign file: got {path}"):
        LoweredDecoder(path.parent)
    path.unlink()
    with pytest.raises(ProgramError, match=f"no such file: got {path}"):
        LoweredDecoder(path.parent)
