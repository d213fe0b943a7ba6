"""The log of a run, and what else is said of one: literal lines, what is kept of metrics, signals, extras."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn.training import RunLog, interruptible
from minrnn.training import log as log_module
from minrnn.training.extras import FOREIGN_ERRORS, attempt
from minrnn.training.log import Pace, _compact, _open_metrics, _write_line, plot_losses
from minrnn.training.stopping import SIGNALS
from minrnn.training.threads import cpu_threads


def test_counts_have_three_digits() -> None:
    numbers = [0.4, 950, 1000, 9990, 10_000, 12_345, 100_000, 999_000, 1e6, 4.56e6, 10e6, 123.4e6]
    texts = "0 950 1.00k 9.99k 10.0k 12.3k 100k 999k 1.00M 4.56M 10.0M 123M"
    assert " ".join(map(_compact, numbers)) == texts


def test_the_time_left_is_that_of_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that begins at a half, as a resumed run does, has taken no time for the first."""
    times = iter([100.0, 110.0, 115.0])
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(times))
    pace = Pace("reading")
    assert [pace(fraction) for fraction in (0.5, 0.75, 0.9)] == [
        "reading",
        "reading: 75%, about 10 s left",
        "reading: 90%, about 4 s left",
    ]


class Slow(io.BytesIO):
    """A file that takes three bytes at a time."""

    def write(self, line: Any) -> int:
        return super().write(bytes(line)[:3])


def test_lines_are_written_whole() -> None:
    file: Any = Slow()
    _write_line(file, b'{"step": 12}\n')
    assert file.getvalue() == b'{"step": 12}\n'


def test_no_line_follows_one_that_was_written_in_part() -> None:
    class Full(io.BytesIO):
        name, left = "metrics.jsonl", 1

        def write(self, line: Any) -> int:
            self.left -= 1
            if self.left == -1:
                raise OSError(28, "No space left on device")
            return super().write(line)

    log, file = RunLog(), Full()
    log._metrics = file  # type: ignore[assignment]
    log.training(1, {})
    with pytest.raises(OSError, match="No space left"):
        log.training(2, {})
    log.training(3, {})
    assert [json.loads(line) for line in file.getvalue().splitlines()] == [{"step": 1}]
    assert log.unwritten == [{"step": 2}, {"step": 3}]


def test_metrics_are_on_the_disk_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = RunLog()
    log._metrics = (tmp_path / "metrics.jsonl").open("wb")
    log.flush()
    assert synced == [log._metrics.fileno()]
    log._metrics.close()


def test_metrics_of_later_steps_are_dropped_and_those_not_yet_written_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    with _open_metrics(path, 2, [{"step": 2, "loss": 1.0}]) as file:
        file.write(b'{"step": 4}\n')
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"step": 1}, {"step": 2}, {"step": 2, "loss": 1.0}, {"step": 4}]


def test_tensorboard_forgets_what_comes_after_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda folder, **options: opened.append(options))
    RunLog().open(tmp_path, 7, 10)._metrics.close()  # type: ignore[union-attr]
    assert opened == [{"purge_step": 8}]


def test_the_picture_shows_both_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    figures: list[Any] = []
    monkeypatch.setattr(log_module, "save_picture", lambda figure, path, **_: figures.append((figure, path)))
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_losses(tmp_path, "bits") is None
    ((figure, path),) = figures
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn == {"training": [[1, 3], [2, 2]], "validation": [[2, 2.5]]}
    assert figure.axes[0].get_ylabel() == "loss (bits)"
    assert path == tmp_path / "loss.png"


def test_signals_that_stop_a_run_are_their_own_again_afterwards() -> None:
    assert SIGNALS == ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in numbers}
    try:
        with interruptible():
            assert signal.default_int_handler not in map(signal.getsignal, numbers)
        assert {signal.getsignal(signum) for signum in numbers} == {signal.default_int_handler}
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (IndexError("far"), "IndexError: far"),
        (ZeroDivisionError("zero"), "ZeroDivisionError: zero"),
        (OSError("full"), "OSError: full"),
        (RuntimeError("one\n   two\tthree"), "RuntimeError: one two three"),
        *((kind("why"), f"{kind.__name__}: why") for kind in FOREIGN_ERRORS if kind is not LookupError),
    ],
)
def test_what_is_optional_fails_in_one_line(error: Exception, said: str) -> None:
    def fail() -> None:
        raise error

    assert attempt(fail) == said
    assert attempt(lambda: 1) is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_threads_are_those_asked_for_within_the_block(count: int) -> None:
    before = torch.get_num_threads()
    with cpu_threads(count) as used:
        assert torch.get_num_threads() == used == (count or before)
    assert torch.get_num_threads() == before
