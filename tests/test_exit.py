"""The one exit: what goes wrong is one line and a status; extras cost no result; bounds come first."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import run_config, trained

from minrnn.cli import engines
from minrnn.cli import main as main_module
from minrnn.cli.main import COMMANDS, main
from minrnn.training import TrainConfig, extras, is_changed, provenance
from minrnn.training.config import BOUNDS

provenance_module = importlib.import_module(
    "minrnn.training.provenance"
)  # its package has a function of that name


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINRNN_DEBUG", raising=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "squares.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}. " for n in range(200)), encoding="utf-8")
    return path


def error_of(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    status = main([str(argument) for argument in args])
    error = capsys.readouterr().err
    assert re.fullmatch(r"minrnn: error: [^\n]+\n", error), error
    return status, error.removeprefix("minrnn: error: ").rstrip("\n")


# --- errors ----------------------------------------------------------------------------------------------

ERRORS: list[tuple[BaseException, int, str]] = [
    (ValueError("what came\nand what was expected"), 2, "what came and what was expected"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "can't decode byte 0xff"),
    (FileNotFoundError(errno.ENOENT, "No such file", "there"), 2, "there: No such file"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "there"), 2, "there: Is a directory"),
    (PermissionError(errno.EACCES, "Permission denied", "there"), 1, "there: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1, "CUDA out of memory. Tried"),
    (RecursionError("maximum recursion depth exceeded"), 1, "maximum recursion depth exceeded"),
    (subprocess.CalledProcessError(3, ["git"]), 1, "returned non-zero exit status 3"),
    (subprocess.TimeoutExpired(["git"], 3), 1, "timed out after 3 seconds"),
    (EOFError("cut short"), 1, "cut short"),
    (MemoryError(), 1, "out of memory"),
    (MemoryError("Unable to allocate 7 TiB"), 1, "out of memory: Unable to allocate 7 TiB"),
    (OverflowError("too large"), 1, "OverflowError: too large (MINRNN_DEBUG=1 shows where)"),
    (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    (KeyError("step"), 1, "KeyError: 'step'"),
    (IndexError("out of range"), 1, "IndexError: out of range"),
    (AttributeError("no attribute"), 1, "AttributeError: no attribute"),
    (AssertionError(), 1, "AssertionError: "),
]


@pytest.mark.parametrize(("error", "status", "message"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_foreseeable_error_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(engines, "run", fail)
    found, said = error_of(capsys, "engines")
    assert found == status
    assert message in said
    monkeypatch.setenv("MINRNN_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["engines"])


@pytest.mark.parametrize("signum", [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_every_command_with_its_status(
    name: str, signum: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(args: object) -> int:
        os.kill(os.getpid(), signum)
        return 0

    monkeypatch.setattr(importlib.import_module(COMMANDS[name].module), "run", wait)
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        assert main([name]) == 128 + signum
        assert signal.getsignal(signum) is signal.SIG_DFL
        signal.signal(signum, signal.SIG_IGN)
        assert main([name]) == 0  # under nohup
    finally:
        signal.signal(signum, before)
    assert capsys.readouterr().err == ""


def python(program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    source = str(Path(main_module.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": source}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, text=True, timeout=60, capture_output=True, **options
    )


WRITER = """
import sys, types
from minrnn.cli import main as module

def write(args):
    with open("metrics.jsonl", "w") as file:
        print("said")
        print("complained", file=sys.stderr)
        file.write("kept")
    raise ValueError("no")

sys.modules["minrnn.cli.fake"] = types.SimpleNamespace(run=write)
module.COMMANDS["fake"] = module.Command("minrnn.cli.fake", "")
sys.exit(module.main(["fake"]))
"""


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2), (1,), (0,)])
def test_closed_descriptors_are_never_given_to_files(closed: tuple[int, ...]) -> None:
    """What is said then goes nowhere: not into the next file that is opened, which would have its number."""
    program = f"""
import os, sys
pid = os.fork()
if pid == 0:
    for number in {closed}:
        os.close(number)
    os.execv(sys.executable, [sys.executable, "-c", {WRITER!r}])
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    done = python(program)
    assert done.returncode == 2, done.stderr
    assert Path("metrics.jsonl").read_text() == "kept"
    assert ("complained" in done.stderr) == (2 not in closed)
    assert ("said" in done.stdout) == (1 not in closed)


def buffered(arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run `minrnn` with these streams, of which it writes what remains when it ends."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env["PYTHONPATH"] = str(Path(main_module.__file__).parents[2])
    command = [sys.executable, "-m", "minrnn", *arguments.split()]
    return subprocess.run(command, env=env, text=True, timeout=60, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("argument", ["--help", "--version", "nothing", "train --help"])
def test_output_that_cannot_be_written_is_a_status_without_a_traceback(argument: str) -> None:
    for out, error, status in (
        ("full", "pipe", 1),
        ("pipe", "full", 0),
        ("full", "full", 1),
    ):
        with Path("/dev/full").open("w") as full:
            done = buffered(
                argument,
                stdout=full if out == "full" else subprocess.PIPE,
                stderr=full if error == "full" else subprocess.PIPE,
            )
        assert done.returncode == (2 if argument == "nothing" else status)
        assert "Traceback" not in (done.stderr or "")
        assert "Exception ignored" not in (done.stderr or "")


@pytest.mark.parametrize("argument", ["--version", "train --help"])
def test_a_reader_that_has_left_is_a_status_without_a_message(argument: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = buffered(argument, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.returncode == 128 + 13
    assert done.stderr == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_a_terminal_cannot_show_is_escaped(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    program = (
        "import sys; from minrnn.cli.main import main; main(['--version']); print('tr\\xe4n', file=sys.%s)"
    )
    done = python(program % stream)
    assert done.returncode == 0, done.stderr
    assert "tr\\xe4n" in getattr(done, stream)


def test_an_argument_that_is_no_text_is_named() -> None:
    done = python("import sys; from minrnn.cli.main import main; sys.exit(main(['trän\\udcff']))")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "unknown command" in done.stderr


# --- bounds ----------------------------------------------------------------------------------------------


def test_every_integer_of_training_has_bounds() -> None:
    integers = {field.name for field in dataclasses.fields(TrainConfig) if field.type == "int"}
    assert integers == BOUNDS.keys()


@pytest.mark.parametrize("name", BOUNDS)
def test_sizes_beyond_any_use_are_refused_before_anything_is_built(name: str) -> None:
    least, most = BOUNDS[name]
    for value in (least, most):
        TrainConfig(**{name: value})
    for value, message in ((least - 1, "or more|at least"), (most + 1, "at most"), (10**30, "at most")):
        with pytest.raises(ValueError, match=f"TrainConfig: {name} must be .*({message}).*, got {value}"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    "args",
    [
        "train demo --train.threads 1000000",
        "train demo --train.seed 18446744073709551616",
        "train demo --train.batch-size 1000000000000",
        f"train demo --train.steps 1{'0' * 30}",
        "sample nowhere --seed 18446744073709551616",
        "sample nowhere --seed -1",
        f"sample nowhere --tokens 1{'0' * 30}",
        "evaluate nowhere --max-tokens -1",
        "act nowhere --seed 18446744073709551615",
        "act nowhere --episodes 10000000000",
        "make-data Pendulum-v1 --seed 18446744073709551616",
        "make-data Pendulum-v1 --steps 10000000000000000",
        "bench scan --threads 1000000",
        "bench scan --seed 18446744073709551616",
        "bench accuracy --seed -1",
        "reproduce runtime --threads 1000000",
        "reproduce runtime --seeds 1000000000000",
    ],
)
def test_options_beyond_any_use_are_refused(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = error_of(capsys, *args.split())
    assert status == 2
    assert re.search(r"must be (0|1|at most) ?.*, got", said), said


# --- extras ----------------------------------------------------------------------------------------------


@pytest.fixture
def code_unread() -> Iterator[None]:
    """Let this test read the commit, which a process reads once."""
    provenance_module._code.cache_clear()
    yield
    provenance_module._code.cache_clear()


@pytest.mark.usefixtures("code_unread")
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            'case "$*" in *rev-parse*HEAD) echo 0123456789012345678901234567890123456789 ;; esac',
            "0123456789012345678901234567890123456789",
        ),
        ("echo 0123456789-dirty", None),
        ('case "$*" in *diff*) exit 129 ;; *) echo 0123456789012345678901234567890123456789 ;; esac', None),
        ("printf '\\377\\376 garbage'", None),
        ("echo fatal; exit 128", None),
        ("kill -9 $$", None),
    ],
)
def test_a_broken_git_costs_the_commit_alone(
    script: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = tmp_path / "git"
    git.write_text(f"#!/bin/sh\n{script}\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert provenance(torch.device("cpu"))["commit"] == expected
    assert provenance(torch.device("cpu"))["changes"] is None


@pytest.mark.usefixtures("code_unread")
@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no git"),
        PermissionError(errno.EACCES, "not executable"),
        OSError(errno.ENOEXEC, "Exec format error"),
        subprocess.TimeoutExpired(["git"], 10),
    ],
)
def test_a_git_that_does_not_start_costs_the_commit_alone(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance(torch.device("cpu"))["commit"] is None


def committed(folder: Path, *names: str) -> None:
    """Make a repository with these files, all committed."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first\n")
    (folder / ".gitignore").write_text("*.so\n")
    author = ("-c", "user.name=x", "-c", "user.email=x@x.invalid", "-c", "commit.gpgsign=false")
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", folder, *arguments], check=True, stdin=subprocess.DEVNULL)


@pytest.mark.usefixtures("code_unread")
def test_a_result_carries_the_digest_of_what_differs_from_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, page, kernel = "src/minrnn/training/provenance.py", "results/tables.md", "csrc/scan.h"
    committed(tmp_path, module, page, kernel)
    monkeypatch.setattr(provenance_module, "__file__", str(tmp_path / module))

    def changes(**files: str) -> object:
        provenance_module._code.cache_clear()
        about = provenance(torch.device("cpu"))
        assert re.fullmatch("[0-9a-f]{40,64}", str(about["commit"]))
        assert is_changed(about) == (about["changes"] is not None)
        return about["changes"]

    assert changes() is None
    (tmp_path / page).write_text("second\n")  # what a run writes does not make it another run
    (tmp_path / "src/minrnn/_cpu.so").write_text("ignored by git\n")
    assert changes() is None
    found = set()
    for name, text in (
        (module, "second\n"),
        (module, "third\n"),
        (kernel, "second\n"),
        ("src/minrnn/new.py", "second\n"),
        ("src/minrnn/new.py", "third\n"),
        ("csrc/new.h", "third\n"),
    ):
        (tmp_path / name).write_text(text)
        found.add(changes())
    assert None not in found
    assert len(found) == 6
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)  # staged is not committed
    assert changes() is not None


@pytest.mark.usefixtures("code_unread")
def test_a_process_reads_its_code_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is edited while a run lasts is not what it ran."""
    module = "src/minrnn/training/provenance.py"
    committed(tmp_path, module)
    monkeypatch.setattr(provenance_module, "__file__", str(tmp_path / module))
    before = provenance(torch.device("cpu"))
    (tmp_path / module).write_text("second\n")
    assert provenance(torch.device("cpu")) == before


@pytest.mark.parametrize(
    ("commit", "others", "expected"),
    [
        ("0123456789", {"changes": None}, False),
        ("0123456789", {"changes": "fedcba"}, True),
        ("0123456789", {}, False),
        ("0123456789-dirty", {}, True),
        (None, {"changes": None}, False),
    ],
)
def test_results_of_changed_code_are_known(
    commit: str | None, others: dict[str, Any], expected: bool
) -> None:
    assert is_changed({"commit": commit, **others}) is expected
    assert is_changed(others)  # without a commit nobody knows


@pytest.mark.parametrize("name", ["$x^", "a_b^{", "$\\frac$", "100%", "né"])
def test_a_run_may_have_any_name(name: str, corpus: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(run_config(corpus, steps=2), tmp_path / name)
    assert (tmp_path / name / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error", extras.FOREIGN_ERRORS)
def test_a_picture_that_fails_is_a_note_and_leaves_no_part(
    error: type[Exception], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(figure: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise error("no font")

    monkeypatch.setattr(Figure, "savefig", fail)
    figure = Figure()
    said = extras.draw(lambda: extras.save_picture(figure, tmp_path / "plot.png"))
    assert said is not None
    assert "no font" in said
    assert [path.name for path in tmp_path.iterdir()] == ["squares.txt"]


def test_results_are_there_before_the_picture_is_drawn(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minrnn.training import loop

    def fail(run_dir: Path, unit: str) -> str:
        assert json.loads((run_dir / "results.json").read_text())["unit"] == unit
        return "no font"

    monkeypatch.setattr(loop, "plot_losses", fail)
    assert trained(run_config(corpus, steps=2), tmp_path / "run")["step"] == 2


# --- sampling and measuring what was trained -------------------------------------------------------------


@pytest.fixture
def run_dir(corpus: Path, tmp_path: Path) -> Path:
    config = run_config(corpus, steps=2)
    task = dataclasses.replace(config.task, vocabulary="characters", documents="joined")
    trained(dataclasses.replace(config, task=task), tmp_path / "run")
    return tmp_path / "run"


def test_the_default_prompt_is_one_that_the_vocabulary_has(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text has no new line."""
    assert main(["sample", str(run_dir), "--tokens", "5"]) == 0
    assert len(capsys.readouterr().out) == 6
    from minrnn.cli.demo import PROMPTS
    from minrnn.cli.sample import default_prompt
    from minrnn.tasks.vocabulary import ByteVocabulary, CharacterVocabulary

    assert default_prompt(ByteVocabulary(), PROMPTS) == "def "
    for characters, prompt in (("\n ab", "\n"), (" ab", " "), ("ab", "a")):
        assert default_prompt(CharacterVocabulary(characters), PROMPTS) == prompt


def test_evaluation_is_of_what_was_trained_on(
    run_dir: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run_dir), "--window", "8", "--max-tokens", "50"]) == 0
    capsys.readouterr()
    corpus.write_text(corpus.read_text().replace("times", "semit"), encoding="utf-8")
    status, said = error_of(capsys, "evaluate", run_dir)
    assert status == 2
    assert f"the text or data has changed since {run_dir} was trained on it" in said


def test_an_evaluation_tells_how_far_it_is_and_may_be_bounded(corpus: Path, tmp_path: Path) -> None:
    from minrnn.models import ModelConfig
    from minrnn.tasks import TextConfig, TextTask

    task = TextTask(TextConfig(source=str(corpus), window=16, eval_chunk=64))
    model = task.make_model(task.model_config(ModelConfig(d_model=8, num_layers=1)))
    fractions: list[float] = []
    metrics = task.evaluate(model, tell=fractions.append)
    assert metrics == task.evaluate(model)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(fractions) > 10
    config = run_config(corpus, steps=2, eval_every=0, final_eval_tokens=40)
    assert trained(config, tmp_path / "run")["val_tokens"] == 40
    (tmp_path / "run" / "results.json").unlink()
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, final_eval_tokens=0))
    assert trained(other, tmp_path / "run", resume=True)["val_tokens"] > 40


@pytest.mark.parametrize("name", ["evaluation.json", "acting.json"])
def test_reports_of_a_run_are_replaced_whole_by_whoever_measures_it(name: str, tmp_path: Path) -> None:
    """They are no part of what its owner writes, and need no claim."""
    from minrnn.files import claim, write_json

    with claim(tmp_path / "run"):
        write_json(tmp_path / "run" / name, {"val_loss": 1.0})
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_pace_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from minrnn.training import log

    times: Callable[[], float] = iter([0.0, 10.0, 20.0, 30.0]).__next__
    monkeypatch.setattr(log.time, "monotonic", times)
    pace = log.Pace("evaluating")
    assert pace(0.2) == "evaluating"
    assert pace(0.4) == "evaluating: 40%, about 30 s left"
    assert pace(0.6) == "evaluating: 60%, about 20 s left"
    assert pace(0.1) == "evaluating"


@pytest.mark.parametrize("columns", ["0", "1", "5"])
def test_a_narrow_terminal_loses_nothing(columns: str) -> None:
    for verb, said in (("engines", "cpu"), ("train --help", "--run")):
        done = subprocess.run(
            [sys.executable, "-m", "minrnn", *verb.split()],
            env=os.environ | {"COLUMNS": columns},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said in done.stdout
