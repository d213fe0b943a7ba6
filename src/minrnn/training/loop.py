"""The one training loop: batches in, a run directory out."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minrnn.models import SequenceModel, load_checkpoint, save_checkpoint
from minrnn.ops import engines
from minrnn.tasks import TASKS, TextTask
from minrnn.training.config import RunConfig, read_config
from minrnn.training.log import RunLog, plot_losses, write_json
from minrnn.training.optim import clip_gradients, learning_rate_at, make_optimizer, set_learning_rate
from minrnn.training.provenance import provenance
from minrnn.training.resume import Interrupted, TrainState, check_unchanged, interruptible, load_last, save_last


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or NaN: the weights of that step are of no use, nor any after it."""


def train(config: RunConfig, run_dir: Path, *, resume: bool = False, log: RunLog) -> dict[str, Any]:
    """Train a model as a configuration says, and leave everything about it in a directory.

    The directory holds config.json, metrics.jsonl, checkpoints/best and checkpoints/last, results.json, loss.png and
    tensorboard/ (the last two where matplotlib and tensorboard are installed). A run that was stopped and is resumed
    ends with the same weights, to the last bit on a CPU with the same number of threads, as one that was not.

    Args:
        config: the whole run.
        run_dir: its directory; new, or, to resume, one that this function made.
        resume: go on from `run_dir`'s last checkpoint (from the first step, where it has none yet).
        log: where progress is reported.

    Returns:
        What results.json holds: the metrics of the best weights on the whole validation split, the step they are of,
        tokens, seconds, parameters, mixer, device, machine, versions and commit.

    Raises:
        FileExistsError: when `run_dir` holds a run and `resume` is False.
        FileNotFoundError: when it holds none and `resume` is True.
        ValueError: when the configuration cannot be run, or is not the resumed run's.
        NonFiniteLoss: when training diverges; the last good checkpoint stays.
        Interrupted: after SIGINT or SIGTERM, when the state is saved.
        OSError: when a file cannot be written; what was saved before is still whole.
    """
    if not resume:
        _check_new(run_dir)
    run = Run(config, run_dir, log)
    run.begin(resume)
    settings = config.train
    with log.open(run_dir, run.state.step, settings.steps), interruptible() as interruption:
        while run.state.step < settings.steps:
            run.step()
            if run.due(settings.log_every):
                run.report()
            if run.due(settings.eval_every):
                run.evaluate()
            if run.due(settings.checkpoint_every):
                run.save()
            if interruption.signum:
                run.save()
                raise Interrupted(interruption.signum, run.state.step)
    return run.finish()


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a CUDA GPU where there is one, and the CPU elsewhere.

    Raises:
        ValueError: for a name that is no device, or one that this machine or this build of torch lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto, or one that torch can use here, got {name!r}: {reason}") from error
    return device


class Run:
    """A run in progress: the parts that `train` moves, and the moves.

    Args:
        config: the whole run.
        run_dir: where it writes.
        log: where it reports.
    """

    def __init__(self, config: RunConfig, run_dir: Path, log: RunLog) -> None:
        self.settings, self.run_dir, self.log = config.train, run_dir, log
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        torch.manual_seed(self.settings.seed)
        self.device = choose_device(self.settings.device)
        self.task: TextTask = TASKS["text"](config.task)
        self.config = dataclasses.replace(config, model=self.task.model_config(config.model))
        self.model = SequenceModel(self.config.model).to(self.device)
        self.optimizer = make_optimizer(self.model, self.settings)
        self.state = TrainState()
        self._pending: list[Tensor] = []  # (loss, norm) of steps whose values were not yet fetched from the device
        self._seconds_before = 0.0
        self._session_started = self._window_started = time.perf_counter()
        self._window_tokens = 0

    def begin(self, resume: bool) -> None:
        """Claim the run's directory, say what will be trained, and go on from the last checkpoint where asked to."""
        if resume:
            check_unchanged(read_config(self.run_dir), self.config)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "config.json", self.config.to_dict())
        self.log.note(self.describe())
        if resume:
            self._restore()
        self._session_started = self._window_started = time.perf_counter()

    def describe(self) -> str:
        """Return one line: the engine, the model and its parameters, the data."""
        served = [engine.name for engine in engines() if engine.serves and engine.device in (self.device.type, "any")]
        return (
            f"{self.device}, engine {served[0]}; {self.config.model.mixer}, {self.parameters / 1e6:.2f} M parameters; "
            f"{self.task.describe()}"
        )

    @property
    def parameters(self) -> int:
        """Trainable numbers in the model; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) happens after this one."""
        step = self.state.step
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def step(self) -> None:
        """Take one step: the gradients of `accumulate` batches, clipped, into the optimiser."""
        set_learning_rate(self.optimizer, learning_rate_at(self.state.step, self.settings))
        losses = [self._gradients(part) for part in range(self.settings.accumulate)]
        norm = clip_gradients(self.model, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self._pending.append(torch.stack([torch.stack(losses).mean(), norm]))

    def report(self) -> None:
        """Log the means over the steps since the last report."""
        self._collect()
        state = self.state
        metrics = {
            "loss": math.fsum(state.losses) / len(state.losses),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": math.fsum(state.grad_norms) / len(state.grad_norms),
            "tokens": state.tokens,
            "tokens_per_second": self._window_tokens / (time.perf_counter() - self._window_started),
        }
        self.log.training(state.step, metrics)
        state.losses, state.grad_norms = [], []
        self._window_tokens, self._window_started = 0, time.perf_counter()

    def evaluate(self) -> None:
        """Measure the model on the validation split, and keep its weights if they are the best so far."""
        self._collect()
        began = time.perf_counter()
        metrics = self.task.evaluate(self.model, max_tokens=self.settings.eval_tokens)
        is_best = not self.state.best or metrics["val_loss"] < self.state.best["val_loss"]
        if is_best:
            self.state.best = {"step": self.state.step, **metrics}
            save_checkpoint(self.run_dir / "checkpoints" / "best", self.model, extra=self._extra())
        self.log.evaluation(self.state.step, metrics, is_best)
        self._window_started += time.perf_counter() - began  # speed is that of training alone

    def save(self) -> None:
        """Write the checkpoint that the run would resume from."""
        self._collect()
        began = time.perf_counter()
        self.state.seconds = self._seconds_before + began - self._session_started
        last = self.run_dir / "checkpoints" / "last"
        save_last(last, self.model, self.optimizer, self.state, self._extra())
        self._window_started += time.perf_counter() - began

    def finish(self) -> dict[str, Any]:
        """Measure the best weights on the whole validation split, write results.json and loss.png."""
        best = self.state.best
        if self.settings.eval_tokens:
            model, _ = load_checkpoint(self.run_dir / "checkpoints" / "best")
            best = {"step": best["step"], **self.task.evaluate(model.to(self.device), max_tokens=0)}
        results = {
            "recipe": self.config.recipe,
            "mixer": self.config.model.mixer,
            "parameters": self.parameters,
            **best,
            "tokens": self.state.tokens,
            "seconds": self._seconds_before + time.perf_counter() - self._session_started,
            **provenance(self.device),
        }
        write_json(self.run_dir / "results.json", results)
        problem = plot_losses(self.run_dir)
        if problem:
            self.log.note(problem)
        return results

    def _restore(self) -> None:
        last = self.run_dir / "checkpoints" / "last"
        if not checkpoint_exists(last):
            self.log.note("no checkpoint yet: starting from the first step")
            return
        self.state, extra = load_last(last, self.model, self.optimizer)
        if extra["corpus"] != self.task.sha256:
            raise ValueError(
                f"resume: {self.config.task.source} is not the text that this run was trained on: it has changed; "
                "start a new run"
            )
        self._seconds_before = self.state.seconds
        self.log.note(f"resumed after step {self.state.step}")

    def _gradients(self, part: int) -> Tensor:
        """Add one batch's share to the gradients, and return its loss (not synchronised)."""
        settings, state = self.settings, self.state
        index = state.step * settings.accumulate + part
        if settings.carry_state:
            batch = self.task.stream_batch(index, settings.batch_size)
            carry = None if batch.fresh else state.carry
        else:
            batch, carry = self.task.batch(index, settings.batch_size, settings.seed), None
        half = settings.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            loss, carry = self.task.loss(self.model, batch, carry)
        (loss / settings.accumulate).backward()
        state.carry = detached(carry) if settings.carry_state else None
        state.tokens += batch.targets.numel()
        self._window_tokens += batch.targets.numel()
        return loss.detach()

    def _collect(self) -> None:
        """Fetch the losses of the steps since the last time, and stop the run where one is not finite.

        Steps are checked together, when a value is wanted anyway, because fetching one waits for the device; and
        always before an evaluation or a checkpoint, so that neither ever holds weights that have diverged.
        """
        if not self._pending:
            return
        first = self.state.step - len(self._pending) + 1
        for step, (loss, norm) in enumerate(torch.stack(self._pending).tolist(), start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLoss(
                    f"step {step}: the loss is {loss} and its gradient's norm {norm}; lower train.learning_rate "
                    f"({self.settings.learning_rate:g}), lengthen train.warmup_steps ({self.settings.warmup_steps}) "
                    f"or tighten train.grad_clip ({self.settings.grad_clip:g}). Checkpoints in "
                    f"{self.run_dir / 'checkpoints'} are from before it"
                )
            self.state.losses.append(loss)
            self.state.grad_norms.append(norm)
        self._pending.clear()

    def _extra(self) -> dict[str, Any]:
        """Return what is saved with a model so that it can be used without its run."""
        return {
            "step": self.state.step,
            "vocabulary": self.task.vocabulary.to_dict(),
            "corpus": self.task.sha256,
        }


def detached(state: Any) -> Any:
    """Return a nested state with every tensor cut off from the graph that computed it."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.detach()
    return tuple(detached(part) for part in state)


def _check_new(run_dir: Path) -> None:
    """Refuse to write into a directory that holds something."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise FileExistsError(f"{run_dir} already exists; resume that run with --resume, or choose another --run")
