"""Beyond the paper: what resets at documents and a vocabulary of subwords bring to a language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minrnn.benchmarks.plots import draw_lines, finish, new_figure
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.records import by_kind, points, spread
from minrnn.experiments.trained import GridPoint, Size, TrainedExperiment, training
from minrnn.models import SequenceModel
from minrnn.tasks import TextConfig, TextTask
from minrnn.training import RunConfig, load_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Reading:
    """A way to read the same text."""

    name: str
    """Name in the tables."""
    recipe: str
    task: Mapping[str, Any]
    """Fields of TextConfig that differ from the recipe's."""


READINGS = {
    "bytes": Reading("bytes", "demo", {}),
    "joined": Reading("bytes, documents joined", "demo", {"documents": "joined"}),
    "subwords": Reading("4,096 subwords", "python-bpe", {}),
}


class Documents(TrainedExperiment[Size]):
    """Predict the standard library of Python, read in several ways."""

    name = "documents"
    title = "Documents and subwords (the recipes `demo` and `python-bpe`)"
    question = (
        "Python's standard library, as the recipe `demo` reads it: by bytes, with the state reset at each "
        "file; the same with the files joined end to end, without marks and resets; and as `python-bpe` "
        "reads it, in 4,096 subwords learned from the training part, with about as many parameters. Losses "
        "are bits a byte of the whole validation part, one file in ten, with the state carried through each "
        "file (through all of them where they are joined), of the last step's weights: nothing is chosen on "
        "this part. Ends of documents are predicted too where they are marked."
    )
    changes = "nothing: cpu and paper are the same recipes, which are not the paper's."
    recipe = "demo"
    weights = "last"
    sizes: ClassVar = {
        **dict.fromkeys(("cpu", "paper"), Size()),
        "tiny": Size(
            model={"d_model": 8, "num_layers": 1},
            task={"source": str(Path(__file__)), "window": 16},
            train=training(every=1, logs=1, steps=2, batch_size=2, eval_tokens=64, warmup_steps=1),
            seeds=1,
        ),
    }

    def mixers(self) -> Sequence[str]:
        return ("mingru",)

    def grid(self, size: Size, mixer: str) -> Iterator[GridPoint]:
        for name, reading in READINGS.items():
            config = load_recipe(reading.recipe).override(
                model={**size.model, "mixer": mixer}, task={**size.task, **reading.task}, train=size.train
            )
            yield GridPoint(name, {"mixer": mixer, "reads": reading.name}, config, size.seeds)

    def examine(self, model: SequenceModel, config: RunConfig, size: Size) -> dict[str, Any]:
        assert isinstance(config.task, TextConfig)
        return {"test": TextTask(config.task).evaluate(model)}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        head = ["read as", "parameters", "seeds", "bits a byte", "tokens trained on", "minutes of training"]
        rows = []
        for (name,), runs in by_kind(records, "reads").items():
            found = [run["result"] for run in runs]
            rows.append(
                [
                    name,
                    f"{found[0]['parameters']:,}",
                    str(len(found)),
                    f"**{spread([result['test']['bits_per_byte'] for result in found], 3)}**",
                    f"{found[0]['tokens'] / 1e6:.1f} M",
                    spread([result["training_seconds"] for result in found], 1, scale=1 / 60),
                ]
            )
        return [Table("The same text, read in several ways", head, rows)]

    def draw(self, records: Sequence[Record]) -> Figure:
        figure, (steps, time) = new_figure(1, 2)
        runs = {name: found[0] for (name,), found in by_kind(records, "reads").items()}
        lines = {name: points(run, "bits_per_byte", "step") for name, run in runs.items()}
        draw_lines(steps, lines)
        finish(steps, "a part of the validation part, first seed", "step", "bits a byte")
        timed = {name: points(run, "bits_per_byte", "seconds") for name, run in runs.items()}
        draw_lines(time, {name: [(s / 60, bits) for s, bits in line] for name, line in timed.items()})
        finish(time, "the same runs", "minutes of training", "bits a byte")
        return figure


EXPERIMENT = Documents()
