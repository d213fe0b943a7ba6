"""The training loop, which writes a run directory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.distributed import ALONE, Ranks
from minrnn.files import check_kind, claim, find_directory, recover_directory, write_json
from minrnn.files.claims import LOCK_FILE
from minrnn.mixers.convolution import CausalConv
from minrnn.models import map_state, save_checkpoint
from minrnn.models.shards import own_part
from minrnn.ops import engines
from minrnn.tasks import make_task
from minrnn.tasks.task import evaluation_mode
from minrnn.training.batches import Batches
from minrnn.training.compilation import Compilation
from minrnn.training.config import Precision, RunConfig, read_config
from minrnn.training.log import RunLog, check_written, plot_losses, read_metrics
from minrnn.training.memory import keep_freed_memory
from minrnn.training.optim import clip_gradients, learning_rate_at, make_optimizers, set_learning_rate
from minrnn.training.provenance import provenance
from minrnn.training.resume import (
    CarriedState,
    TrainState,
    check_carry,
    check_resumable,
    check_unchanged,
    gather_carry,
    load_last,
    save_last,
    take_carry,
)
from minrnn.training.stopping import Interruption, SharedInterruption, interruptible


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss, the gradient or the weights are infinite or NaN."""


def train(
    config: RunConfig, run_dir: Path | str, *, resume: bool = False, log: RunLog, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Train a model and write the results to a directory.

    The directory holds config.json, metrics.jsonl, checkpoints/best and checkpoints/last, and at the end
    results.json; also loss.png and tensorboard/ if matplotlib and tensorboard are installed. A run that was
    stopped, in whatever way, and resumed ends with the weights of an uninterrupted one: bit for bit on a CPU
    with the same number of threads. The directory is locked against other runs, but not against reading.

    With several ranks, each calls this function with the same arguments, and computes its rows of every batch
    of `train.batch_size` sequences. The first rank writes the files; the run may be resumed with another
    number of ranks, up to rounding.

    Args:
        config: the configuration of the run.
        run_dir: its directory; new, or, to resume, that of an earlier call.
        resume: resume from the last checkpoint in `run_dir` (from the first step if there is none yet).
        log: the log; that of the first rank is written.
        ranks: the processes that train the model together, from `minrnn.distributed.join`.

    Returns:
        The content of results.json: the metrics of the last weights on the whole validation split; `best`,
        the metrics and the step of the best evaluation during training; the unit of the loss; tokens,
        seconds, parameters, mixer, device, machine, versions and commit.

    Raises:
        InUseError: another run uses `run_dir`.
        FileExistsError: `run_dir` is not empty and `resume` is False.
        FileNotFoundError: `run_dir` is not a run directory and `resume` is True.
        TypeError: `config` is no RunConfig, or `log` no RunLog.
        ValueError: the configuration is invalid, or differs from that of the run to resume.
        NonFiniteLossError: training diverged; the checkpoints are from before that.
        Interrupted: SIGINT, SIGTERM, SIGHUP or a closed output requested a stop; the state is saved.
        OSError: a file cannot be written; earlier checkpoints are intact, and if it was a file of the log,
            the state is saved.
    """
    check_kind("train", "config", config, RunConfig)
    check_kind("train", "log", log, RunLog)
    run_dir = Path(run_dir).expanduser()
    with claim(run_dir, log.note) if ranks.is_first else nullcontext():
        return _train(config, run_dir, resume, log, ranks)


def _train(config: RunConfig, run_dir: Path, resume: bool, log: RunLog, ranks: Ranks) -> dict[str, Any]:
    if not resume and ranks.is_first:
        _check_new(run_dir)
    keep_freed_memory()
    run = Run(config, run_dir, log, ranks)
    run.begin(resume)
    settings, stop = config.train, run.interruption
    with run.open_log(), products_of(settings.precision):
        with interruptible(stop):
            while run.state.step < settings.steps and not stop.requested:
                run.step()
                if run.due(settings.log_every):
                    run.report()
                if run.due(settings.eval_every):
                    run.evaluate()
                stop.agree()
                if run.due(settings.checkpoint_every) or stop.requested:
                    run.save()
        stop.agree()
        if stop.requested:
            run.save()  # the request may have come after the last save
            raise stop.to_exception(f"step {run.state.step}")
        return run.finish()


@contextmanager
def products_of(precision: Precision) -> Iterator[None]:
    """Set the precision of float32 matrix products for the block; torch has this setting per process only.

    On processors with instructions for them (AMX, AVX-512 with bfloat16), products of factors rounded to
    bfloat16 and summed in float32 take a quarter of the time; a GPU uses its tensor cores.
    """
    before = torch.get_float32_matmul_precision()
    if precision == "bfloat16-products":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a CUDA GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is unknown, or not available on this machine or in this build of torch.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto or one that works here, got {name!r}: {reason}") from error
    return device


class Run:
    """A run in progress: task, model, optimizers and state, and the operations of the training loop.

    Args:
        config: the configuration; the task completes that of the model.
        run_dir: the run's directory.
        log: the log.
        ranks: the processes that train the model together.
    """

    def __init__(self, config: RunConfig, run_dir: Path, log: RunLog, ranks: Ranks = ALONE) -> None:
        divided = config.train.weights == "sharded"
        ranks = ranks.sharing(config.train.sequence_ranks, weights=divided)
        self.settings, self.run_dir, self.log, self.ranks = config.train, run_dir, log, ranks
        # Set even if unchanged: this stops MKL from using fewer threads under load, which would change the
        # order of its sums, and with it the last bits of a resumed run.
        torch.set_num_threads(ranks.threads(self.settings.threads))
        torch.manual_seed(self.settings.seed)
        self.device = choose_device(ranks.device(self.settings.device))
        self._made_by = provenance(self.device)  # at the start: the code that runs
        config = config.resolved()
        self.task = ranks.in_order("task", lambda: make_task(config.task))
        self.config = dataclasses.replace(config, model=self.task.model_config(config.model))
        self.model = self.task.make_model(self.config.model)
        self._batches = Batches(self.task, self.settings, ranks, _least_steps(self.model))
        self._called = ranks.distribute(self.model, self.device)
        if self.settings.compile and ranks.size > 1:
            raise ValueError(f"train.compile must be off with several ranks, got {ranks.size} ranks")
        self._compilation = Compilation(self.model) if self.settings.compile else None
        self.carries_state = self.settings.carry_state or self.task.carries_state
        self.optimizers = make_optimizers(self.model, self.settings)
        self.state = TrainState()
        self.interruption = Interruption() if ranks.size == 1 else SharedInterruption(ranks=ranks)
        self._pending: list[Tensor] = []  # (loss, norm) of recent steps, still on the device
        self._seconds_before = 0.0  # spent by earlier sessions
        self._tokens_since_report = 0
        # Step and metrics of the last evaluation with the length of the final one.
        self._whole: tuple[int, dict[str, float]] | None = None
        self._session_started = self._report_started = time.perf_counter()

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def begin(self, resume: bool) -> None:
        """Log the run, restore the last checkpoint if `resume`, and write config.json."""
        if resume:
            check_unchanged(read_config(self.run_dir), self.config)
            check_resumable(self.run_dir)
        self.log.note(self.describe())
        if self.settings.warmup_steps >= self.settings.steps:
            self.log.note(
                "note: train.warmup_steps is not below train.steps: the peak rate is never reached, and "
                "train.min_learning_rate_ratio has no effect"
            )
        if resume:
            self._restore()
        for what, value in (
            ("the configuration", self.config.to_dict()),
            ("the data", self.task.sha256),
            ("the step to go on from", self.state.step),  # the first rank writes only after all have read
        ):
            self.ranks.check_equal(what, value)
        if self.ranks.is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.run_dir / "config.json", self.config.to_dict())
        self._session_started = self._report_started = time.perf_counter()

    def open_log(self) -> AbstractContextManager[object]:
        """Return a context in which the log's files are open, on the rank that writes them."""
        if not self.ranks.is_first:
            return nullcontext()
        return self.log.open(self.run_dir, self.state.step, self.settings.steps, self.state.unwritten)

    def describe(self) -> str:
        """Return a description of the engine, the model and the data, for the log."""
        device = self.device.type
        active = next(engine for engine in engines() if engine.serves and engine.device in (device, "any"))
        model = self.config.model
        return (
            f"{self.ranks.describe()}{self.device}, engine {active.name} ({active.detail})\n"
            f"{model.mixer}, {_count(model.num_layers, 'layer')}, {self.parameters / 1e6:.2f} M parameters\n"
            f"{self.task.describe()}"
        )

    def due(self, every: int) -> bool:
        """Whether an action at intervals of `every` steps (0: only at the end) is due after this step."""
        step = self.state.step
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def step(self) -> None:
        """Take one optimizer step with the clipped mean gradient of `accumulate` batches."""
        self.ranks.reseed(self.settings.seed, self.state.step)
        set_learning_rate(self.optimizers, learning_rate_at(self.state.step, self.settings))
        with self._compilation.watch() if self._compilation else nullcontext():
            losses = [self._gradients(part) for part in range(self.settings.accumulate)]
        norm = clip_gradients(self.model, self.settings.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self._pending.append(torch.stack([torch.stack(losses).mean(), norm]))
        self._note_compilation()

    def report(self) -> None:
        """Log the means over the steps since the last report."""
        self._collect()
        state = self.state
        metrics = {
            "loss": math.fsum(state.losses) / len(state.losses),
            "learning_rate": learning_rate_at(state.step - 1, self.settings),
            "grad_norm": math.fsum(state.grad_norms) / len(state.grad_norms),
            "tokens": state.tokens,
            "seconds": self._seconds(),
            "tokens_per_second": self._tokens_since_report / (time.perf_counter() - self._report_started),
        }
        with self.interruption.guard_output():
            self.log.training(state.step, metrics)
        state.losses, state.grad_norms = [], []
        self._tokens_since_report, self._report_started = 0, time.perf_counter()

    def evaluate(self) -> None:
        """Evaluate the model on the validation split, and save its weights if they are the best so far."""
        self._collect()
        began = time.perf_counter()
        metrics = self._measure("evaluating", self.settings.eval_tokens)
        if not math.isfinite(metrics["val_loss"]):
            raise NonFiniteLossError(self._advice(f"its val_loss is {metrics['val_loss']}"))
        if self.settings.eval_tokens == self.settings.final_eval_tokens:
            self._whole = self.state.step, metrics
        chosen_by = self.task.chosen_by
        is_best = metrics[chosen_by] < self.state.best.get(chosen_by, math.inf)
        if is_best:
            if self.ranks.saves:
                best = self.run_dir / "checkpoints" / "best"
                save_checkpoint(best, self.model, extra=self._extra(), files=self.task.saved_files)
            self.state.best = {"step": self.state.step, **metrics}
        with self.interruption.guard_output():
            self.log.evaluation(self.state.step, metrics, is_best)
        self._report_started += time.perf_counter() - began  # not part of tokens_per_second

    def save(self) -> None:
        """Write the checkpoint for resuming."""
        self._collect()
        finite = all(own_part(parameter).isfinite().all() for parameter in self.model.parameters())
        if self.ranks.highest([not finite])[0]:
            raise NonFiniteLossError(self._advice("its weights are not finite"))
        began = time.perf_counter()
        self.state.seconds = self._seconds()
        self.state.unwritten = self.log.unwritten
        self.log.flush()
        last, ranks = self.run_dir / "checkpoints" / "last", self.ranks
        state = gather_carry(self.state, ranks, self._batches.carried_rows)
        if ranks.saves:
            files = self.task.saved_files
            save_last(last, self.model, self.optimizers, state, self.config, self._extra(), files)
        self._report_started += time.perf_counter() - began

    def finish(self) -> dict[str, Any]:
        """Run the final evaluation; write results.json and loss.png, and return the results."""
        if self._whole is None or self._whole[0] != self.state.step:
            most = self.settings.final_eval_tokens
            what = "evaluating on the whole validation split" if most == 0 else "evaluating"
            self._whole = self.state.step, self._measure(what, most)
        step, metrics = self._whole
        results = {
            "recipe": self.config.recipe,
            "mixer": self.config.model.mixer,
            "parameters": self.parameters,
            "step": step,
            **metrics,
            "unit": self.task.unit,
            "best": self.state.best,
            "tokens": self.state.tokens,
            "seconds": self._seconds(),
            **self._made_by,
        }
        if not self.ranks.is_first:
            return results
        write_json(self.run_dir / "results.json", results)
        problem = plot_losses(self.run_dir, self.task.unit)
        if problem:
            self.log.note(f"no loss.png: {problem}")
        return results

    def _measure(self, what: str, max_tokens: int) -> dict[str, float]:
        """Evaluate the model, and report progress."""

        def tell(fraction: float) -> None:
            with self.interruption.guard_output():
                self.log.busy(what, fraction)

        tell(0.0)
        ranks = self.ranks
        with ranks.evaluating(self.model):
            found = self.task.evaluate(self.model, max_tokens=max_tokens, tell=tell, split=ranks)
        return ranks.first_says(lambda: found)  # what is decided by it is decided alike

    def _check_never_saved(self) -> None:
        """Raise FileNotFoundError if the last checkpoint is missing though the run has saved one."""
        metrics = self.run_dir / "metrics.jsonl"
        done = max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0
        saved_by = self.settings.checkpoint_every or done
        if (self.run_dir / "results.json").exists() or done > saved_by:
            raise FileNotFoundError(
                f"resume: {self.run_dir / 'checkpoints' / 'last'} is missing, though step {done} was "
                "reached; put it back, or start a new run in another directory"
            )

    def _restore(self) -> None:
        last = self.run_dir / "checkpoints" / "last"
        if self.ranks.is_first:
            for directory in (last, last.with_name("best")):
                recover_directory(directory)
        self.ranks.highest([0])  # the others read after that
        try:
            find_directory(last)
        except FileNotFoundError:
            self._check_never_saved()
            self.log.note("no checkpoint yet: starting from the first step")
            return
        self.state, extra = load_last(last, self.model, self.optimizers, self.config, self.log.note)
        if extra.get("corpus") != self.task.sha256:
            raise ValueError(
                f"resume: the text or data has changed since this run was trained on it; it is now "
                f"{self.task.describe()}; start a new run"
            )
        check_carry(last, self.state.carry, [self._carried(steps) for steps in (1, 2)])
        take_carry(self.state, self.ranks, self._batches.carried_rows)
        state = self.state
        check_written(
            self.run_dir / "metrics.jsonl", state.step, len(state.losses), state.unwritten, self.log.note
        )
        if self.state.step > self.settings.steps:
            raise ValueError(
                f"resume: train.steps must be at least the {self.state.step} that are done, got "
                f"{self.settings.steps}"
            )
        self._seconds_before = self.state.seconds
        self.log.note(f"resumed after step {self.state.step}")

    def _gradients(self, part: int) -> Tensor:
        """Add the gradients of one batch, and return its loss (still on the device)."""
        settings, state = self.settings, self.state
        batches = self._batches(state.step * settings.accumulate + part)
        targets, weights = self._batches.targets(batches), self._batches.weights(batches)
        model = self._compilation.model if self._compilation else self._called
        is_last = part == settings.accumulate - 1
        with nullcontext() if is_last else self.ranks.accumulating(self._called):
            with self._autocast():
                parts = [self.task.loss(model, batch, state.carry) for batch in batches]
            losses = [weight * each for weight, (each, _) in zip(weights, parts, strict=True)]
            loss = torch.stack(losses).sum()
            (loss / settings.accumulate).backward()
        state.carry = map_state(torch.detach, parts[0][1]) if self.carries_state else None
        state.tokens += targets
        self._tokens_since_report += targets
        return loss.detach()

    def _note_compilation(self) -> None:
        """Log how long compiling took in the step that was just taken, if it did."""
        seconds = self._compilation.take_seconds() if self._compilation else 0.0
        if seconds:
            self._report_started += seconds  # not part of tokens_per_second
            with self.interruption.guard_output():
                self.log.note(f"step {self.state.step}: compiling the model took {seconds:.1f} s")

    @torch.no_grad()
    def _carried(self, steps: int) -> CarriedState:
        """Return the model's state after `steps` steps, or None if the run does not carry it."""
        if not self.carries_state:
            return None
        batch = self._batches.whole(0)[0].first(steps)
        with self.ranks.evaluating(self.model), evaluation_mode(self.model), self._autocast():
            return self.task.loss(self.model, batch)[1]

    def _autocast(self) -> torch.autocast:
        half = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def _collect(self) -> None:
        """Fetch the losses of recent steps; raise NonFiniteLossError if one is not finite.

        As fetching waits for the device, it is done for several steps at once: before a report, and before an
        evaluation or a checkpoint, so that neither uses weights that diverged.
        """
        if not self._pending:
            return
        first = self.state.step - len(self._pending) + 1
        own, norms = torch.stack(self._pending, dim=1).tolist()
        losses = [total / self.ranks.size for total in self.ranks.sums(own)]
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                finding = f"its loss is {loss} and the norm of the gradient {norm}"
                raise NonFiniteLossError(self._advice(finding, step))
            self.state.losses.append(loss)
            self.state.grad_norms.append(norm)
        self._pending.clear()

    def _advice(self, finding: str, step: int | None = None) -> str:
        settings = self.settings
        return (
            f"training diverged at step {step or self.state.step}: {finding}; lower train.learning_rate "
            f"({settings.learning_rate:g}), lengthen train.warmup_steps ({settings.warmup_steps}) or tighten "
            f"train.grad_clip ({settings.grad_clip:g}). The checkpoints in "
            f"{self.run_dir / 'checkpoints'} are from before that"
        )

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._session_started

    def _extra(self) -> dict[str, Any]:
        """Return the values saved with a model, with which it can be used without its run."""
        return {
            "step": self.state.step,
            "vocabulary": self.task.saved_vocabulary,
            "corpus": self.task.sha256,
        }


def _least_steps(model: nn.Module) -> int:
    """Return the fewest steps of a part of a sequence: the window of every convolution lies in one part."""
    return max([1, *(each.width - 1 for each in model.modules() if isinstance(each, CausalConv))])


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _check_new(run_dir: Path) -> None:
    """Raise FileExistsError unless a locked directory is empty."""
    if any(path.name != LOCK_FILE for path in run_dir.iterdir()):
        raise FileExistsError(f"{run_dir} already exists; resume it with --resume, or choose another --run")
