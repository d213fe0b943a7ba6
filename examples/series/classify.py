"""Classify multivariate series of unequal length with missing values, with torch.nn.GRU and with MinGRU.

pip install aeon                                      # its wheel holds the data
python examples/series/classify.py                    # the table of docs/examples/series.md
python examples/series/classify.py --datasets JapaneseVowels --removed 0.5 --seeds 0
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from minrnn import MinGRU, MinLSTM

RNNS = {"gru": nn.GRU, "lstm": nn.LSTM, "mingru": MinGRU, "minlstm": MinLSTM}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates, from which the validation split chooses

Series = NDArray[np.floating[Any]]


@dataclass
class Split:
    """Series `(T, channels)`, in which what is missing is NaN, and their classes."""

    series: list[Series]
    classes: Tensor

    def part(self, chosen: Sequence[int]) -> Split:
        """Return some of the series."""
        return Split([self.series[i] for i in chosen], self.classes[list(chosen)])


class Classifier(nn.Module):
    """Recurrent layers over packed series, the mean of their outputs over time, and a linear layer."""

    def __init__(self, kind: str, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.into = nn.Linear(inputs, width)
        self.rnn = RNNS[kind](width, width, num_layers=2)
        self.out = nn.Linear(width, classes)

    def forward(self, inputs: PackedSequence) -> Tensor:
        """Return logits, `(B, classes)`."""
        output, _ = self.rnn(inputs._replace(data=self.into(inputs.data)))
        return self.out(torch.stack([steps.mean(dim=0) for steps in unpack_sequence(output)]))


def load(name: str) -> tuple[Split, Split]:
    """Return the training and the test split that aeon ships, with numbers for the classes."""
    try:
        from aeon.datasets import load_japanese_vowels, load_pickup_gesture_wiimoteZ
    except ImportError as error:
        sys.exit(
            f"classify.py: aeon, whose wheel holds the data, cannot be imported ({error}): pip install aeon"
        )
    loaders = {"JapaneseVowels": load_japanese_vowels, "PickupGestureWiimoteZ": load_pickup_gesture_wiimoteZ}
    if name not in loaders:
        sys.exit(f"classify.py: --datasets must be of {', '.join(loaders)}, not {name}")
    found = [loaders[name](split=split) for split in ("train", "test")]
    labels = sorted(set(found[0][1]))
    train, test = (Split([x.T for x in X], torch.tensor([labels.index(y) for y in Y])) for X, Y in found)
    return train, test


def remove(split: Split, share: float, rng: np.random.Generator) -> Split:
    """Return the split with this share of its values missing, each step and channel drawn for itself."""
    return Split([np.where(rng.random(x.shape) < share, np.nan, x) for x in split.series], split.classes)


def statistics(split: Split) -> tuple[Series, Series]:
    """Return mean and deviation of each channel, over the values that are there."""
    steps = np.concatenate(split.series)
    return np.nanmean(steps, axis=0), np.nanstd(steps, axis=0)


def encode(split: Split, center: Series, scale: Series) -> list[Tensor]:
    """Return a model's input for each series, `(T, 3 * channels)`.

    Of each value it holds the last one seen, whether that is new, and its age. Before the first value of a
    channel the mean stands for it, which becomes 0.
    """
    return [encode_one(x, center, scale) for x in split.series]


def encode_one(x: Series, center: Series, scale: Series) -> Tensor:
    """Return the input for one series."""
    seen = ~np.isnan(x)
    steps = np.arange(len(x))[:, None]
    last = np.maximum.accumulate(np.where(seen, steps, -1))  # (T, channels): the step of the last value
    values = np.where(last < 0, center, np.take_along_axis(x, np.maximum(last, 0), axis=0))
    parts = [(values - center) / scale, seen, np.log1p(steps - last)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()


def stratified(classes: Tensor, share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return the indices of a training part, and of a validation part with this share of each class."""
    kept: list[int] = []
    held: list[int] = []
    for label in classes.unique():
        members = rng.permutation(np.flatnonzero(classes.numpy() == int(label)))
        count = max(1, round(share * len(members)))
        held += members[:count].tolist()
        kept += members[count:].tolist()
    return kept, held


def fit(kind: str, width: int, split: Split, steps: int, rate: float, seed: int) -> nn.Module:
    """Train a classifier on batches of 32 series, with a learning rate that rises to `rate` and falls."""
    torch.manual_seed(seed)
    inputs = encode(split, *statistics(split))
    model = Classifier(kind, inputs[0].shape[1], width, int(split.classes.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(len(inputs))[:32]
        logits = model(pack_sequence([inputs[i] for i in rows], enforce_sorted=False))
        loss = nn.functional.cross_entropy(logits, split.classes[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, known: Split, asked: Split) -> tuple[float, float]:
    """Return loss and accuracy of a model of the known series on others."""
    logits = model(pack_sequence(encode(asked, *statistics(known)), enforce_sorted=False))
    loss = nn.functional.cross_entropy(logits, asked.classes)
    return float(loss), float((logits.argmax(dim=-1) == asked.classes).float().mean())


def choose_rate(kind: str, width: int, split: Split, steps: int, folds: int) -> float:
    """Return the learning rate with the lowest loss on parts of the training split, averaged over `folds`."""
    losses = dict.fromkeys(RATES, 0.0)
    for fold in range(folds):
        kept, held = stratified(split.classes, 0.2, np.random.default_rng([2, fold]))
        for rate in RATES:
            model = fit(kind, width, split.part(kept), steps, rate, fold)
            losses[rate] += evaluate(model, split.part(kept), split.part(held))[0] / folds
    return min(RATES, key=losses.__getitem__)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of test accuracies in percent, means and deviations over the seeds."""
    shares = list(dict.fromkeys(record["removed"] for record in records))
    heads = " | ".join(f"{share:.0%} removed" for share in shares)
    lines = [f"| data | model | parameters | {heads} | CPU seconds |", "|" + "---|" * (len(shares) + 4)]
    for data, name in dict.fromkeys((record["data"], record["model"]) for record in records):
        rows = [record for record in records if (record["data"], record["model"]) == (data, name)]
        cells = [
            spread([100 * row["accuracy"] for row in rows if row["removed"] == share]) for share in shares
        ]
        seconds = mean(row["seconds"] for row in rows)
        lines.append(f"| {data} | {name} | {rows[0]['parameters']:,} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def spread(numbers: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several."""
    return f"{mean(numbers):.1f}" + (f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else "")


def main(
    datasets: tuple[str, ...] = ("JapaneseVowels", "PickupGestureWiimoteZ"),
    models: tuple[str, ...] = ("gru:32", "mingru:32", "mingru:54"),
    removed: tuple[float, ...] = (0.0, 0.2, 0.5),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    steps: int = 300,
    folds: int = 2,
    output: Path | None = None,
) -> None:
    """Train classifiers on series with missing values and print their test accuracy.

    Args:
        datasets: JapaneseVowels and PickupGestureWiimoteZ.
        models: kinds (gru, lstm, mingru, minlstm) and widths.
        removed: shares of the values that are removed.
        seeds: of the weights, of the order of the data and of what is removed.
        steps: training steps of each model.
        folds: divisions of the training split, by which a learning rate is chosen with a fifth removed.
        output: a JSON file for the results.
    """
    records = []
    for data in datasets:
        train, test = load(data)
        for name in models:
            kind, _, width = name.partition(":")
            rate = choose_rate(kind, int(width), remove(train, 0.2, np.random.default_rng(1)), steps, folds)
            for share, seed in product(removed, seeds):
                rng = np.random.default_rng([0, seed])
                known, asked = remove(train, share, rng), remove(test, share, rng)
                start = time.process_time()
                model = fit(kind, int(width), known, steps, rate, seed)
                seconds, accuracy = time.process_time() - start, evaluate(model, known, asked)[1]
                record = {"data": data, "model": name, "removed": share, "seed": seed, "rate": rate}
                record |= {"parameters": sum(p.numel() for p in model.parameters())}
                records.append({**record, "accuracy": accuracy, "seconds": seconds})
                print(json.dumps(records[-1]), flush=True)
    print(table(records))
    if output is not None:
        machine = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        }
        output.write_text(
            json.dumps({"steps": steps, "machine": machine, "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    tyro.cli(main)
