"""What a run says while it trains: lines or a bar for people, metrics.jsonl and TensorBoard for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, TypedDict

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from minrnn.files import read_json_lines, replace_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Metrics = Mapping[str, float]


class MetricsLine(TypedDict):
    """A line of metrics.jsonl; beside the step, what was measured at it."""

    step: int


class RunLog:
    """The one place to which a run reports; `train` opens it, writes to it and closes it.

    Args:
        console: where people read; a progress bar is drawn where it is a terminal, plain lines elsewhere.
            None says nothing, and only writes the files.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._view: _View = _Silence()
        self._metrics: IO[bytes] | None = None
        self._tensorboard: SummaryWriter | None = None

    def note(self, text: str) -> None:
        """Say one line."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def open(self, run_dir: Path, step: int, steps: int) -> RunLog:
        """Open the run's files at a step; what they say of later steps is dropped, to be said again.

        Args:
            run_dir: the run's directory.
            step: steps that are done; 0 at the start, more when the run is resumed.
            steps: steps in the whole run.

        Returns:
            This log, to be used as a context manager that closes the files.
        """
        self._metrics = _open_metrics(run_dir / "metrics.jsonl", step)
        self._tensorboard = _open_tensorboard(run_dir / "tensorboard", step)
        if self._tensorboard is None:
            self.note("tensorboard is not installed: metrics go to metrics.jsonl only")
        if self._console is not None:
            view = _ProgressBar if self._console.is_terminal else _Lines
            self._view = view(self._console, step, steps)
        return self

    def busy(self, text: str) -> None:
        """Say what goes on while no steps are taken, where there is a bar that would seem to be stuck."""
        self._view.busy(text)

    def training(self, step: int, metrics: Metrics) -> None:
        """Report the means over the last steps: loss, learning_rate, grad_norm, tokens_per_second."""
        self._write(step, metrics)
        self._view.training(step, metrics)

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None:
        """Report an evaluation on the validation split, and whether its val_loss is the lowest so far."""
        self._write(step, metrics)
        self._view.evaluation(step, metrics, is_best)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()
        self._view = _Silence()
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, step: int, metrics: Metrics) -> None:
        line = json.dumps({"step": step, **metrics}) + "\n"
        if self._metrics is not None:
            _write_line(self._metrics, line.encode())
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that was cut short, as a killed run leaves it, is left out.

    Args:
        path: the file.

    Returns:
        One dict a line: `step`, and either the training metrics or those of an evaluation.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no such dict.
    """
    return [dict(record) for record in read_json_lines(path, MetricsLine)]


def plot_losses(run_dir: Path, unit: str) -> str | None:
    """Draw loss.png from metrics.jsonl: training and validation loss over the steps.

    Args:
        run_dir: the run's directory.
        unit: what a loss is measured in.

    Returns:
        None, or, where the picture cannot be drawn, the reason.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed: no loss.png (pip install 'minrnn[plots]')"
    records = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "loss.png", dpi=150)
    return None


def _open_metrics(path: Path, step: int) -> IO[bytes]:
    """Open metrics.jsonl for appending, unbuffered, holding nothing of the steps after `step`."""
    kept = [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return path.open("ab", buffering=0)  # every line is on disk when it is reported, whatever ends the run


def _open_tensorboard(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def _write_line(file: IO[bytes], line: bytes) -> None:
    """Write a line, all of it; an unbuffered file may take only a part when the disk fills up."""
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error  # the system leaves the name out


class _View(Protocol):
    """How a person follows a run."""

    def busy(self, text: str) -> None: ...

    def training(self, step: int, metrics: Metrics) -> None: ...

    def evaluation(self, step: int, metrics: Metrics, is_best: bool) -> None: ...

    def close(self) -> None: ...


class _Silence:
    """Says nothing."""

    def busy(self, text: str) -> None:
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

    def busy(self, text: str) -> None:
        pass

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
    """A bar with the loss, the speed and the time left; evaluations stay above it as lines."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self._steps = steps
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._training = ""
        self._evaluation = ""
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def busy(self, text: str) -> None:
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
        parts.append(f"{metrics['bits_per_byte']:.4f} bits a byte")
    if "accuracy" in metrics:
        parts.append(f"accuracy {metrics['accuracy']:.4f}")
    if is_best:
        parts.append("best so far")
    return "  ".join(parts)


def _compact(value: float) -> str:
    """Write a count with three digits: 950, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(scaled >= 10) - int(scaled >= 100))}f}{unit}"
    return f"{value:.0f}"
