"""Figure 5: variation of runs over seeds, and the effect of the forget bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

from minrnn.benchmarks.plots import band, finish, new_figure
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.records import bests, by_kind, points, spread
from minrnn.experiments.selective_copying import UNNORMALIZED, SelectiveCopying
from minrnn.experiments.trained import GridPoint, Size, TrainedExperiment, training
from minrnn.experiments.variants import ROUNDED
from minrnn.models import SequenceModel
from minrnn.training import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIXERS = ("mingru", "minlstm", UNNORMALIZED)
BIASES = (0.0, 1.0, 3.0)
LAYERS = 2

LEARNED = 0.9
"""Token accuracy on validation sequences below which a run counts as failed."""


class Stability(TrainedExperiment[Size]):
    """Train selective copying with several seeds and forget biases."""

    name = "stability"
    title = "Stability over seeds, and the forget bias (figure 5)"
    question = (
        "Selective copying with two layers, five seeds of everything. The paper finds minGRU steadier "
        "than minLSTM, one gate to tune in place of two, and that raising the bias of minLSTM's forget "
        "gate at the start speeds learning up and steadies it (both published in words and curves, "
        "without figures to set beside these). A bias of 0 is where the paper starts; 1 is this library's "
        "default; 3 is that of the authors' released code, with minLSTM unnormalized. minGRU's bias is "
        "that of keeping its state, so that the three are comparable. A run *failed* if it diverged, or "
        f"never reached {LEARNED:.0%} of the tokens of validation sequences. *Roughness* is the mean rise "
        "of the loss from one point of the learning curve to the next that is not lower."
    )
    changes = (
        f"cpu: 64 positions with 4 tokens, 2,000 steps of 32 sequences, an expansion of 2. {ROUNDED} The "
        "paper does not say on which task and with which seeds its figure was made; paper here is its "
        "selective copying, with two layers."
    )
    recipe, common_train = SelectiveCopying.recipe, SelectiveCopying.common_train
    sizes: ClassVar = {
        "cpu": Size(
            task={"length": 64, "num_tokens": 4, "eval_sequences": 256},
            train=training(every=100, logs=10, steps=2000),
            seeds=5,
        ),
        **{scale: replace(SelectiveCopying.sizes[scale], seeds=5) for scale in ("paper", "tiny")},
    }

    def mixers(self) -> Sequence[str]:
        return MIXERS

    def grid(self, size: Size, mixer: str) -> Iterator[GridPoint]:
        config = self.config(size, mixer).override(model={"num_layers": LAYERS})
        for bias in BIASES:
            setting = {"mixer": mixer, "forget_bias": bias}
            biased = config.override(model={"forget_bias": bias})
            yield GridPoint(f"{mixer}-bias{bias:g}", setting, biased, size.seeds)

    def examine(self, model: SequenceModel, config: RunConfig, size: Size) -> dict[str, Any]:
        return {}  # only the learning curves are used

    def tables(self, records: Sequence[Record]) -> list[Table]:
        head = ["cell", "forget bias", "seeds", "failed", "loss at the end", "lowest to highest"]
        head += ["token accuracy at the end, %", f"steps to {LEARNED:.0%}", "roughness"]
        diverged: dict[tuple[str, float], int] = {}
        for record in records:
            if record["failed"] is not None:
                kind = (record["setting"]["mixer"], record["setting"]["forget_bias"])
                diverged[kind] = diverged.get(kind, 0) + 1
        finished = by_kind(records, "mixer", "forget_bias")
        rows = []
        for kind in dict.fromkeys([*finished, *diverged]):
            runs = finished.get(kind, [])
            reached = [step for run in runs if (step := steps_to(run, LEARNED)) is not None]
            failed = diverged.get(kind, 0) + len(runs) - len(reached)
            losses = bests(runs, "val_loss")
            rows.append(
                [
                    kind[0],
                    f"{kind[1]:g}",
                    str(len(runs) + diverged.get(kind, 0)),
                    str(failed),
                    spread(losses) if losses else "",
                    f"{min(losses):.3f} to {max(losses):.3f}" if losses else "",
                    spread(bests(runs, "accuracy"), 1, scale=100) if runs else "",
                    spread(reached, 0) if reached else "",
                    spread([roughness(run) for run in runs], 4) if runs else "",
                ]
            )
        return [Table("Seeds and forget bias", head, rows)]

    def draw(self, records: Sequence[Record]) -> Figure:
        finished = by_kind(records, "forget_bias", "mixer")
        biases = sorted({bias for bias, _ in finished}) or [0.0]
        figure, panels = new_figure(1, len(biases))
        for axes, bias in zip(panels, biases, strict=True):
            for (at, mixer), runs in sorted(finished.items()):
                if at == bias:
                    curves = [points(run, "val_loss") for run in runs]
                    steps = [step for step, _ in curves[0]]
                    band(axes, mixer, steps, [[loss for _, loss in curve] for curve in curves])
            finish(axes, f"forget bias {bias:g}: mean and span", "step", "validation loss", names="legend")
        return figure


def steps_to(record: Record, accuracy: float) -> int | None:
    """Return the first evaluated step at which a run's accuracy was reached, or None."""
    return next((int(step) for step, found in points(record, "accuracy") if found >= accuracy), None)


def roughness(record: Record) -> float:
    """Return the mean increase of the loss between points of the learning curve; a decrease counts as 0."""
    losses = [loss for _, _, loss in record["result"]["curve"]]
    rises = [max(0.0, after - before) for before, after in pairwise(losses)]
    return mean(rises) if rises else 0.0


EXPERIMENT = Stability()
