"""The language model: loss on characters of Shakespeare against steps and against seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from minrnn.benchmarks.plots import draw_lines, finish, new_figure
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.published import Published, published, shown
from minrnn.experiments.trained import Plan, TrainedExperiment, bests, by_kind, points, spread
from minrnn.experiments.variants import every_mixer, model_of
from minrnn.models import ModelConfig, SequenceModel
from minrnn.tasks import TextConfig, TextTask
from minrnn.training import Precision, RunConfig, TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CHARACTERS = 65
"""Tiny Shakespeare's vocabulary, which the number of parameters depends on."""

THRICE = ("mingru", "minlstm", "transformer", "lstm")
"""Three seeds at the same width: ours, whom they are measured by, and the strongest rival."""

UNCARRIED = ("aaren",)
"""Whose loss with the state carried rises while that in windows falls, which is then what chooses."""

REFERENCE = "transformer"
"""Whose best loss the others are timed to reach; its block is nanoGPT's: no convolution, a wider MLP."""

BEST: dict[str, Published] = {
    "mingru": published("1.548 at step 575"),
    "minlstm": published("1.555 at step 625"),
    "mamba": published("1.575 at step 400"),
    "transformer": published("1.547 at step 2,000"),
}


@dataclass(frozen=True)
class Size:
    """The settings of a scale."""

    d_model: int
    num_layers: int
    expansion: float
    mlp_ratio: float
    num_heads: int
    dropout: float
    window: int
    steps: int
    batch_size: int
    learning_rate: float
    attention_rate: float
    min_learning_rate_ratio: float
    warmup_steps: int
    grad_clip: float
    eval_every: int
    eval_tokens: int
    source: str = "shakespeare"
    seeds: int = 3
    precision: Precision = "bfloat16-products"


class Shakespeare(TrainedExperiment[Size]):
    """Predict the next character."""

    name = "shakespeare"
    title = "A language model of characters (Shakespeare)"
    question = (
        "Tiny Shakespeare by characters. The last tenth of the text is left untouched until the end; the "
        "tenth before it chooses the weights, with the state carried or, for Aaren, whose state is of no use "
        "beyond the lengths trained on, in windows (the paper, as nanoGPT, chooses and reports on one part). "
        "*Width*: all mixers stand in the same model, so their parameters differ. *Parameters*: each model "
        "is as wide as makes its parameters as many as those of the minGRU model. `transformer` is "
        "attention in nanoGPT's block; `attention` is the same mixer in everybody's block, which has a "
        "convolution. Losses are nats a character, in windows from the empty state, as the paper measures, "
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
    sizes: ClassVar = {
        "cpu": Size(192, 3, 1.0, 1.75, 4, 0.0, 256, 1500, 4, 3e-3, 2e-3, 0.05, 100, 1.0, 50, 16_384),
        "paper": Size(
            384, 3, 2.0, 2.0, 6, 0.2, 256, 5000, 64, 1e-3, 1e-3, 0.1, 100, 0.25, 25, 0, precision="float32"
        ),
        "tiny": Size(
            8, 1, 1.0, 1.0, 2, 0.0, 16, 2, 2, 3e-3, 2e-3, 0.1, 1, 1.0, 1, 64, str(Path(__file__)), 1
        ),
    }

    def mixers(self) -> Sequence[str]:
        return every_mixer("transformer")

    def plans(self, size: Size, mixer: str) -> Iterator[Plan]:
        seeds = min(size.seeds, 3 if mixer in THRICE else 1)
        width = width_of(size, mixer, count(_model(size, "mingru", size.d_model)))
        matched = "both" if width == size.d_model else "width"  # one run for both tables
        wide = _model(size, mixer, size.d_model)
        yield Plan(f"{mixer}-width", {"mixer": mixer, "matched": matched}, _run(size, wide), seeds)
        if matched == "width":
            same = _model(size, mixer, width)
            setting = {"mixer": mixer, "matched": "parameters"}
            yield Plan(f"{mixer}-parameters", setting, _run(size, same), 1 if mixer != "minlstm" else seeds)

    def examine(self, model: SequenceModel, config: RunConfig, size: Size) -> dict[str, Any]:
        assert isinstance(config.task, TextConfig)
        return {"test": TextTask(replace(config.task, held_out=0.0)).evaluate(model)}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        target = min((_lowest(run) for run in _matched(records, "width").get(REFERENCE, [])), default=None)
        tables = {matched: _matched(records, matched) for matched in ("width", "parameters")}
        return [_table(matched, runs, target) for matched, runs in tables.items() if runs]

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


def count(config: ModelConfig) -> int:
    """Return a model's number of parameters, without making it."""
    with torch.device("meta"):
        model = SequenceModel(replace(config, vocab_size=NUM_CHARACTERS))
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def width_of(size: Size, mixer: str, parameters: int) -> int:
    """Return the width at which a mixer's model has nearly this many parameters.

    Widths are multiples of twice the heads, which attention needs.
    """
    step = 2 * size.num_heads
    widths = range(step, 3 * size.d_model + 1, step)

    def parameters_of(width: int) -> int:
        return count(_model(size, mixer, width))

    above = bisect_left(widths, parameters, key=parameters_of)  # more width, more parameters
    near = widths[max(0, above - 1) : above + 1]
    return min(near, key=lambda width: abs(parameters_of(width) - parameters))


def _model(size: Size, mixer: str, d_model: int) -> ModelConfig:
    heads = {"num_heads": size.num_heads} if mixer in ("attention", "transformer", "aaren") else {}
    expansion = size.expansion if mixer in ("mingru", "minlstm", "mamba") else 1.0  # as the paper widens them
    return model_of(
        mixer,
        d_model=d_model,
        num_layers=size.num_layers,
        expansion=expansion,
        mlp_ratio=size.mlp_ratio,
        dropout=size.dropout,
        **heads,
    )


def _run(size: Size, model: ModelConfig) -> RunConfig:
    vocabulary: Any = "characters" if size.source == "shakespeare" else "bytes"
    return RunConfig(
        recipe="shakespeare",
        model=model,
        task=TextConfig(
            size.source, vocabulary, size.window, held_out=0.1, best_in_windows=model.mixer in UNCARRIED
        ),
        train=TrainConfig(
            steps=size.steps,
            batch_size=size.batch_size,
            learning_rate=_rate(size, model.mixer),
            min_learning_rate_ratio=size.min_learning_rate_ratio,
            warmup_steps=size.warmup_steps,
            grad_clip=size.grad_clip,
            beta2=0.99,
            precision=_precision(size, model.mixer),
            eval_every=size.eval_every,
            eval_tokens=size.eval_tokens,
            checkpoint_every=size.eval_every,
            log_every=max(1, size.eval_every // 5),
        ),
    )


def _rate(size: Size, mixer: str) -> float:
    return size.attention_rate if mixer == "attention" else size.learning_rate


def _precision(size: Size, mixer: str) -> Precision:
    """Return what is fastest: attention in autocast takes half the time of float32, the others no less."""
    return "bfloat16" if mixer == "attention" and size.precision != "float32" else size.precision


def _table(matched: str, runs: dict[str, list[Record]], target: float | None) -> Table:
    head = ["mixer", "parameters", "seeds", "test loss in windows", "with the state carried"]
    head += ["chosen at step", f"steps to the {REFERENCE}'s best", "seconds to it", "seconds of training"]
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
        rows.append(row + ([shown(BEST.get(mixer))] if matched == "width" else []))
    note = (
        ""
        if target is None
        else f"The {REFERENCE}'s best: {target:.3f} on the validation part in windows, at the same width; "
        "*never* counts the runs that did not get there."
    )
    return Table(f"Matched {matched}", head, rows, note)


def _matched(records: Sequence[Record], matched: str) -> dict[str, list[Record]]:
    """Return the runs of each mixer that are of the same width, or of as many parameters, as minGRU's."""
    runs = by_kind(records, "mixer", "matched")
    return {mixer: found for (mixer, how), found in runs.items() if how in (matched, "both")}


def _lowest(run: Record) -> float:
    return min(loss for _, loss in points(run, "val_loss_windowed"))


def _reach(runs: Sequence[Record], target: float | None, x: str) -> str:
    """Return when runs first had the target's loss on the validation part."""
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
