"""``lower --backend qnn`` to ``run``, ``eval`` and ``encodings``, on the real HTP libraries."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from edgepass import qnn
from edgepass.calibration.cpu_limits import cpu_limits
from edgepass.generation import generate, load_decoder
from edgepass.lowering import qnn_libraries
from edgepass.models.load import load_tokenizer
from edgepass.ops.encodings_file import read_encodings_file
from edgepass.ops.errors import InvalidArgumentError, ProgramError
from edgepass.perplexity import of_program, perplexity
from tests.lowering.qnn_programs import needs_libraries
from tests.models.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer

pytestmark = needs_libraries
CONTEXT, CHUNK = 24, 6
SHORT = ("--context=24", "--prefill-chunk=6", "--calibration={text}")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("He said that the tiny model knows nothing at all. " * 3)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_checkpoint(folder, "qwen3", num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def lowered(tmp_path_factory, checkpoint, text) -> SimpleNamespace:
    """A folder that the command's own code wrote, and its report. Lowered once: it takes long."""
    from edgepass.qnn_commands import lower_command

    out = tmp_path_factory.mktemp("lowered") / "qnn"
    options = qnn.QnnOptions(context=CONTEXT, prefill_chunk=CHUNK)
    report = lower_command(str(checkpoint), out, options, text, 48, None, False, check=True)
    return SimpleNamespace(folder=out, report=report)


def test_the_folder_holds_everything(lowered) -> None:
    names = {path.name for path in lowered.folder.iterdir()}
    assert names >= {"model.pte", "report.json", "encodings.json", "tokenizer.json"}
    # The state of the calibration is gone, now that all is written.
    assert [path.name for path in lowered.folder.parent.iterdir()] == [lowered.folder.name]
    assert lowered.report["calibration_tokens"] == 48
    assert json.loads((lowered.folder / "report.json").read_text()) == lowered.report
    encodings = read_encodings_file(lowered.folder / "encodings.json")
    assert len(encodings) == lowered.report["encodings"] > 50
    assert encodings["model.layers.0.mlp.up_proj.weight"].block == 32


def test_the_report_says_with_how_many_threads_it_was_calibrated(lowered) -> None:
    # Two chunks of a tiny model are over before a sweep could pay.
    choice = lowered.report["calibration_threads"]
    assert choice["sweep"] is None
    assert choice["threads"] == min(torch.get_num_threads(), cpu_limits().threads)


def test_both_methods_are_one_delegate_and_nothing_is_outside(lowered) -> None:
    assert lowered.report["delegates"] == {"kv_forward": 1, "prefill_forward": 1}
    assert lowered.report["outside_delegates"] == {"kv_forward": {}, "prefill_forward": {}}


def test_the_simulator_agrees_with_the_fake_quantized_graph(lowered) -> None:
    measured = lowered.report["numerics"]["device_sqnr_db"]
    assert set(measured) == {"kv_forward", "prefill_forward"}
    assert min(min(values) for values in measured.values()) >= 40


def test_the_stock_runner_s_methods_and_metadata_are_there(lowered) -> None:
    from edgepass.lowering.qnn_simulator import SimulatedProgram

    program = SimulatedProgram(lowered.folder / "model.pte")
    assert program.constant("get_n_layers") == 1
    assert program.constant("get_max_context_len") == CONTEXT
    assert program.constant("get_kv_io_bit_width") == 8
    assert program.methods >= {"kv_forward", "prefill_forward", "get_ar_len", "get_use_kv_cache"}


def test_generation_does_not_depend_on_how_the_prompt_is_cut(lowered) -> None:
    decoder, ids = load_decoder(lowered.folder), list(range(20, 34))
    at_once = decoder.prefill(ids)
    steps = [decoder([token], i) for i, token in enumerate(ids)][-1]
    model = tiny_model("qwen3", num_hidden_layers=1)
    exact = model(torch.tensor([ids])).logits[0, -1]
    noise = (at_once - steps).square().sum() / exact.square().sum()
    assert noise < 0.01
    assert (at_once - exact).square().sum() / exact.square().sum() < 0.25


def test_run_and_eval_on_the_simulator(lowered, text) -> None:
    decoder, tokenizer = load_decoder(lowered.folder), load_tokenizer(lowered.folder)
    result = generate(decoder, tokenizer, "He said that", max_new_tokens=4)
    assert result.generated_tokens <= 4 and result.prompt_tokens == 11
    tokens = tokenizer(text.read_text())["input_ids"][:16]
    found = perplexity(tokens, 16, of_program(decoder)).perplexity
    model = tiny_model("qwen3", num_hidden_layers=1)
    logits = model(torch.tensor([tokens[:-1]])).logits[0]
    exact = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])).exp().item()
    assert abs(math.log(found / exact)) < 0.3


@pytest.mark.parametrize(
    ("tokens", "position", "message"),
    [
        ([5], 3, "at position=3, accepted are 1 and more at positions 0 to 0"),
        ([5], -1, "at position=-1"),
        ([5] * 25, 0, "got 25 tokens at position=0"),
        ([], 0, "got 0 tokens"),
        ([96], 0, "got token=96, accepted are 0 to 95"),
        (torch.ones(2, 64), 0, "no token ids: got .* with a tensor"),
    ],
)
def test_impossible_calls_are_refused(lowered, tokens, position, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load_decoder(lowered.folder)(tokens, position)


def test_a_folder_without_its_facts_is_refused(lowered, tmp_path) -> None:
    report = dict(lowered.report)
    del report["io"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ProgramError, match="without 'io'"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("kept", [0, 20, 100, 0.5, 0.99])
def test_a_truncated_program_is_refused(lowered, tmp_path, kept) -> None:
    (tmp_path / "report.json").write_text(json.dumps(lowered.report))
    whole = (lowered.folder / "model.pte").read_bytes()
    count = int(kept * len(whole)) if kept < 1 else kept
    (tmp_path / "model.pte").write_bytes(whole[:count])
    with pytest.raises(ProgramError, match="truncated or foreign file"):
        load_decoder(tmp_path)


def test_encodings_are_shown_and_compared(command, lowered, tmp_path) -> None:
    path, other = lowered.folder / "encodings.json", tmp_path / "other.json"
    code, out, _ = command("encodings", "show", path, "--json")
    assert code == 0 and "int4" in json.loads(out)["model.layers.0.mlp.up_proj.weight"]
    assert command("encodings", "diff", path, path, "--json")[:2] == (0, "{}\n")
    document = json.loads(path.read_text())
    document["activation_encodings"][0]["scale"][0] *= 2
    other.write_text(json.dumps(document))
    code, out, _ = command("encodings", "diff", path, other)
    assert code == 1 and document["activation_encodings"][0]["name"] in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no calibration text: got calibration=None"),
        (("--encodings={text}",), "unreadable encodings: got"),
        (("--encodings={text}", "--calibration={text}"), "accepted is one of them"),
        (
            ("--recipe", "8da4w"),
            "recipe=8da4w, which backend=qnn cannot hold: weights.granularity=group",
        ),
        (("--soc", "SM1", "--calibration", "{text}"), "unknown chip: got soc='SM1'"),
        (("--kv-bits", "4"), "got kv_bits=4"),
        (
            ("--kv-bits=16", "--soc=SM8450", "--calibration={text}"),
            "got kv_bits=16 for soc=SM8450, whose HTP is V69, accepted is 8",
        ),
        (("--dtype", "fp16"), "got dtype=fp16 for backend=qnn, which has no such option"),
        (("--group-size", "64"), "got group_size=64 for backend=qnn"),
        (("--prefill-chunk", "1024"), "got prefill_chunk=1024 for context=1024"),
        (("--block-size-for", "up_proj"), "unknown block size: got block_size_for=up_proj"),
        (
            ("--recipe=16a8w", "--block-size-for=up_proj=64"),
            "got block_size=64 for recipe=16a8w, which has no blocks",
        ),
        (
            (*SHORT, "--block-size-for=up=64", "--calibration-tokens=48"),
            "no such module: got block_size=64 for up, accepted are ends of paths such as down_pro",
        ),
        (
            (*SHORT, "--block-size=48", "--calibration-tokens=48"),
            "got block_size=48, which does not divide the 64 input features",
        ),
        (
            (*SHORT, "--calibration-tokens=1200"),
            "calibration text too short: got 147 tokens in {text}, needed are 1200 (50 x 24)",
        ),
        ((*SHORT, "--calibration-tokens=1"), "too few tokens: got calibration_tokens=1, accepted"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    refused,
    options,
    message,
    checkpoint,
    text,
    tmp_path,
) -> None:
    out = tmp_path / "out"
    filled = [each.format(text=text) for each in options]
    recipe = () if any("--recipe" in each for each in options) else ("--recipe", "16a4w_block")
    line = refused(
        *("lower", "--model", checkpoint, "--backend", "qnn", *recipe, "--out", out, *filled)
    )
    assert message.format(text=text) in line and not list(tmp_path.iterdir())


def lower_arguments(checkpoint, text, out) -> tuple:
    return (
        *("lower", "--model", checkpoint, "--backend", "qnn", "--recipe", "16a4w_block"),
        *(
            "--context=24",
            "--prefill-chunk=6",
            "--calibration",
            text,
            "--calibration-tokens=48",
            "--out",
            out,
        ),
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", math.nan, "mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", 1e5, "weight beyond fp16"),
    ],
)
def test_what_is_not_finite_is_refused_in_one_line(
    refused, text, tmp_path, name, value, message
) -> None:
    model = tiny_model("qwen3", num_hidden_layers=1)
    model.get_parameter(name).fill_(value)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    line = refused(*lower_arguments(tmp_path / "model", text, tmp_path / "out"))
    assert message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text too short: got"),
        (b"H", "text too short: got"),
        (b"\xff\xfe\x00\x81", "foreign encoding: got"),
        (None, "unreadable calibration text: got"),
    ],
)
def test_an_unusable_calibration_text_is_refused(
    refused, checkpoint, tmp_path, content, message
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    line = refused(*lower_arguments(checkpoint, tmp_path / "text", tmp_path / "out"))
    assert message in line and not (tmp_path / "out").exists()


def test_without_the_libraries_the_command_names_the_extra(
    refused, checkpoint, text, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", "")
    monkeypatch.setattr(qnn_libraries.importlib.util, "find_spec", lambda name: None)
    line = refused(*lower_arguments(checkpoint, text, tmp_path / "out"))
    assert "pip install edgepass[qnn]" in line and not (tmp_path / "out").exists()


def test_encodings_of_another_recipe_are_refused(refused, lowered, checkpoint, tmp_path) -> None:
    file, out = lowered.folder / "encodings.json", tmp_path / "out"
    line = refused(
        *("lower", "--model", checkpoint, "--backend", "qnn", "--recipe", "16a8w", "--out", out),
        *("--context", CONTEXT, "--prefill-chunk", CHUNK, "--encodings", file),
    )
    assert "encodings of another model or recipe" in line and "/linear#0.input: missing" in line
    assert not out.exists()
