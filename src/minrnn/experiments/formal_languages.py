"""Table 4, first half: seven formal languages, trained on short strings and tested on long ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

from minrnn.benchmarks.plots import draw_lines, finish, new_figure
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.published import Published, recalled
from minrnn.experiments.records import bests, by_kind, spread
from minrnn.experiments.trained import PAPER_TRAIN, TINY_TRAIN, GridPoint, Size, TrainedExperiment, training
from minrnn.experiments.variants import ROUNDED, every_mixer
from minrnn.models import SequenceModel
from minrnn.tasks import LANGUAGES, FormalLanguageConfig, FormalLanguageTask
from minrnn.training import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THREE_SEEDS = ("mingru", "minlstm", "lstm")
"""Ours, and the strongest baseline."""

SIGNED = ("mingru-signed", "minlstm-signed")
TRACKING = ("parity", "cycle-navigation")
"""The language that tests signed decays, with three seeds and results by length."""

REPORTED = (
    "bucket-sort",
    "missing-duplicate",
    "cycle-navigation",
    "even-pairs",
    "majority",
    "majority-count",
)
PUBLISHED: dict[str, dict[str, Published]] = {
    name: dict(zip(REPORTED, map(recalled, row), strict=True))
    for name, row in {
        "minLSTM": ("0.94", "0.26", "0.79", "0.93", "0.93", "0.47"),
        "xLSTM[1:0]": ("0.97", "0.33", "0.86", "1.0", "0.74", "0.46"),
        "Mamba": ("0.69", "0.15", "0.86", "1.0", "0.69", "0.45"),
        "RWKV": ("0.54", "0.21", "0.13", "1.0", "0.63", "0.13"),
    }.items()
}
"""The paper's table 4, whose baselines are from the paper on xLSTM; it does not report parity."""


@dataclass(frozen=True, kw_only=True)
class LanguageSize(Size):
    """A scale, the languages, and the test strings."""

    test_sequences: int
    """Number of test strings, overall and of each length."""
    test_lengths: tuple[int, ...] = (40, 64, 96, 128, 192, 256)
    """Numbers of symbols."""
    languages: tuple[str, ...] = tuple(LANGUAGES)


class FormalLanguages(TrainedExperiment[LanguageSize]):
    """Predict the rule's answer for each string."""

    name = "formal-languages"
    title = "Formal languages (table 4, Chomsky hierarchy)"
    question = (
        "Seven languages, trained on strings of 1 to 40 symbols and tested on strings of 40 to 256, which "
        "requires learning the rule rather than the strings. Two blocks, each a convolution of width 4 and "
        "a mixer, as in the paper. Accuracy is the share of correct answers; *best constant answer* is the "
        "accuracy of always giving the same one. A recurrence whose decay lies in (0, 1) cannot track "
        "parity whatever its depth; the signed variants' lies in (-1, 1)."
    )
    changes = (
        "cpu: width 64 in place of 256, 1,500 steps of 32 strings at a peak rate of 3e-3 (cosine) in "
        f"place of 500,000 of 256 at 3e-4. {ROUNDED} Of the published figures it is not known here how "
        "they are scaled; those on xLSTM count chance as 0, as recalled."
    )
    recipe = "formal-languages"
    common_train: ClassVar = {"precision": "bfloat16-products", "eval_tokens": 0}
    sizes: ClassVar = {
        "cpu": LanguageSize(
            task={"eval_sequences": 512},
            train={"steps": 1500, "batch_size": 32, "log_every": 50},
            test_sequences=1024,
        ),
        "paper": LanguageSize(
            model={"d_model": 256},
            task={"eval_sequences": 2048},
            train=training(
                every=5000, logs=10, steps=500_000, batch_size=256, learning_rate=3e-4, **PAPER_TRAIN
            ),
            test_sequences=8192,
        ),
        "tiny": LanguageSize(
            model={"d_model": 8},
            task={"eval_sequences": 64, "eval_max_length": 48},
            train=TINY_TRAIN,
            test_sequences=64,
            test_lengths=(40, 48),
            languages=("parity", "bucket-sort"),
            seeds=1,
        ),
    }

    def mixers(self) -> Sequence[str]:
        return every_mixer("minlstm-unnormalised", *SIGNED)

    def grid(self, size: LanguageSize, mixer: str) -> Iterator[GridPoint]:
        config = self.config(size, mixer)
        for language in size.languages:
            often = mixer in THREE_SEEDS or (mixer in SIGNED and language in TRACKING)
            setting = {"mixer": mixer, "language": language}
            chosen = config.override(task={"language": language})
            seeds = size.seeds if often else size.other_seeds
            yield GridPoint(f"{language}-{mixer}", setting, chosen, seeds)

    def examine(self, model: SequenceModel, config: RunConfig, size: LanguageSize) -> dict[str, Any]:
        task = config.task
        assert isinstance(task, FormalLanguageConfig)
        whole = replace(task, part="test", eval_sequences=size.test_sequences)
        test = FormalLanguageTask(whole)
        by_length = {
            str(length): FormalLanguageTask(
                replace(whole, eval_min_length=length, eval_max_length=length)
            ).evaluate(model)["accuracy"]
            for length in size.test_lengths
        }
        return {"test": test.evaluate(model), "constant": test.commonest_answer(), "by_length": by_length}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        runs = by_kind(records, "language", "mixer")
        languages = [name for name in LANGUAGES if any(language == name for language, _ in runs)]
        mixers = [name for name in self.mixers() if any(mixer == name for _, mixer in runs)]
        tables = [_overall(runs, languages, mixers)]
        for language in TRACKING:
            if language in languages:
                tables.append(_by_length(runs, language, mixers))
        return tables

    def draw(self, records: Sequence[Record]) -> Figure:
        runs = by_kind(records, "language", "mixer")
        languages = list(dict.fromkeys(language for language, _ in runs)) or ["none"]
        columns = min(4, len(languages))
        figure, panels = new_figure(-(-len(languages) // columns), columns, width=4.6, height=3.4)
        for axes, language in zip(panels, languages, strict=False):
            lines = {
                mixer: [(length, mean(bests(found, "by_length", str(length)))) for length in _lengths(found)]
                for (at, mixer), found in runs.items()
                if at == language
            }
            draw_lines(axes, lines)
            axes.set_ylim(-0.02, 1.02)
            finish(axes, language, "symbols", "accuracy")
        for axes in panels[len(languages) :]:
            axes.set_visible(False)
        return figure


def _overall(
    runs: dict[tuple[Any, ...], list[Record]], languages: Sequence[str], mixers: Sequence[str]
) -> Table:
    rows = []
    for mixer in mixers:
        found = [runs.get((language, mixer), []) for language in languages]
        counts = sorted({len(group) for group in found if group})
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        accuracies = [spread(bests(group, "test", "accuracy"), 2) if group else "" for group in found]
        rows.append([mixer, seeds, *accuracies])
    constants = []
    for language in languages:
        group = next(found for (at, _), found in runs.items() if at == language)
        constants.append(f"{group[0]['result']['constant']:.2f}")
    rows.append(["*best constant answer*", "", *constants])
    for name, row in PUBLISHED.items():
        figures = [row[language].text if language in row else "" for language in languages]
        rows.append([f"{name} (published, as recalled, unconfirmed)", "", *figures])
    note = (
        "Rows marked as published are of the paper's table 4, at its own setting and perhaps on another "
        "scale of accuracy; the paper reports no parity and no minGRU."
    )
    return Table("Accuracy on 40 to 256 symbols", ["mixer", "seeds", *languages], rows, note)


def _by_length(runs: dict[tuple[Any, ...], list[Record]], language: str, mixers: Sequence[str]) -> Table:
    chosen = {mixer: runs[language, mixer] for mixer in mixers if (language, mixer) in runs}
    lengths = _lengths(next(iter(chosen.values())))
    rows = [
        [mixer, *(spread(bests(found, "by_length", str(length)), 3) for length in lengths)]
        for mixer, found in chosen.items()
    ]
    return Table(f"Accuracy on {language} by length", ["mixer", *map(str, lengths)], rows)


def _lengths(runs: Sequence[Record]) -> list[int]:
    return sorted(map(int, runs[0]["result"]["by_length"]))


EXPERIMENT = FormalLanguages()
