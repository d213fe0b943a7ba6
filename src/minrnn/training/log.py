"""Progress and metrics of a run: lines or a progress bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, TypedDict

from rich import progress
from rich.console import Console

from minrnn.files import check_kind, read_json_lines, replace_text
from minrnn.training.extras import attempt, draw, save_picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Metrics = Mapping[str, float]

LINE_SECONDS = 10.0
"""Seconds between two progress lines if the output is not a terminal."""


class Output(Console):
    """A console that raises BrokenPipeError if its reader has gone (as `head` does), instead of exiting.

    In a thread that redraws, the error is dropped: the thread that created the console raises it too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._owner = threading.current_thread()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except OSError:
            if threading.current_thread() is self._owner:
                raise

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, where rich would exit."""
        raise  # called within the except block


class MetricsLine(TypedDict):
    """A line of metrics.jsonl: the step, and further keys with the metrics."""

    step: int


class Pace:
    """Formats progress with an estimate of the remaining time.

    Args:
        what: the activity.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._first: tuple[float, float] | None = None  # a time, and the fraction completed by then

    def __call__(self, fraction: float) -> str:
        """Return a line for the completed fraction, between 0 and 1."""
        now = time.monotonic()
        if self._first is None or fraction < self._first[1]:
            self._first = now, fraction
        began, first = self._first
        if fraction == first:
            return self.what
        left = (now - began) / (fraction - first) * (1 - fraction)
        return f"{self.what}: {fraction:.0%}, about {left:.0f} s left"


class Progress:
    """Shows progress; a context manager that is called with the completed fraction.

    Args:
        console: the output; a line that is redrawn on a terminal, a new line every LINE_SECONDS elsewhere.
        what: the activity.
    """

    def __init__(self, console: Console, what: str) -> None:
        check_kind("Progress", "console", console, Console)
        self._console, self._pace = console, Pace(what)
        self._status = console.status(what) if console.is_terminal else None
        self._printed_at = time.monotonic()

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, fraction: float) -> None:
        """Show the completed fraction, between 0 and 1."""
        text = self._pace(fraction)
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._printed_at > LINE_SECONDS:
            self._printed_at = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class RunLog:
    """The log of a run: console, metrics.jsonl and TensorBoard; `train` opens, writes and closes it.

    Methods raise OSError if the console or metrics.jsonl cannot be written: the reader has gone, or the disk
    is full. A failure of TensorBoard's files, which are copies, is only noted.

    Args:
        console: the output: a progress bar on a terminal, plain lines elsewhere; None for files only.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._view: _View = _Silence()
        self._metrics: IO[bytes] | None = None
        self._tensorboard: SummaryWriter | None = None
        self._pace = Pace("")
        self.unwritten: list[dict[str, Any]] = []
        """Lines of metrics.jsonl from the first that could not be written."""

    def note(self, text: str) -> None:
        """Print one line."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def open(
        self, run_dir: Path, step: int, steps: int, unwritten: Sequence[Mapping[str, Any]] = ()
    ) -> RunLog:
        """Open the run's files at a step; records of later steps are dropped.

        Args:
            run_dir: the run's directory.
            step: completed steps; 0 at the start, more if the run is resumed.
            steps: total steps of the run.
            unwritten: lines up to this step that an earlier session could not write.

        Returns:
            This log, to be used as a context manager that closes the files.
        """
        self._metrics = _open_metrics(run_dir / "metrics.jsonl", step, unwritten)
        self._on_tensorboard(lambda: self._open_tensorboard(run_dir / "tensorboard", step))
        if self._console is not None:
            view = _ProgressBar if self._console.is_terminal else _Lines
            self._view = view(self._console, step, steps)
        return self

    def busy(self, text: str, fraction: float = 0.0) -> None:
        """Report an activity other than training, with its completed fraction, between 0 and 1."""
        if text != self._pace.what or fraction == 0:
            self._pace = Pace(text)
        self._view.busy(self._pace(fraction), fraction)

    def training(self, step: int, metrics: Metrics) -> None:
        """Report the means over the last steps: loss, learning_rate, grad_norm, tokens_per_second."""
        self._write(step, metrics)
        self._view.training(step, metrics)

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None:
        """Report an evaluation on the validation split, and whether it is the best so far."""
        self._write(step, metrics)
        self._view.evaluation(step, metrics, is_best)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # earlier writes have raised it
            self._view.close()
        with contextlib.suppress(OSError):
            self._on_tensorboard(self._close_tensorboard)
        self._view = _Silence()
        if self._metrics is not None:
            self._metrics.close()

    def flush(self) -> None:
        """Flush metrics.jsonl to disk, so that no checkpoint is ahead of it."""
        if self._metrics is not None and not self.unwritten:
            os.fsync(self._metrics.fileno())

    def _write(self, step: int, metrics: Metrics) -> None:
        record = {"step": step, **metrics}
        self._on_tensorboard(lambda: self._add_scalars(step, metrics))
        if self._metrics is not None:
            self.unwritten.append(record)
            if len(self.unwritten) == 1:  # no line may follow one that was written in part
                _write_line(self._metrics, (json.dumps(record) + "\n").encode())
                self.unwritten.clear()

    def _add_scalars(self, step: int, metrics: Metrics) -> None:
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def _on_tensorboard(self, act: Callable[[], object]) -> None:
        """Call a function that writes TensorBoard's files; on failure, note it and stop writing them."""
        if why_not := attempt(act):
            self._tensorboard = None
            self.note(f"note: TensorBoard's files end here ({why_not}); metrics.jsonl continues")

    def _open_tensorboard(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.note("tensorboard is not installed: metrics go to metrics.jsonl only")
            return
        self._tensorboard = SummaryWriter(folder, purge_step=step + 1)

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read metrics.jsonl; an incomplete last line, as a killed run may leave, is ignored.

    Args:
        path: the file.

    Returns:
        One dict per line: `step`, and the metrics of training or of an evaluation.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is invalid.
    """
    return [dict(record) for record in read_json_lines(Path(path).expanduser(), MetricsLine)]


def check_written(
    path: Path, step: int, pending: int, unwritten: Sequence[object], note: Callable[[str], None]
) -> None:
    """Check that a metrics.jsonl belongs to a checkpoint.

    Args:
        path: the file.
        step: step of the checkpoint.
        pending: steps since the last line of training metrics.
        unwritten: lines that are saved in the checkpoint instead.
        note: called with one line if the file is missing, which is not an error.

    Raises:
        ValueError: its last line of training metrics up to that step is of another step.
    """
    if unwritten:
        return
    if not path.exists():
        note(f"note: {path} is missing; a new one starts after step {step}")
        return
    found = max(
        (line["step"] for line in read_metrics(path) if "loss" in line and line["step"] <= step), default=0
    )
    if found != step - pending:
        raise ValueError(
            f"resume: {path} must have training metrics up to step {step - pending}, as the checkpoint of "
            f"step {step} has, got a last line of step {found}; it belongs to another run, or was truncated"
        )


def plot_losses(run_dir: Path, unit: str) -> str | None:
    """Plot training and validation loss over the steps, from metrics.jsonl to loss.png.

    Args:
        run_dir: the run's directory.
        unit: unit of the loss.

    Returns:
        None, or the reason if the plot cannot be drawn.
    """
    return draw(lambda: _draw_losses(run_dir, unit))


def _draw_losses(run_dir: Path, unit: str) -> None:
    from matplotlib.figure import Figure

    records = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.set_title(run_dir.name, parse_math=False)  # a $ in a name is not a formula
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_picture(figure, run_dir / "loss.png", dpi=150)


def _open_metrics(path: Path, step: int, unwritten: Sequence[Mapping[str, Any]]) -> IO[bytes]:
    """Open metrics.jsonl for appending, unbuffered, without lines of later steps."""
    kept = [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []
    replace_text(path, "".join(json.dumps(record) + "\n" for record in [*kept, *unwritten]))
    return path.open("ab", buffering=0)  # every line is written at once, even if the run is killed


def _write_line(file: IO[bytes], line: bytes) -> None:
    """Write a complete line; an unbuffered file may write a part of it when the disk fills up."""
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error  # write does not set the name


class _View(Protocol):
    """The console output of a run."""

    def busy(self, text: str, fraction: float) -> None: ...

    def training(self, step: int, metrics: Metrics) -> None: ...

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None: ...

    def close(self) -> None: ...


class _Silence:
    """No output."""

    def busy(self, text: str, fraction: float) -> None:
        pass

    def training(self, step: int, metrics: Metrics) -> None:
        pass

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """Plain lines: for pipes, files and batch systems."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._printed_at = 0.0

    def busy(self, text: str, fraction: float) -> None:
        if fraction == 0 or time.monotonic() - self._printed_at > LINE_SECONDS:
            self._printed_at = time.monotonic()
            if fraction:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def training(self, step: int, metrics: Metrics) -> None:
        rate = _compact(metrics["tokens_per_second"])
        self._print(step, f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  {rate} tokens/s")

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None:
        self._print(step, _evaluation_text(metrics, is_best))

    def close(self) -> None:
        pass

    def _print(self, step: int, text: str) -> None:
        done = f"step {step:>{len(str(self._steps))}}/{self._steps}"
        self._console.print(f"{done}  {text}", markup=False, highlight=False, soft_wrap=True)


class _ProgressBar:
    """A progress bar with loss, throughput and remaining time; evaluations are lines above it."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self._steps = steps
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=console,
            expand=True,
        )
        self._training = ""
        self._evaluation = ""
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def busy(self, text: str, fraction: float) -> None:
        self._bar.update(self._task, description=text)

    def training(self, step: int, metrics: Metrics) -> None:
        self._training = f"loss {metrics['loss']:.3f}  {_compact(metrics['tokens_per_second'])} tok/s"
        self._update(step)

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None:
        self._evaluation = f"val {metrics['val_loss']:.3f}"
        self._bar.console.print(f"step {step:>{len(str(self._steps))}}  {_evaluation_text(metrics, is_best)}")
        self._update(step)

    def close(self) -> None:
        self._bar.update(self._task, description=self._summary())
        self._bar.stop()

    def _update(self, step: int) -> None:
        self._bar.update(self._task, completed=step, description=self._summary())

    def _summary(self) -> str:
        return "  ".join(filter(None, (self._training, self._evaluation)))


def _evaluation_text(metrics: Metrics, is_best: bool) -> str:
    parts = [f"val_loss {metrics['val_loss']:.4f}"]
    if "bits_per_byte" in metrics:
        parts.append(f"{metrics['bits_per_byte']:.4f} bits per byte")
    if "accuracy" in metrics:
        parts.append(f"accuracy {metrics['accuracy']:.4f}")
    if is_best:
        parts.append("best so far")
    return "  ".join(parts)


def _compact(value: float) -> str:
    """Format a count with three digits: 950, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(scaled >= 10) - int(scaled >= 100))}f}{unit}"
    return f"{value:.0f}"
