"""Stopping: whatever asks for it, the step is finished, all is saved, and nothing is lost by it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_training import assert_same_run, run_config, trained

from minrnn.files import InUseError, claim
from minrnn.training import BROKEN_PIPE, Interrupted, Interruption, Output, RunLog, interruptible, train
from minrnn.training import log as log_module
from minrnn.training.stopping import SIGNALS

pytestmark = pytest.mark.usefixtures("cache")

NUMBERS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    trained(run_config(corpus), run_dir)
    return run_dir


def failing(error: int, at: int) -> type[io.StringIO]:
    """Return a kind of stream whose `at`-th write and all after it fail."""

    class Stream(io.StringIO):
        left = at

        def write(self, text: str) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(error, os.strerror(error))
            return super().write(text)

    return Stream


@pytest.mark.parametrize(
    ("error", "is_terminal"), [(errno.EPIPE, False), (errno.ENOSPC, False), (errno.EIO, True)]
)
def test_output_that_nobody_takes_is_a_request_to_stop(
    corpus: Path, tmp_path: Path, whole: Path, error: int, is_terminal: bool
) -> None:
    config = run_config(corpus)
    stopped = 0
    for at in range(3, 40):  # the first lines, of a run that has not begun, are errors as any
        run_dir = tmp_path / f"parts{at}"
        console = Output(file=failing(error, at)(), force_terminal=is_terminal, width=80)
        with pytest.raises((Interrupted, OSError)) as stop:
            train(config, run_dir, log=RunLog(console))
        if not (run_dir / "checkpoints" / "last").exists():
            continue
        assert "stopped and saved after step" in str(stop.value)
        assert getattr(stop.value, "signum", None) == (BROKEN_PIPE if error == errno.EPIPE else None)
        trained(config, run_dir, resume=True)
        assert_same_run(whole, run_dir)
        stopped += 1
        if stopped == 2:
            break
    assert stopped == 2


def test_a_disk_that_is_full_when_metrics_are_written_loses_no_line(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that could not be written is in the checkpoint, though what follows fits on the disk again."""
    config = run_config(corpus)
    write = log_module._write_line

    def cut(file: Any, line: bytes) -> None:
        if json.loads(line)["step"] == 9:
            file.write(line[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        write(file, line)

    with monkeypatch.context() as patch:
        patch.setattr(log_module, "_write_line", cut)
        with pytest.raises(OSError, match="No space left on device; stopped and saved after step 9") as full:
            trained(config, tmp_path / "parts")
    assert full.value.filename == str(tmp_path / "parts" / "metrics.jsonl")
    trained(config, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


@pytest.mark.parametrize("where", ["open", "add_scalar", "close"])
def test_tensorboard_that_fails_is_said_and_costs_nothing(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from torch.utils import tensorboard

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = "__init__" if where == "open" else where
    monkeypatch.setattr(tensorboard.SummaryWriter, name, fail)
    box = io.StringIO()
    train(run_config(corpus), tmp_path / "run", log=RunLog(Console(file=box)))
    assert box.getvalue().count("TensorBoard's files end here (OSError: ") == 1
    assert_same_run(whole, tmp_path / "run")


# --- signals ---------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Any:
    """Signals that raise, instead of ending the tests, as the command line has them."""

    def end(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signum)

    before = {signum: signal.signal(signum, end) for signum in NUMBERS}
    yield end
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_one_signal_asks_and_a_second_one_of_any_kind_ends(first: int, second: int, handlers: Any) -> None:
    with interruptible() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), first)
        assert interruption.signum == first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert all(signal.getsignal(signum) is handlers for signum in NUMBERS)


@pytest.mark.parametrize("signum", NUMBERS)
def test_a_signal_that_is_ignored_stays_ignored(signum: int, handlers: Any) -> None:
    signal.signal(signum, signal.SIG_IGN)
    with interruptible() as interruption:
        assert signal.getsignal(signum) is signal.SIG_IGN
        os.kill(os.getpid(), signum)
    assert not interruption.requested


@pytest.mark.parametrize("stream", [None, io.StringIO(), "full", "closed"])
def test_a_notice_that_cannot_be_written_leaves_the_request(
    stream: Any, handlers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stream == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full to write to")
    with contextlib.ExitStack() as files, monkeypatch.context() as patch:
        if isinstance(stream, str):
            is_closed = stream == "closed"
            stream = files.enter_context(Path(os.devnull if is_closed else "/dev/full").open("w"))
            if is_closed:
                stream.close()
        patch.setattr("sys.stderr", stream)
        with interruptible() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.signum == signal.SIGTERM


def test_outside_the_main_thread_nothing_is_changed(handlers: Any) -> None:
    found: list[Any] = []

    def look() -> None:
        with interruptible() as interruption:
            found.extend([interruption.requested, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False, handlers]


@pytest.mark.parametrize("moment", ["_save", "evaluate", "batch"])
def test_a_signal_at_any_moment_of_a_step_saves_it(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, handlers: Any, moment: str
) -> None:
    """While it is saved, while it is evaluated, while its batch is made."""
    from minrnn.tasks import TextTask
    from minrnn.training import loop

    config = run_config(corpus)
    owner, name = (loop, "save_last") if moment == "_save" else (TextTask, moment)
    done, left = getattr(owner, name), [signal.SIGTERM]

    def ask(*args: Any, **kwargs: Any) -> Any:
        if left:  # a second one would end it: these moments come again
            os.kill(os.getpid(), left.pop())
        return done(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ask)
        with pytest.raises(Interrupted, match="SIGTERM: stopped and saved after step"):
            trained(config, tmp_path / "parts")
    trained(config, tmp_path / "parts", resume=True)
    assert_same_run(whole, tmp_path / "parts")


def test_a_signal_after_the_last_look_of_a_step_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop looks twice in a step that is not saved anyway; the signal comes before the third time."""
    looks = count(1)

    def requested(self: Interruption) -> bool:
        self.signum = signal.SIGTERM if next(looks) > 2 else 0
        return bool(self.signum)

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "requested", property(requested))
        with pytest.raises(Interrupted, match="SIGTERM: stopped and saved after step 1"):
            trained(run_config(corpus), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "checkpoints" / "last" / "trainer.json").read_text())
    assert saved["step"] == 1


def test_nothing_is_met_before_it_is_asked() -> None:
    assert not Interruption().requested
    assert Interruption(signum=signal.SIGTERM).requested
    broken = Interruption()
    with broken.guard_output():
        raise BrokenPipeError(errno.EPIPE, "gone")
    with broken.guard_output():
        raise OSError(errno.ENOSPC, "full")
    assert str(broken.to_exception("step 3")) == "SIGPIPE: stopped and saved after step 3"


# --- claims ----------------------------------------------------------------------------------------------


def test_a_run_that_is_at_work_is_left_to_itself(corpus: Path, tmp_path: Path) -> None:
    from minrnn.training import load_trained

    config, run_dir = run_config(corpus), tmp_path / "run"
    trained(config, run_dir)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with claim(run_dir):
        for resume in (False, True):
            with pytest.raises(InUseError, match="in use by process"):
                trained(config, run_dir, resume=resume)
        import torch

        load_trained(run_dir, "best", torch.device("cpu"))  # reading is free
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
