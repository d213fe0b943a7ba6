"""Character-level Shakespeare: models of equal width and of equal size, our best run, and a short recipe."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from minrnn.benchmarks.plots import Style, draw_lines, finish, mixer_style, new_figure
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.published import LABELS, Published, published, shown
from minrnn.experiments.records import bests, by_kind, points, spread
from minrnn.experiments.trained import GridPoint, Size, TrainedExperiment, training
from minrnn.experiments.variants import every_mixer
from minrnn.files import read_json
from minrnn.models import ModelConfig, SequenceModel
from minrnn.tasks import TextConfig, TextTask
from minrnn.training import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CHARACTERS = 65
"""Size of tiny Shakespeare's vocabulary, on which the number of parameters depends."""

THREE_SEEDS = ("mingru", "minlstm", "transformer", "lstm", "gru")
"""Ours, the reference, and the strongest baselines."""

WITH_HEADS = ("attention", "transformer", "aaren")

WIDENED = ("mingru", "minlstm", "mamba")
"""Mixers with an expansion in the paper."""

BEST_IN_WINDOWS = ("aaren",)
"""Mixers whose loss with the state carried rises while that in windows falls; the latter selects weights."""

REFERENCE = "transformer"
"""The mixer whose loss the others are timed to reach, in nanoGPT's block: no convolution, wider MLP."""

PUBLISHED: dict[str, Published] = {
    "mingru": published("1.548 at step 575"),
    "minlstm": published("1.555 at step 625"),
    "mamba": published("1.575 at step 400"),
    "transformer": published("1.547 at step 2,000"),
}


RIVAL: dict[str, Any] = {"d_model": 192, "num_heads": 6, "mlp_activation": "gelu"}
"""nanoGPT's block; at this width six layers have about as many parameters as minGRU's of shakespeare-best."""

ATTENTION_TRAIN: dict[str, Any] = {"precision": "bfloat16", "learning_rate": 2e-3}
"""Attention in autocast takes half the time of float32, other mixers gain nothing; its best rate is lower."""

SHORT_WINDOW = 64
"""Window in tokens of nanoGPT's recipe for a CPU, in which shakespeare-cpu is measured."""

BEST_COLUMNS = {"best of 20": ("best",), "last step": (), "held out": ("test",)}
"""Columns of the table of shakespeare-best, and where a result holds their losses."""

NINE_TENTHS = "nine tenths"
"""The part of the text that nanoGPT trains on, and shakespeare-best as it is: the rest is validated on."""

SHORT_TRAIN = training(every=1, logs=1, steps=2, batch_size=2, eval_tokens=64)

TINY_TASK: dict[str, Any] = {"source": str(Path(__file__)), "vocabulary": "bytes", "window": 16}


@dataclass(frozen=True, kw_only=True)
class TextSize(Size):
    """A scale, and attention's number of heads."""

    num_heads: int
    """Number of heads; widths are multiples of twice that."""


class Shakespeare(TrainedExperiment[TextSize]):
    """Predict the next character: mixers in the same model, of equal width or equal number of parameters."""

    name = recipe = "shakespeare"
    title = "A language model of characters (Shakespeare)"
    question = (
        "Tiny Shakespeare by characters. The last tenth of the text is left untouched until the end; the "
        "tenth before it, all of it, chooses the weights, with the state carried or, for Aaren, whose state "
        "is of no use beyond the lengths trained on, in windows (the paper, as nanoGPT, chooses and reports "
        "on one part). "
        "*Width*: all mixers are in the same model, so their parameters differ. *Parameters*: the width of "
        "each model is chosen to match the minGRU model's number of parameters. `transformer` is "
        "attention in nanoGPT's block; `attention` is the same mixer in the block of the others, with a "
        "convolution. Losses are nats per character, in windows from the empty state, as in the paper, "
        "and with the state carried through the text."
    )
    changes = (
        "cpu: width 192 in place of 384, 1,500 steps of 4 x 256 characters in place of 5,000 of 64 x 256, "
        "a peak rate of 3e-3 (cosine; for attention 2e-3, the best of 1, 2, 3 and 4e-3 for `transformer`) "
        "in place of 1e-3, no dropout in place of 0.2. Each is trained in the arithmetic in which it is "
        "fastest: attention in autocast to bfloat16, all others in float32 with the factors of matrix "
        "products rounded to bfloat16. The paper states neither the window nor the schedule: paper has "
        "nanoGPT's window of 256 and a cosine to a tenth after 100 steps."
    )
    common_train: ClassVar = {"beta2": 0.99, "precision": "bfloat16-products"}
    attention_train = ATTENTION_TRAIN
    sizes: ClassVar = {
        "cpu": TextSize(
            model={"d_model": 192, "expansion": 1.0, "mlp_ratio": 1.75, "dropout": 0.0},
            train=training(
                every=75,
                logs=5,
                steps=1500,
                batch_size=4,
                learning_rate=3e-3,
                min_learning_rate_ratio=0.05,
                grad_clip=1.0,
            ),
            num_heads=4,
        ),
        "paper": TextSize(train=training(every=25, logs=5, precision="float32"), num_heads=6),
        "tiny": TextSize(
            model={"d_model": 8, "num_layers": 1, "expansion": 1.0, "mlp_ratio": 1.0, "dropout": 0.0},
            task=TINY_TASK,
            train={**SHORT_TRAIN, "learning_rate": 3e-3, "warmup_steps": 1, "grad_clip": 1.0},
            num_heads=2,
            seeds=1,
        ),
    }

    def mixers(self) -> Sequence[str]:
        return every_mixer("transformer")

    def config(self, size: TextSize, mixer: str) -> RunConfig:
        model = {"num_heads": size.num_heads} if mixer in WITH_HEADS else {}
        widened = {} if mixer in WIDENED else {"expansion": 1.0}
        config = super().config(size, mixer).override(model=model | widened)
        return config.override(task={"held_out": 0.1, "best_in_windows": mixer in BEST_IN_WINDOWS})

    def grid(self, size: TextSize, mixer: str) -> Iterator[GridPoint]:
        config, ours = self.config(size, mixer), self.config(size, "mingru")
        width = width_of(config.model, count(ours.model), 2 * size.num_heads)
        seeds = size.seeds if mixer in THREE_SEEDS else size.other_seeds
        matched = "both" if width == config.model.d_model else "width"  # the same run is in both tables
        yield GridPoint(f"{mixer}-width", {"mixer": mixer, "matched": matched}, config, seeds)
        if matched == "width":
            setting = {"mixer": mixer, "matched": "parameters"}
            same = config.override(model={"d_model": width})
            yield GridPoint(f"{mixer}-parameters", setting, same, seeds)

    def examine(self, model: SequenceModel, config: RunConfig, size: Size) -> dict[str, Any]:
        return {"test": _evaluate(model, config, part="test")}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        lowest = [_lowest(run) for run in _matched(records, "width").get(REFERENCE, [])]
        tables = {matched: _matched(records, matched) for matched in ("width", "parameters")}
        return [_table(matched, runs, lowest) for matched, runs in tables.items() if runs]

    def draw(self, records: Sequence[Record]) -> Figure:
        figure, panels = new_figure(2, 2, height=4.4)
        for row, matched in enumerate(("width", "parameters")):
            chosen = _matched(records, matched)
            for axes, x, label in zip(
                panels[2 * row :], ("step", "seconds"), ("step", "seconds of training"), strict=False
            ):
                lines = {mixer: points(found[0], "val_loss_windowed", x) for mixer, found in chosen.items()}
                draw_lines(axes, lines, marker="")
                if losses := [loss for line in lines.values() for _, loss in line]:
                    axes.set_ylim(min(losses) - 0.02, min(max(losses), min(losses) + 0.8))
                finish(
                    axes,
                    f"same {matched}, first seed",
                    label,
                    "validation loss in windows, nats",
                    names="legend",
                )
        return figure


class RecipeRuns(TrainedExperiment[Size]):
    """An unchanged recipe with several mixers."""

    losses: ClassVar[tuple[float, float]]
    """Smallest and largest loss of the plot."""
    axis: ClassVar[tuple[str, str, float]] = ("seconds", "minutes of training", 60)
    """The plot's horizontal axis: an entry of an evaluation, its label and its unit."""

    def grid(self, size: Size, mixer: str) -> Iterator[GridPoint]:
        yield GridPoint(mixer, {"mixer": mixer}, self.config(size, mixer), size.seeds)

    def draw(self, records: Sequence[Record]) -> Figure:
        figure, panels = new_figure(1, 2)
        shown = {"val_loss_windowed": "in windows as long as those trained on", "val_loss": "state carried"}
        x, label, unit = self.axis
        for axes, (metric, title) in zip(panels, shown.items(), strict=True):
            runs = by_kind(records, "mixer", "trained_on")
            lines = {
                ", ".join(filter(None, kind)): [(at / unit, loss) for at, loss in points(found[0], metric, x)]
                for kind, found in runs.items()
            }
            draw_lines(axes, lines, _style, marker="")
            axes.set_ylim(*self.losses)
            finish(axes, title, label, "nats a character")
        return figure


def _style(name: str) -> Style:
    """Return the style of a mixer's line; one that is trained on another part of the text is dashed."""
    mixer, _, trained_on = name.partition(", ")
    return mixer_style(mixer)._replace(dashed=bool(trained_on))


class ShakespeareBest(RecipeRuns):
    """Predict the next character with our best small model."""

    name = recipe = "shakespeare-best"
    title = "Shakespeare, as well as we can (`shakespeare-best`)"
    question = (
        "The recipe `shakespeare-best`, six minGRU blocks. Trained on the first nine tenths of the text, it "
        "stands beside nanoGPT's published loss on the same split; trained on the first eight, beside a "
        "Transformer of about as many parameters in nanoGPT's block, on the same tokens. Losses are nats a "
        "character: in windows of 256 from the empty state, as nanoGPT measures, and with the state carried "
        "through the text, as a recurrence is used. *Best of 20*: on the last tenth of the text, of the 20 "
        "evaluations there the one with the lowest loss, as nanoGPT reports it (here the loss with the state "
        "carried chooses); the settings were chosen by looking at this part too. *Last step*: on the same "
        "part, without that choice. *Held out*: the best weights on the ninth tenth, where it is not trained "
        "on; nothing was chosen by it. *Seconds a step*: the median along the run."
    )
    changes = (
        "nanoGPT: 10.65 M parameters, 82 million tokens, about three minutes on an A100. cpu and paper are "
        "the same."
    )
    attention_train = ATTENTION_TRAIN
    losses = (1.4, 2.0)
    axis = ("step", "step", 1)
    sizes: ClassVar = {
        **dict.fromkeys(("cpu", "paper"), Size(seeds=1)),
        "tiny": Size(model={"d_model": 12, "num_layers": 1}, task=TINY_TASK, train=SHORT_TRAIN, seeds=1),
    }

    def mixers(self) -> Sequence[str]:
        return "mingru", "transformer"

    def config(self, size: Size, mixer: str) -> RunConfig:
        config = super().config(size, mixer)
        config = config.override(task={"held_out": 1 / 9, "held_out_for": "test"})  # of nine tenths
        if mixer == "mingru":
            return config
        # A Transformer has a window and no state to carry.
        config = config.override(train={"carry_state": False, "fresh_share": 0.0})
        return config.override(model={**RIVAL, **size.model})

    def grid(self, size: Size, mixer: str) -> Iterator[GridPoint]:
        yield from super().grid(size, mixer)
        if mixer == "mingru":  # the recipe as it is, which holds nothing out
            recipe = self.config(size, mixer).override(task={"held_out": 0.0, "held_out_for": "validation"})
            setting = {"mixer": mixer, "trained_on": NINE_TENTHS}
            yield GridPoint(f"{mixer}-nine-tenths", setting, recipe, size.seeds)

    def examine(self, model: SequenceModel, config: RunConfig, size: Size) -> dict[str, Any]:
        assert isinstance(config.task, TextConfig)
        return {"test": _evaluate(model, config, part="test")} if config.task.held_out else {}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        head = ["model", "trained on", "parameters", "tokens", "seeds"]
        head += [f"{what}: {how}" for what in BEST_COLUMNS for how in ("windows", "carried")]
        head += ["seconds a step"]
        rows = [
            [
                mixer,
                trained_on or "eight tenths",
                f"{runs[0]['result']['parameters']:,}",
                f"{runs[0]['result']['tokens'] / 1e6:.1f} M",
                str(len(runs)),
                *(
                    spread(bests(runs, *path, metric), 4) if set(path) <= set(runs[0]["result"]) else ""
                    for path in BEST_COLUMNS.values()
                    for metric in ("val_loss_windowed", "val_loss")
                ),
                spread([seconds_a_step(run) for run in runs], 2),
            ]
            for (mixer, trained_on), runs in by_kind(records, "mixer", "trained_on").items()
        ]
        nanogpt = published("1.4697", "nanoGPT's README, the lowest of 20 evaluations")
        name = f"nanoGPT ({LABELS[nanogpt.certainty]})"
        rows.append([name, NINE_TENTHS, "10.65 M", "82 M", "", nanogpt.text])
        rows[-1] += [""] * (len(head) - len(rows[-1]))
        return [Table("One run of each", head, rows)]


def seconds_a_step(run: Record) -> float:
    """Return the median along the learning curve, which work beside the run changes little."""
    curve = [(0, 0.0, None), *run["result"]["curve"]]
    return median((until - since) / (last - first) for (first, since, _), (last, until, _) in pairwise(curve))


class ShakespeareCPU(RecipeRuns):
    """Predict the next character with nanoGPT's budget for a CPU."""

    name = recipe = "shakespeare-cpu"
    title = "Shakespeare on two cores (`shakespeare-cpu`)"
    question = (
        "The recipe `shakespeare-cpu` for every mixer: 2,000 steps of 768 characters, as many as nanoGPT's "
        "recipe for a CPU, whose published loss in windows of 64 from the empty state is 1.88 (0.80 M "
        "parameters). All mixers are in the same model, with the recipe that was tuned for minGRU. The "
        "loss is that of the last step's weights on the whole last tenth, in nats per character."
    )
    changes = "nothing: cpu and paper are the same recipe, which is not the paper's."
    weights = "last"
    losses = (1.45, 2.2)
    sizes: ClassVar = {
        **dict.fromkeys(("cpu", "paper"), Size()),
        "tiny": Size(model={"d_model": 16, "num_layers": 1}, task=TINY_TASK, train=SHORT_TRAIN, seeds=1),
    }

    def examine(self, model: SequenceModel, config: RunConfig, size: Size) -> dict[str, Any]:
        assert isinstance(config.task, TextConfig)
        window = min(config.task.window, SHORT_WINDOW)
        return {"test": _evaluate(model, config, window=window)}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        rows = []
        runs = by_kind(records, "mixer")
        for (mixer,), found in sorted(runs.items(), key=lambda item: mean(bests(item[1], "val_loss"))):
            losses = bests(found, "val_loss")
            rows.append(
                [
                    mixer,
                    f"{found[0]['result']['parameters']:,}",
                    str(len(found)),
                    f"**{mean(losses):.3f}**",
                    f"{min(losses):.3f} to {max(losses):.3f}",
                    f"{mean(bests(found, 'val_loss_windowed')):.3f}",
                    f"{mean(bests(found, 'test', 'val_loss_windowed')):.3f}",
                    f"{mean(bests(found, 'seconds')) / 60:.1f}",
                ]
            )
        head = ["mixer", "parameters", "seeds", "state carried", "lowest to highest"]
        return [
            Table("The recipe with each mixer", [*head, "windows of 256", "windows of 64", "minutes"], rows)
        ]


def earlier_runs(folder: Path) -> list[Record]:
    """Return the runs of the recipe shakespeare-cpu from before this experiment, as records.

    Args:
        folder: folder with a file for each mixer and seed: results.json, with the loss in windows of 64.
    """
    runs = [read_json(path, dict[str, Any]) for path in sorted(folder.glob("*.json"))]
    return [
        {
            "setting": {"mixer": run["mixer"], "seed": run["seed"]},
            "failed": None,
            "result": {**run, "test": {"val_loss_windowed": run["val_loss_windowed_64"]}},
        }
        for run in runs
    ]


def _evaluate(model: SequenceModel, config: RunConfig, **changed: Any) -> dict[str, float]:
    """Evaluate a model by the run's task with changed settings."""
    assert isinstance(config.task, TextConfig)
    return TextTask(replace(config.task, **changed)).evaluate(model)


def count(config: ModelConfig) -> int:
    """Return a model's number of parameters, without allocating it."""
    with torch.device("meta"):
        model = SequenceModel(replace(config, vocab_size=NUM_CHARACTERS))
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def width_of(config: ModelConfig, parameters: int, step: int) -> int:
    """Return the width at which a model has close to this many parameters.

    Args:
        config: the model; its own width must be at least a third of the result.
        parameters: the desired number of parameters.
        step: the result is a multiple of it; attention needs twice its number of heads.
    """
    widths = range(step, 3 * config.d_model + 1, step)

    def parameters_of(width: int) -> int:
        return count(replace(config, d_model=width))

    above = bisect_left(widths, parameters, key=parameters_of)  # parameters increase with the width
    near = widths[max(0, above - 1) : above + 1]
    return min(near, key=lambda width: abs(parameters_of(width) - parameters))


def _table(matched: str, runs: dict[str, list[Record]], lowest: Sequence[float]) -> Table:
    """Return the table of models of equal width, or equally many parameters.

    Args:
        matched: what is equal.
        runs: the runs of each mixer.
        lowest: the lowest validation loss of each run of the reference. The highest of these, which all seeds
            of the reference reach, is the target.
    """
    target = max(lowest, default=None)
    head = ["mixer", "parameters", "seeds", "test loss in windows", "with the state carried"]
    head += ["chosen at step", f"steps to the {REFERENCE}'s loss", "seconds to it", "seconds of training"]
    head += ["published best, width 384"] if matched == "width" else []
    rows = []
    for mixer, found in sorted(
        runs.items(), key=lambda item: mean(bests(item[1], "test", "val_loss_windowed"))
    ):
        row = [
            mixer,
            f"{found[0]['result']['parameters']:,}",
            str(len(found)),
            f"**{spread(bests(found, 'test', 'val_loss_windowed'))}**",
            spread(bests(found, "test", "val_loss")),
            spread(bests(found, "best", "step"), 0),
            _reach(found, target, "step"),
            _reach(found, target, "seconds"),
            spread(bests(found, "training_seconds"), 0),
        ]
        rows.append(row + ([shown(PUBLISHED.get(mixer))] if matched == "width" else []))
    note = "" if target is None else _target_note(target, lowest)
    return Table(f"Matched {matched}", head, rows, note)


def _target_note(target: float, lowest: Sequence[float]) -> str:
    losses = ", ".join(f"{loss:.3f}" for loss in sorted(lowest))
    return (
        f"The {REFERENCE}'s loss: {target:.3f} on the validation part in windows, at the same width, which "
        f"each of its runs reached (their lowest: {losses}); *never* counts the runs that did not get there."
    )


def _matched(records: Sequence[Record], matched: str) -> dict[str, list[Record]]:
    """Return the runs of each mixer with the same width, or the same number of parameters, as minGRU's."""
    runs = by_kind(records, "mixer", "matched")
    return {mixer: found for (mixer, how), found in runs.items() if how in (matched, "both")}


def _lowest(run: Record) -> float:
    return min(loss for _, loss in points(run, "val_loss_windowed"))


def _reach(runs: Sequence[Record], target: float | None, x: str) -> str:
    """Return when runs first reached the target loss on the validation part, as text."""
    if target is None:
        return ""
    first = [
        next((at for at, loss in points(run, "val_loss_windowed", x) if loss <= target), None) for run in runs
    ]
    reached = [at for at in first if at is not None]
    parts = [spread(reached, 0)] if reached else []
    never = len(first) - len(reached)
    return ", ".join(parts + ([f"never: {never}"] if never else []))


EXPERIMENT = Shakespeare()
BEST = ShakespeareBest()
CPU = ShakespeareCPU()
