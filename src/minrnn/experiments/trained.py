"""Experiments whose trials are training runs: a recipe times a grid of settings and seeds."""

from __future__ import annotations

import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import isfinite
from typing import Any, ClassVar, Generic, Literal, TypeVar

from minrnn.experiments.experiment import Choice, Experiment, Scale, Tell, Trial, Workplace
from minrnn.experiments.variants import choose, every_mixer, settings_of
from minrnn.tasks import make_task
from minrnn.training import (
    RunConfig,
    RunLog,
    choose_device,
    load_recipe,
    load_trained,
    read_metrics,
    train,
)
from minrnn.training.threads import cpu_threads

__all__ = [
    "PAPER_TRAIN",
    "TINY_TRAIN",
    "GridPoint",
    "Size",
    "TrainedExperiment",
    "training",
    "training_seconds",
]

CURVE_POINTS = 80
"""Most points of a saved learning curve."""

PROBE_SEQUENCES = 4
"""Batch size of the step that is timed first for an estimate."""

PROBES = 3
"""Number of timed steps of each batch size."""

LONGEST_PROBE = 10.0
"""Seconds; the time of a longer step is extrapolated from smaller batches."""

SizeT = TypeVar("SizeT", bound="Size")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A scale of an experiment: the settings in which it differs from the recipe, table by table."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the task's configuration."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig."""
    seeds: int = 3
    """Number of seeds of the most important models."""
    other_seeds: int = 1
    """Number of seeds of all others."""


@dataclass(frozen=True)
class GridPoint:
    """A point of an experiment's grid, which is trained with several seeds."""

    name: str
    """Prefix of the names of its trials."""
    setting: Mapping[str, Any]
    """The settings that distinguish it from other points, including `mixer`."""
    config: RunConfig
    """The run's configuration, with seed 0."""
    seeds: int
    """Number of seeds, unless the choice sets it."""


def training(*, every: int, logs: int, **others: Any) -> dict[str, Any]:
    """Return fields of TrainConfig for a run that is evaluated and saved at the same steps.

    Args:
        every: steps between evaluations, and between checkpoints.
        logs: points of the learning curve between two evaluations, at most one a step.
        others: further fields.
    """
    return {"eval_every": every, "checkpoint_every": every, "log_every": max(1, every // logs), **others}


PAPER_TRAIN: dict[str, Any] = {"precision": "float32", "min_learning_rate_ratio": 1.0, "warmup_steps": 0}
"""Fields of TrainConfig if the paper states no schedule: a constant learning rate, in float32."""

TINY_TRAIN = training(
    every=1, logs=1, steps=2, batch_size=4, warmup_steps=1, min_learning_rate_ratio=0.1, eval_tokens=0
)
"""Fields of TrainConfig at the tiny scale."""


class TrainedExperiment(Experiment, Generic[SizeT]):
    """A grid over a recipe: every trial is a training run, which can be resumed, and an examination.

    A trial's configuration is the recipe's, overridden by the scale (`Size`), then by the mixer or variant,
    the point of the grid, and the seed.

    A trial's result holds the entries of `examine`, and: parameters, step, tokens, seconds (of the whole run,
    including resumed parts), training_seconds (without evaluations), the metrics of the last weights, `best`
    (validation metrics of the weights with the lowest validation loss, and their step), `curve` (step,
    training seconds, loss) and `evaluations` (step, training seconds and metrics).
    """

    uncounted = "evaluations not counted"
    recipe: ClassVar[str]
    """Name of the recipe."""
    sizes: ClassVar[Mapping[Scale, Any]]
    """The scales, each a `SizeT`."""
    common_train: ClassVar[Mapping[str, Any]] = {}
    """Training settings that override the recipe at every scale."""
    attention_train: ClassVar[Mapping[str, Any]] = {"precision": "float32"}
    """Training settings of attention where the others round matrix products to bfloat16.

    On a CPU torch's attention takes 1.6 to 4 times as long if the factors of its products are rounded one
    by one (heads of 32 and 48 channels, 136 and 256 steps).
    """
    weights: ClassVar[Literal["best", "last"]] = "best"
    """The weights to examine: those of the lowest validation loss, or the last ones."""

    def mixers(self) -> Sequence[str]:
        """Return the mixers and variants of the experiment."""
        return every_mixer()

    @abstractmethod
    def grid(self, size: SizeT, mixer: str) -> Iterator[GridPoint]:
        """Yield the grid points of a mixer or variant."""

    @abstractmethod
    def examine(self, model: Any, config: RunConfig, size: SizeT) -> dict[str, Any]:
        """Measure the trained weights, on data by which they were not selected."""

    def config(self, size: SizeT, mixer: str) -> RunConfig:
        """Return the recipe at a scale, with a mixer or variant."""
        settings = {**self.common_train, **size.train}
        config = load_recipe(self.recipe).override(model=size.model, task=size.task, train=settings)
        config = config.override(model=settings_of(mixer))
        if config.model.mixer == "attention" and config.train.precision == "bfloat16-products":
            config = config.override(train=self.attention_train)
        return config

    def trials(self, choice: Choice) -> list[Trial]:
        size: SizeT = self.sizes[choice.scale]
        return [
            trial
            for mixer in choose(choice.mixers, self.mixers())
            for point in self.grid(size, mixer)
            for trial in _trials(point, choice.seeds or point.seeds)
        ]

    def resolved(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's configuration, with defaults for newer settings that it lacks."""
        return _without_place(RunConfig.from_record(config))

    def measure(self, trial: Trial, place: Workplace, tell: Tell) -> dict[str, Any]:
        config = _placed(trial, place.choice)
        run_dir = place.folder / "run"
        resume = (run_dir / "config.json").is_file()
        if run_dir.exists() and not resume:  # killed before its first checkpoint
            shutil.rmtree(run_dir)
        results = train(config, run_dir, resume=resume, log=_TrialLog(tell, config.train.steps))
        tell(1.0, f"measuring the {self.weights} weights")
        device = choose_device(config.train.device)
        model = load_trained(run_dir, self.weights, device).model
        metrics = read_metrics(run_dir / "metrics.jsonl")
        kept = {name: value for name, value in results.items() if name not in PROVENANCE}
        return _rounded(
            {**kept, **_curves(metrics), **self.examine(model, config, self.sizes[place.choice.scale])}
        )

    def estimate(self, trial: Trial, choice: Choice) -> float:
        config = _placed(trial, choice)
        device = choose_device(config.train.device)
        task = make_task(config.task)
        model = task.make_model(task.model_config(config.model)).to(device)
        whole = config.train.batch_size

        numbers = count()

        def seconds(sequences: int) -> float:
            began = time.perf_counter()
            loss, _ = task.loss(model, task.batch(next(numbers), sequences, 0))
            loss.backward()
            loss.item()  # waits for the device
            return time.perf_counter() - began

        with cpu_threads(choice.threads):
            step = step_seconds(seconds, whole)
        return step * config.train.accumulate * config.train.steps


def step_seconds(seconds: Callable[[int], float], whole: int) -> float:
    """Estimate the time of a step of a whole batch.

    The first step, which allocates memory and loads code, is discarded; of the others the fastest is used,
    because other load on the machine only adds time. If a step of a whole batch takes too long to be timed,
    its time is extrapolated linearly from two batch sizes: a step has a fixed cost, so scaling a small batch
    in proportion would overestimate.

    Args:
        seconds: takes a step of a number of sequences, and returns its time.
        whole: sequences in a batch.
    """
    few = min(whole, PROBE_SEQUENCES)
    seconds(few)
    first = min(seconds(few) for _ in range(PROBES))
    step = first
    if few < whole:
        more = min(whole, 2 * few)
        second = min(seconds(more) for _ in range(PROBES))
        step = first + max(0.0, second - first) / (more - few) * (whole - few)
    if step < LONGEST_PROBE:
        step = min(seconds(whole) for _ in range(PROBES))
    return step


class _TrialLog(RunLog):
    """A run's log that reports the completed fraction."""

    def __init__(self, tell: Tell, steps: int) -> None:
        super().__init__()
        self.tell, self.steps, self._said = tell, steps, ""

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        super().training(step, metrics)
        self._said = f"loss {metrics['loss']:.3f}"
        self.tell(step / self.steps, self._said)

    def evaluation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        super().evaluation(step, metrics, is_best)
        found = (
            f"accuracy {metrics['accuracy']:.3f}"
            if "accuracy" in metrics
            else f"val {metrics['val_loss']:.3f}"
        )
        self.tell(step / self.steps, f"{self._said}  {found}")


PROVENANCE = ("recipe", "mixer", "device", "machine", "versions", "commit", "changes")
"""Keys of a run's results that a trial's record holds elsewhere."""


def training_seconds(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the seconds of training, without evaluations, up to each line of metrics.jsonl with a speed."""
    seconds, tokens, found = 0.0, 0, []
    for line in metrics:
        if "tokens_per_second" in line:
            seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
            tokens = line["tokens"]
            found.append((line["step"], seconds))
    return found


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the learning curve, thinned, and the evaluations, with the seconds of training up to each."""
    at = training_seconds(metrics)
    seconds = dict(at)
    curve = [[line["step"], seconds[line["step"]], line["loss"]] for line in metrics if "loss" in line]
    every = -(-len(curve) // CURVE_POINTS)
    evaluations = [
        {**line, "seconds": max([0.0, *(spent for step, spent in at if step <= line["step"])])}
        for line in metrics
        if "val_loss" in line
    ]
    return {
        "training_seconds": at[-1][1] if at else 0.0,
        "curve": curve[every - 1 :: every] if curve else [],
        "evaluations": evaluations,
    }


def _trials(point: GridPoint, seeds: int) -> Iterator[Trial]:
    for seed in range(seeds):
        config = point.config.override(train={"seed": seed})
        yield Trial(f"{point.name}-seed{seed}", {**point.setting, "seed": seed}, _without_place(config))


def _without_place(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON, without device and threads."""
    values = config.to_dict()
    return {**values, "train": {k: v for k, v in values["train"].items() if k not in ("device", "threads")}}


def _placed(trial: Trial, choice: Choice) -> RunConfig:
    here = {"device": choice.device, "threads": choice.threads}
    return RunConfig.from_dict(trial.config).override(train=here)


def _rounded(value: Any) -> Any:
    """Return JSON values with floats rounded to six significant digits."""
    if isinstance(value, float) and isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
