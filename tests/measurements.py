"""Queries of the committed records, for the figures of the prose: see `statements.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from math import exp
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from minrnn import MinGRU, export_step
from minrnn.experiments.records import bests, by_kind, points
from minrnn.experiments.results import ResultsFolder
from minrnn.experiments.scores import BEST_TENTH
from minrnn.experiments.stability import LEARNED, steps_to
from minrnn.experiments.timed import exponent, series
from minrnn.export import FORMATS
from minrnn.tasks import FormalLanguageConfig, FormalLanguageTask

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks" / "results"

RECURRENCES = ("rnn", "gru", "lstm", "aaren", "s4d", "mamba")
"""Mixers beside ours whose state does not grow."""


MATCHED = ("width", "parameters")
"""In what the models of the experiment `shakespeare` are as large as minGRU's."""


class Below(NamedTuple):
    """A value below the printed figure: "less than half"."""

    value: float


class Above(NamedTuple):
    """A value that is printed rounded down: "at least 99.5 %"."""

    value: float


Values = Any
"""A figure, several of them in order, or whether a claim holds."""


@cache
def records(experiment: str) -> list[dict[str, Any]]:
    """Return the records of an experiment at the scale cpu."""
    return ResultsFolder(REPOSITORY / "results", experiment, "cpu").records()


@cache
def bench(name: str) -> dict[str, Any]:
    """Return the document of a benchmark."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


@cache
def short_recipe(mixer: str) -> list[dict[str, Any]]:
    """Return the earlier runs of the recipe shakespeare-cpu."""
    found = sorted((BENCHMARKS / "shakespeare-cpu").glob(f"{mixer}-?.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def runs(experiment: str, **setting: Any) -> list[dict[str, Any]]:
    """Return the records with these entries of their settings."""
    ((_, found),) = by_kind(
        [run for run in records(experiment) if setting.items() <= run["setting"].items()]
    ).items()
    return found


def results(experiment: str, *path: str, **setting: Any) -> list[float]:
    """Return an entry of the result of each of these records."""
    return bests(runs(experiment, **setting), *path)


def average(experiment: str, *path: str, **setting: Any) -> float:
    return mean(results(experiment, *path, **setting))


def evaluated(steps: int, reads: str, figure: str) -> list[float]:
    """Return a figure of the evaluations of the experiment `documents` after so many steps."""
    evaluations = [run["result"]["evaluations"] for run in runs("documents", reads=reads)]
    return [one[figure] for each in evaluations for one in each if one["step"] == steps]


def steps_to_bits_of_bytes() -> int:
    """Return the steps after which all runs with subwords have fewer bits than all with bytes at the end."""
    goal = min(evaluated(800, "bytes", "bits_per_byte"))
    every = (200, 400, 600, 800)
    found = {steps: max(evaluated(steps, "4,096 subwords", "bits_per_byte")) for steps in every}
    return next(steps for steps in every if found[steps] < goal)


def time_to_bits_of_bytes() -> float:
    """Return the time of those steps, relative to that of all with bytes."""
    found = evaluated(steps_to_bits_of_bytes(), "4,096 subwords", "seconds")
    return mean(found) / mean(evaluated(800, "bytes", "seconds"))


def characters(mixer: str, matched: str = "width") -> list[dict[str, Any]]:
    """Return the records of the experiment `shakespeare` with minGRU's width, or number of parameters."""
    found = [run for run in records("shakespeare") if run["setting"]["mixer"] == mixer]
    return [run for run in found if run["setting"]["matched"] in (matched, "both")]


def lead(mixer: str, other: str, matched: str = "width", part: Sequence[str] = ("test",)) -> float:
    """Return by how much a mixer's mean loss in windows is lower than another's there, in nats."""
    ours, theirs = (bests(characters(one, matched), *part, "val_loss_windowed") for one in (mixer, other))
    return mean(theirs) - mean(ours)


def reached(mixer: str, matched: str = "width", x: str = "step") -> float:
    """Return when a mixer's runs first had the validation loss that every Transformer of that width had."""
    curves = (points(run, "val_loss_windowed") for run in characters("transformer"))
    goal = max(min(loss for _, loss in curve) for curve in curves)
    found = (points(run, "val_loss_windowed", x) for run in characters(mixer, matched))
    return mean(next(at for at, loss in curve if loss <= goal) for curve in found)


def faster(*mixers: str, matched: str = "width", x: str = "step") -> tuple[float, float]:
    """Return the lowest and highest share of the Transformer's steps or seconds, to the loss it reaches."""
    return ends(reached(mixer, matched, x) / reached("transformer", matched, x) for mixer in mixers)


def spread(mixer: str) -> float:
    """Return the difference of its highest and lowest loss in windows on the test part."""
    lowest, highest = ends(bests(characters(mixer), "test", "val_loss_windowed"))
    return highest - lowest


def carrying(mixer: str) -> float:
    """Return by how much a carried state raises the mean loss on the test part."""
    carried, fresh = (bests(characters(mixer), "test", loss) for loss in ("val_loss", "val_loss_windowed"))
    return mean(carried) - mean(fresh)


def harder(run: dict[str, Any]) -> float:
    """Return by how much its loss in windows on the test part is above that on the validation part."""
    of = run["result"]
    return of["test"]["val_loss_windowed"] - of["best"]["val_loss_windowed"]


def heavier(mixer: str) -> float:
    """Return the ratio of a mixer's parameters to minGRU's at the same width."""
    ours, theirs = (characters(one)[0]["result"]["parameters"] for one in ("mingru", mixer))
    return theirs / ours


def slower(mixer: str) -> float:
    """Return the ratio of a mixer's seconds of training to minGRU's with as many parameters."""
    ours, theirs = (bests(characters(one, "parameters"), "training_seconds") for one in ("mingru", mixer))
    return mean(theirs) / mean(ours)


def best_run(mixer: str, trained_on: str | None = None) -> dict[str, Any]:
    """Return the record of the experiment `shakespeare-best`, trained on eight tenths or on another part."""
    (found,) = by_kind(records("shakespeare-best"), "mixer", "trained_on")[mixer, trained_on]
    return found


def best_loss(mixer: str, trained_on: str | None, *part: str, reads: str = "val_loss_windowed") -> float:
    """Return a loss of that run: of the last weights, or of the best ones on the part "best" or "test"."""
    return bests([best_run(mixer, trained_on)], *part, reads)[0]


def best_reached(mixer: str, goal: float) -> float:
    """Return the share of its steps after which that run, on eight tenths, has a loss in windows."""
    curve = points(best_run(mixer), "val_loss_windowed")
    return next(step for step, loss in curve if loss <= goal) / curve[-1][0]


def timed(experiment: str, system: str, figure: str, **setting: Any) -> list[float]:
    """Return the median seconds of a phase, or another figure of a system, by the records' sizes."""
    every = sorted(runs(experiment, **setting), key=lambda run: list(run["setting"].values()))
    found = [run["result"]["systems"][system] for run in every]
    return [one["seconds"][figure]["median"] if figure in one["seconds"] else one[figure] for one in found]


def ratios(experiment: str, one: str, other: str, figure: str, **setting: Any) -> list[float]:
    """Return the ratio of a system's figure to another's, in each of these records."""
    values = (timed(experiment, system, figure, **setting) for system in (one, other))
    return [above / below for above, below in zip(*values, strict=True)]


def ends(values: Iterable[float]) -> tuple[float, float]:
    """Return the lowest and the highest value."""
    found = sorted(values)
    return found[0], found[-1]


def case(name: str, system: str, **setting: Any) -> dict[str, Any]:
    """Return a system's entry in the only case of a benchmark with this gate, shape, ..."""
    (found,) = (
        one for one in bench(name)["results"] if setting.items() <= {**one, **one.get("shape", {})}.items()
    )
    return found["systems"][system]


def step_ms(name: str, system: str, **setting: Any) -> float:
    return 1e3 * case(name, system, **setting)["seconds"]["step"]["median"]


def minutes(found: Sequence[dict[str, Any]]) -> float:
    return mean(run["seconds"] for run in found) / 60


def action(system: str, steps: int = 1000) -> float:
    """Return the milliseconds of an action."""
    (found,) = timed("acting", system, "action", steps=steps)
    return 1e3 * found


def token(system: str, batch: int) -> list[float]:
    """Return the milliseconds of a token after each context."""
    return [1e3 * seconds for seconds in timed("inference", system, "token", B=batch)]


def growths(*systems: str) -> list[float]:
    """Return the exponents of time in the length, for both widths."""
    found = [series(records("runtime"), "T", "step", D=width) for width in (64, 128)]
    return [exponent(lines[system]) or 0.0 for lines in found for system in systems]


def learned(mixers: Sequence[str], language: str, *path: str) -> list[float]:
    """Return the mean over the seeds of each mixer's accuracy on a language."""
    return [average("formal-languages", *path, mixer=mixer, language=language) for mixer in mixers]


def languages() -> list[str]:
    return list(dict.fromkeys(run["setting"]["mixer"] for run in records("formal-languages")))


def constant(language: str) -> float:
    return average("formal-languages", "constant", language=language)


@cache
def commonest_count(shortest: int, longest: int) -> int:
    """Return the most frequent answer to a majority's count."""
    config = FormalLanguageConfig("majority-count", eval_min_length=shortest, eval_max_length=longest)
    (batch, *_) = FormalLanguageTask(replace(config, part="test", eval_sequences=1024)).evaluation_batches()
    return int(torch.bincount(batch.targets[batch.targets >= 0]).argmax())


def listops(mixer: str, block: str = "conv + mlp") -> float:
    return average("listops", "test", "accuracy", mixer=mixer, block=block)


def copied(mixers: Sequence[str], layers: Sequence[int], length: str = "x1") -> list[float]:
    """Return the percentage of copied tokens of each run."""
    every = ((mixer, depth) for mixer in mixers for depth in layers)
    path = ("test", length, "accuracy")
    return [
        100 * one
        for mixer, depth in every
        for one in results("selective-copying", *path, mixer=mixer, layers=depth)
    ]


def unlearned(*mixers: str, bias: float) -> int:
    """Return the number of runs of the experiment on stability that did not learn the task."""
    every = [run for mixer in mixers for run in runs("stability", mixer=mixer, forget_bias=bias)]
    return sum(steps_to(run, LEARNED) is None for run in every)


def learning_spread(mixer: str, bias: float) -> float:
    found = [steps_to(run, LEARNED) for run in runs("stability", mixer=mixer, forget_bias=bias)]
    return stdev(step for step in found if step is not None)


def scores(mixer: str, target: str = BEST_TENTH) -> list[float]:
    """Return each seed's score, averaged over all local data."""
    by_seed = by_kind(runs("locomotion", mixer=mixer), "seed")
    return [mean(bests(found, "asked", target, "score")) for found in by_seed.values()]


def mean_and_ends(values: Sequence[float]) -> tuple[float, float, float, float]:
    return (mean(values), stdev(values), *ends(values))


def halfcheetah(mixer: str) -> list[float]:
    return results("locomotion", "score", mixer=mixer, env="halfcheetah", quality="medium-replay")


def data_score(entry: str, **setting: Any) -> float:
    """Return a score of recorded data, averaged over the data."""
    return average("locomotion", "data", entry, mixer="bc", seed=0, **setting)


def players() -> list[str]:
    """Return the policies that are asked for a return."""
    return [mixer for (mixer,) in by_kind(records("locomotion"), "mixer") if mixer != "bc"]


def hopper(*path: str) -> list[float]:
    return results("locomotion", *path, mixer="mingru", env="hopper", quality="medium")


OURS = ("mingru", "minlstm")
SIGNED = ("mingru-signed", "minlstm-signed")
LAYERS = (*OURS, *RECURRENCES, "attention", "gru-loop", "lstm-loop")
SPEED = ("scan", "layer", "layer-sensors", "layer-lengths", "shares")
"""Benchmarks that share a machine and a section of RESULTS.md."""

QUALITY = ("lstm", "gru", "mingru", "minlstm", "rnn", "attention")
"""Rows of README's table of quality."""


def machine(name: str, *entries: str) -> tuple[Any, ...]:
    """Return entries of the machine of a benchmark."""
    return tuple(bench(name)["machine"][entry] for entry in entries)


def placed(run: dict[str, Any]) -> tuple[int, str]:
    return run["machine"]["threads"], run["machine"]["processor"]


def short_loss(mixer: str) -> float:
    return mean(run["val_loss"] for run in short_recipe(mixer))


def slowdowns(*mixers: str) -> tuple[float, float]:
    """Return the lowest and the highest ratio of mixers' time to minGRU's, in the recipe shakespeare-cpu."""
    return ends(minutes(short_recipe(mixer)) / minutes(short_recipe("mingru")) for mixer in mixers)


def megabytes(system: str) -> float:
    """Return the peak memory of a layer's step at T = 4,096."""
    return case("layer-lengths", system, T=4096)["peak_bytes"] / 1e6


def counts(*entries: str) -> list[float]:
    """Return counts of minGRU's forward in bfloat16, where batch and channels fill an H100."""
    wanted = {"capability": 90, "gate": "mingru", "dtype": "bfloat16", "direction": "forward", "group": 1}
    (found,) = (one for one in bench("kernels")["results"] if wanted.items() <= one.items())
    return [found[entry] for entry in entries]


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def model_steps(*widths: int) -> list[float]:
    """Return the time of a fused step over that of torch's operations, at all numbers of rows."""
    cases = [one for one in bench("model-step")["results"] if one["shape"]["D"] in widths]
    return [1 / one["systems"]["torch"]["times_ours"] for one in cases]


def shortest_steps(width: int) -> set[str]:
    """Return the systems whose step of a model of this width is the shortest, for some number of rows."""
    cases = [one for one in bench("exported-step")["results"] if one["shape"]["D"] == width]
    return {
        min(one["systems"], key=lambda name: one["systems"][name]["seconds"]["step"]["median"])
        for one in cases
    }


def token_shares(batch: int) -> list[float]:
    """Return the time of minGRU's token over that of GRU's and Mamba's, each a mean over the contexts."""
    others = ("gru", "mamba")
    return [mean(ratios("inference", "mingru", other, "token", B=batch)) for other in others]


def carried_mb(system: str) -> float:
    (found,) = timed("inference", system, "state_bytes", B=64, context=2048)
    return found / 1e6


def reading(one: str, other: str) -> list[float]:
    """Return the ratio of two mixers' times to read 2,048 tokens, at each batch size."""
    return ratios("inference", one, other, "context", context=2048)


def signed_runs() -> list[dict[str, Any]]:
    return [run for m in SIGNED for run in runs("formal-languages", mixer=m, language="parity")]


def first_right(run: dict[str, Any]) -> float:
    """Return the first evaluation at which a run is right on 99 % of strings."""
    return next(step for step, accuracy in points(run, "accuracy") if accuracy >= 0.99)


def listeners() -> list[str]:
    return list(dict.fromkeys(run["setting"]["mixer"] for run in records("listops")))


def guess() -> float:
    return average("listops", "constant", mixer="mingru")


def playing_time(other: str) -> list[float]:
    """Return the time of minGRU's and minLSTM's runs over that of another policy's."""
    return [
        average("locomotion", "seconds", mixer=m) / average("locomotion", "seconds", mixer=other)
        for m in OURS
    ]


def exported_layer() -> tuple[float, float, int]:
    """Return the kB of a layer's exported step and of its weights, and the number of its nodes."""
    import onnx

    layer = MinGRU(32, 96, batch_first=True)
    inputs, names = {"x": torch.zeros(2, 1, 32), "h_in": torch.zeros(1, 2, 96)}, ["y", "h_out"]
    step = export_step(layer, inputs, names, dynamic={"x": {0: "batch"}, "h_in": {1: "batch"}})
    contents = FORMATS[".onnx"].convert(step)
    weights = sum(weight.nbytes for weight in layer.parameters())
    model = onnx.load_from_string(contents)
    assert {node.domain for node in model.graph.node} == {""}
    return len(contents) / 1e3, weights / 1e3, len(model.graph.node)
