"""The command line: help without waiting, mistakes in one line, and the verbs from recipe to text."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import minrnn
from minrnn.cli.main import COMMANDS, main
from minrnn.training import read_metrics

# As `minrnn train RECIPE` would be called, but done in a second.
TINY = """# A recipe for the tests.
[model]
d_model = 16
num_layers = 1
[task]
source = {source!r}
vocabulary = {vocabulary!r}
window = 16
[train]
steps = 4
batch_size = 2
warmup_steps = 1
log_every = 2
eval_every = 2
checkpoint_every = 2
device = "cpu"
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(minrnn.__file__).parents[1]))  # of the processes started here
    monkeypatch.delenv("MINRNN_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return write_recipe(tmp_path, "bytes")


def write_recipe(folder: Path, vocabulary: str) -> str:
    corpus, recipe = folder / "corpus.txt", folder / "tiny.toml"
    corpus.write_text("".join(f"{n}² = {n * n}, née\n" for n in range(300)), encoding="utf-8")
    recipe.write_text(TINY.format(source=str(corpus), vocabulary=vocabulary), encoding="utf-8")
    return str(recipe)


def command_line(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "minrnn", *map(str, args)]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def error_of(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    """Run a command that fails; return its status and the one line that it says."""
    status = main([str(argument) for argument in args])
    error = capsys.readouterr().err
    assert re.fullmatch(r"minrnn: error: [^\n]+\n", error), error
    return status, error


# --- help ------------------------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from minrnn.cli.main import main; status = main(['--help']);"
        "sys.exit(status or ', '.join({'torch', 'numpy', 'tyro', 'rich'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(
        f"  {name} " in done.stdout and command.help in done.stdout for name, command in COMMANDS.items()
    )


def test_no_arguments_show_help_and_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: minrnn COMMAND")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("minrnn ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(import_module(COMMANDS[name].module).run)
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: minrnn {name}")
    options = re.split(r"\n\W+(?=--[a-z])", text.partition("help message and exit")[2])[1:]
    for option in options:
        words = re.sub(r"\s*│?\n│?\s*", " ", option)
        assert re.search(r"[a-z]{2,}.*\. \(default:", words), words
    assert len(options) >= {"demo": 2, "train": 40, "sample": 8, "evaluate": 3, "act": 7, "make-data": 6}.get(
        name, 0
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_boxes_become_one_line_in_every_encoding(encoding: str) -> None:
    command = command_line("train", "demo", "--train.stepz", "5")
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stderr == (
        "minrnn: error: Unrecognized options: --train.stepz, 5; did you mean --train.steps? "
        "(minrnn train --help lists the options)\n"
    )


def test_help_of_train_lists_recipes_and_shows_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "shakespeare", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name}: " in text for name in ("demo", "shakespeare", "shakespeare-cpu"))
    assert "[RECIPE]" in text
    assert re.search(r"--model.d-model INT .*\n?.*\(default: 384\)", text)


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train shakespear", "did you mean 'shakespeare'?"),
        ("train demo --train.stepz 5", "did you mean --train.steps?"),
        ("train demo --model.d_modle 5", "did you mean --model.d-model?"),
        ("train demo --train.steps many", "--train.steps"),
        ("train demo --train.steps", "'--train.steps'"),
        ("train demo --train.batch-size 0", "batch_size must be at least 1, got 0"),
        ("train demo --model.num-heads 4", "mixer 'mingru' has no option 'num_heads'"),
        (
            "train demo --task.vocabulary words",
            "vocabulary must be one of bytes, characters, bpe, got 'words'",
        ),
        ("train demo --run", "argument '--run-dir/--run'"),
        ("train demo extra", "extra"),
        ("train --train.steps 5 shakespeare", "the recipe must come first: minrnn train shakespeare"),
        ("train --resume", "--resume needs --run DIR"),
        ("train --resume --run nowhere", "nowhere is not a run directory"),
        ("train nowhere.toml", "nowhere.toml: No such file"),
        ("train demo --task.source nowhere --run new", "nowhere"),
        ("train demo --train.device gpu", "device must be auto or one that works here, got 'gpu'"),
        ("train decisions --run new", "task.data must name the episodes to learn from, got none"),
        ("train decisions --task.data nowhere.hdf5 --run new", "nowhere.hdf5"),
        ("train decisions --task.tokens three", "invalid choice 'three' for argument '--task.tokens'"),
        ("sample", "RUN"),
        ("act", "RUN"),
        ("act nowhere", "nowhere is not a run directory"),
        ("sample nowhere", "nowhere is not a run directory"),
        ("sample nowhere --checkpoint first", "'best', 'last'"),
        ("evaluate nowhere", "nowhere is not a run directory"),
        ("engines all", "all"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    args: str, message: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    status, error = error_of(capsys, *args.split())
    assert message in error
    assert status == 2
    assert not any(path.name in ("runs", "new") for path in workplace.iterdir())


def test_failures_are_one_line_and_status_1(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    fast = "--train.learning-rate 1e30 --train.grad-clip 0 --train.steps 50 --train.warmup-steps 0"
    status, error = error_of(capsys, "train", recipe, "--run", "run", *fast.split())
    assert status == 1
    assert re.search(r"diverged at step \d+", error)


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown recipe"):
        main(["train", "nothing"])


# --- from recipe to text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_train_then_evaluate_then_sample(
    vocabulary: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", write_recipe(tmp_path, vocabulary), "--train.steps", "6"]) == 0
    said = capsys.readouterr().out
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", run_dir.name)
    assert f"runs/{run_dir.name}" in said.splitlines()[-1]
    results = json.loads((run_dir / "results.json").read_text())

    assert main(["evaluate", str(run_dir), "--checkpoint", "last"]) == 0
    assert f"{results['val_loss']:.4f}" in capsys.readouterr().out
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["val_loss"] == pytest.approx(results["val_loss"], rel=1e-6)
    assert evaluation["step"] == results["step"]
    assert main(["evaluate", str(run_dir), "--checkpoint", "last", "--window", "4"]) == 0
    shorter = json.loads((run_dir / "evaluation.json").read_text())
    assert shorter["val_loss"] == pytest.approx(results["val_loss"], rel=1e-6)
    assert shorter["val_loss_windowed"] != pytest.approx(results["val_loss_windowed"], rel=1e-6)
    capsys.readouterr()

    def sample(*options: str) -> str:
        assert main(["sample", str(run_dir), "--tokens", "40", *options]) == 0
        return capsys.readouterr().out

    assert sample("--prompt", "née").startswith("née")
    assert sample() == sample("--seed", "0") != sample("--seed", "1")
    assert sample("--temperature", "0") == sample("--top-k", "1")
    assert sample("--checkpoint", "last")
    if vocabulary == "characters":
        assert len(sample()) == 41  # and the new line that ends it
        status, error = error_of(capsys, "sample", run_dir, "--prompt", "Ω")
        assert status == 2
        assert "'Ω'" in error


def test_a_task_that_is_no_text_is_trained_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--model.d-model 8 --model.num-layers 1 --train.steps 2 --train.warmup-steps 1 --train.device cpu"
    task = "--task.language parity --task.eval-sequences 70 --task.eval-max-length 50"
    assert main(["train", "formal-languages", "--run", "run", *small.split(), *task.split()]) == 0
    said = capsys.readouterr().out
    assert "parity: strings of 1 to 40 symbols" in said
    assert said.endswith("next: minrnn evaluate run\n")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert main(["evaluate", "run", "--checkpoint", "last"]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["accuracy"] == results["accuracy"]
    for args, message in (
        ("evaluate run --window 4", "window must be left out for formal-languages, got 4"),
        ("sample run", "run must be a run of the text task"),
        ("demo listops", "the recipe must be one of text, got listops"),
        ("train listops --task.windo 4", "Unrecognized options: --task.windo"),
        ("train listops --task.max-arg 4", "did you mean --task.max-args"),
    ):
        capsys.readouterr()
        status, error = error_of(capsys, *args.split())
        assert status == 2
        assert message in error


def test_the_demo_trains_compares_and_writes(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", recipe, "--prompt", "7", "--tokens", "20"]) == 0
    said = capsys.readouterr().out
    (run_dir,) = (tmp_path / "runs").iterdir()
    name = Path("runs", run_dir.name)
    results = json.loads((run_dir / "results.json").read_text())
    assert re.search(rf"mingru, {results['parameters']:,} parameters +│ {results['bits_per_byte']:.3f}", said)
    assert re.search(r"order-3 n-gram of bytes +│ \d\.\d{3}", said)
    sampled = f"$ minrnn sample {name} --tokens 20 --temperature 0.8 --prompt 7\n7"
    assert sampled in said
    assert said.endswith(f"\nrun:  {name}\nplot: {name}/loss.png\n")


def test_an_existing_run_is_resumed_not_overwritten(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe, "--run", "run"]) == 0
    capsys.readouterr()
    status, error = error_of(capsys, "train", recipe, "--run", "run")
    assert status == 2
    assert "run already exists; resume it with --resume" in error
    status, error = error_of(capsys, "train", "--run", "run", "--resume", "--model.d-model", "8")
    assert status == 2
    assert "model.d_model is 16 in this run, got 8" in error
    status, error = error_of(capsys, "train", "demo", "--run", "run", "--resume")
    assert status == 2
    assert "run is a run of the recipe tiny, got demo" in error
    assert main(["train", "--run", "run", "--resume", "--train.steps", "6"]) == 0
    assert read_metrics(Path("run", "metrics.jsonl"))[-1]["step"] == 6


def test_a_damaged_checkpoint_is_refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe, "--run", "run"]) == 0
    capsys.readouterr()
    tensors = Path("run", "checkpoints", "best", "model.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    status, error = error_of(capsys, "sample", "run")
    assert status == 2
    assert "cut short or altered" in error


def test_engines_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engines"]) == 0
    assert "reference" in capsys.readouterr().out


# --- signals and pipes, in processes of their own --------------------------------------------------------


def test_a_reader_that_leaves_saves_the_run(recipe: str) -> None:
    command = command_line("train", recipe, "--run", "run", "--train.steps", "1000000")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + 13
    assert process.stderr.read() == b""
    stopped = read_metrics(Path("run", "metrics.jsonl"))[-1]["step"]
    assert main(["train", "--run", "run", "--resume", "--train.steps", str(stopped + 2)]) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_signal_saves_the_run_and_is_the_status(signum: signal.Signals, recipe: str) -> None:
    command = command_line("train", recipe, "--run", "run", "--train.steps", "1000000")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(Path("run", "checkpoints", "last").exists, process)
    process.send_signal(signum)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert "stopping after this step" in error
    assert "Traceback" not in error
    stopped = re.search(r"saved after step (\d+); resume with: minrnn train --run run --resume", out)
    assert stopped is not None, out
    assert main(["train", "--run", "run", "--resume", "--train.steps", str(int(stopped[1]) + 2)]) == 0


def test_a_reader_that_leaves_ends_sampling_quietly(recipe: str) -> None:
    assert main(["train", recipe, "--run", "run"]) == 0
    command = command_line("sample", "run", "--tokens", "1000000")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)  # it streams: a million tokens are not waited for
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + 13
    assert process.stderr.read() == b""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_progress_bar(recipe: str) -> None:
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        command = command_line("train", recipe, "--run", "run")
        os.execve(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the child has gone, and the terminal with it
            break
        if not chunk:
            break
        shown += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "4/4" in shown.decode()
    assert "tok/s" in shown.decode()
