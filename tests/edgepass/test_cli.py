"""The command line: what each command prints and writes, and one line for each bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edgepass
from tests.models.tiny_models import save_checkpoint

SCRIPT = "from edgepass.cli import main; main()"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("He said that the tiny model knows nothing at all. " * 3)
    return path


def test_lower_writes_a_folder_that_run_and_eval_read(
    command, checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "made" / "out"
    options = ["--model", checkpoint, "--backend", "xnnpack", "--context", 32, "--out", out]
    code, printed, _ = command("lower", *options, "--recipe", "8da4w", "--json")
    assert code == 0
    report = json.loads(printed)
    assert json.loads((out / "report.json").read_text()) == report
    assert report["pte_bytes"] == (out / "model.pte").stat().st_size
    assert {"edgepass", "backend", "recipe", "model", "linears", "delegates"} <= report.keys()
    assert {"outside_delegates", "stages", "numerics"} <= report.keys()
    assert report["linears"]["total"] == report["linears"]["fused"] == 15
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    code, printed, _ = command("run", out, "--prompt", "He said", "--max-new-tokens", 3, "--json")
    generated = json.loads(printed)
    assert (code, generated["prompt_tokens"]) == (0, 6)
    assert set(generated) == {
        "text",
        "prompt_tokens",
        "generated_tokens",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }

    limits = ["--text", text, "--context", 16, "--max-tokens", 40, "--json"]
    code, printed, _ = command("eval", out, *limits)
    lowered = json.loads(printed)
    assert (code, lowered["tokens"], set(lowered)) == (0, 40, {"perplexity", "tokens"})
    code, printed, _ = command("eval", "--model", checkpoint, "--recipe", "8da4w", *limits)
    assert code == 0
    assert lowered["perplexity"] == pytest.approx(json.loads(printed)["perplexity"], rel=0.01)


def test_a_second_lower_replaces_the_files(command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"old")
    (tmp_path / "notes").write_text("mine")
    options = ["--backend", "xnnpack", "--context", 16, "--layers", 1, "--out", tmp_path]
    code, printed, _ = command("lower", "--model", checkpoint, *options)
    assert code == 0
    assert "linears fused" in printed
    assert json.loads((tmp_path / "report.json").read_text())["layers"] == 1
    assert (tmp_path / "model.pte").stat().st_size > 1000
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("backend", ["vulkan", "xnnpack"])
def test_check_on_the_command_line(command, checkpoint: Path, tmp_path: Path, backend: str) -> None:
    options = ["--backend", backend, "--context", 64, "--check", "--json", "--out", tmp_path / "o"]
    code, printed, _ = command("lower", "--model", checkpoint, *options)
    assert code == 0
    numerics = json.loads(printed)["numerics"]
    assert numerics["device_sqnr_db"]["forward"] > 20
    assert 5 < numerics["device_sqnr_unquantized_db"]["forward"] < 60
    assert json.loads((tmp_path / "o" / "report.json").read_text())["numerics"] == numerics


def test_explain_names_each_linear(command, checkpoint: Path) -> None:
    options = ["--recipe", "8da4w", "--backend", "vulkan", "--json"]
    code, printed, _ = command("explain", "--model", checkpoint, *options)
    rows = json.loads(printed)["linears"]
    assert code == 0
    assert len(rows) == 15
    assert all(row.keys() == {"name", "fused", "how", "reason", "node"} for row in rows)
    assert all(row["fused"] for row in rows)


def test_explain_and_run_without_json_are_for_people(command, checkpoint, lowered) -> None:
    _, printed, _ = command("explain", "--model", checkpoint, "--backend", "xnnpack")
    assert "15 of 15 linears fused" in printed
    _, printed, _ = command("run", lowered.folder, "--prompt", "He said", "--max-new-tokens", 2)
    assert printed.startswith("He said")
    assert "decode: " in printed


def test_eval_without_json(command, checkpoint, text) -> None:
    _, printed, progress = command("eval", "--model", checkpoint, "--text", text, "--context", 64)
    assert printed.startswith("perplexity ")
    assert "edgepass: window 1 of 3" in progress


def test_version(command) -> None:
    assert command("--version") == (0, edgepass.__version__ + "\n", "")


def test_help_does_not_wait_for_torch() -> None:
    check = "import sys, edgepass.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


BAD_OPTIONS = [
    (["--group-size", 48], "backend=xnnpack cannot hold: weights.group_size=48 (nearest: 64)"),
    (["--group-size", 96], "group_size=96, which does not divide the 64 columns of"),
    (["--group-size", 1], "group_size=1, accepted are 2 and more"),
    (["--recipe", "2da2w"], "recipe='2da2w', did you mean '8da8w'? accepted are 8da4w, 8da8w"),
    (["--recipe", "16a8w"], "recipe=16a8w, which backend=xnnpack cannot hold: backend=qnn"),
    (["--recipe", "no.yaml"], "cannot read recipe=no.yaml: No such file or directory"),
    (["--backend", "cuda"], "backend='cuda', accepted are vulkan, xnnpack"),
    (["--dtype", "fp8"], "dtype='fp8', accepted are fp32, fp16"),
    (["--context", 65], "context=65, accepted are 2 to 64"),
    (["--context", 1], "context=1, accepted are 2 to 64"),
    (["--kv-bits", 16], "got kv_bits=16 for backend=xnnpack, which has no such option"),
    (["--block-size-for", "up_proj=64"], "got block_size_for=['up_proj=64'] for backend=xnnpack"),
    (["--layers", 3], "layers=3, accepted are 1 to 2"),
    (["--model", "no/such/model"], "model=no/such/model"),
    (["--model", "missing.gguf"], "model=missing.gguf"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda part: str(part)[:30])
def test_lower_refuses_and_writes_nothing(refused, checkpoint, tmp_path, options, message) -> None:
    good = ["--model", checkpoint, "--backend", "xnnpack", "--context", 16]
    assert message in refused("lower", *good, "--out", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_lower_refuses_a_truncated_checkpoint(refused, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    options = ["--backend", "xnnpack", "--out", tmp_path / "out"]
    assert f"model={tmp_path / 'cut'}" in refused("lower", "--model", tmp_path / "cut", *options)
    assert not (tmp_path / "out").exists()


def test_lower_refuses_a_foreign_file(refused, text: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "model.gguf"
    shutil.copy(text, foreign)
    line = refused("lower", "--model", foreign, "--backend", "xnnpack", "--out", tmp_path / "out")
    assert f"path={foreign}" in line


def test_lower_refuses_a_model_without_standard_attention(refused, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    options = ["--backend", "xnnpack", "--out", tmp_path / "out"]
    line = refused("lower", "--model", tmp_path / "model", *options)
    assert "model_type=mamba: it has no standard attention" in line


@pytest.mark.parametrize("below", ["", "folder/out"])
def test_lower_refuses_an_unwritable_folder_before_it_loads(refused, text: Path, below) -> None:
    out = text / below
    line = refused("lower", "--model", "no/such", "--backend", "xnnpack", "--out", out)
    assert f"cannot write: got out={out}" in line


def test_run_refuses(refused, lowered, tmp_path: Path) -> None:
    assert "empty prompt" in refused("run", lowered.folder, "--prompt", "")
    assert "prompt too long: got 400 tokens" in refused(
        "run", lowered.folder, "--prompt", "a" * 400, "--max-new-tokens", 1
    )
    assert f"no lowered model: got {tmp_path}" in refused("run", tmp_path, "--prompt", "a")


def test_eval_refuses(refused, lowered, checkpoint, text, tmp_path: Path) -> None:
    both = ["eval", lowered.folder, "--model", checkpoint, "--text", text]
    assert "either a folder or --model" in refused(*both)
    assert "either a folder or --model" in refused("eval", "--text", text)
    assert "context=25, accepted are 2 to 24" in refused(
        "eval", lowered.folder, "--text", text, "--context", 25
    )
    folder = ["eval", lowered.folder, "--text", text]
    assert "--weight-algorithm with --model" in refused(*folder, "--weight-algorithm", "gptq")
    assert "--keep-blocks with --model" in refused(*folder, "--keep-blocks")
    assert "--layers with --model" in refused(*folder, "--layers", 1)
    unquantized = ["eval", "--model", checkpoint, "--text", text, "--keep-blocks"]
    assert "--recipe with it" in refused(*unquantized)
    model = ["eval", "--model", checkpoint, "--context", 64]
    assert "context=65, accepted are 2 to 64" in refused(*model, "--text", text, "--context", 65)
    assert f"text={tmp_path}" in refused(*model, "--text", tmp_path)
    assert "recipe='x'" in refused(*model, "--text", text, "--recipe", "x")
    assert "group_size=7" in refused(*model, "--text", text, "--recipe", "4w", "--group-size", 7)


@pytest.mark.parametrize("arguments", [["lower"], ["nothing"], ["run", "--max-new-tokens", "x"]])
def test_wrong_usage_is_exit_code_2(command, arguments) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: edgepass" in err


def test_interrupting_leaves_no_file(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["lower", "--model", checkpoint, "--backend", "xnnpack", "--context", 16]
    arguments += ["--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A run of the tests in a shell's background ignores interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while "edgepass: fuse" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert list(tmp_path.iterdir()) == []
