"""Parameter counts of every mixer, with the formulas of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from minrnn.experiments.experiment import Table
from minrnn.mixers import MIXERS

__all__ = ["FORMULAS", "Formula", "count_weights", "parameter_table"]


class Formula(NamedTuple):
    """The number of a layer's weights, without biases, as a function of input and state width."""

    text: str
    weights: Callable[[int, int], int]
    """(d_x, d_h) -> number of weights."""


FORMULAS: dict[str, Formula] = {
    "mingru": Formula("2 d_h d_x", lambda d_x, d_h: 2 * d_h * d_x),
    "gru": Formula("3 d_h (d_x + d_h)", lambda d_x, d_h: 3 * d_h * (d_x + d_h)),
    "minlstm": Formula("3 d_h d_x", lambda d_x, d_h: 3 * d_h * d_x),
    "lstm": Formula("4 d_h (d_x + d_h)", lambda d_x, d_h: 4 * d_h * (d_x + d_h)),
}
"""The paper's formulas, as published; it has none for other mixers."""

BESIDE = {"mingru": "gru", "minlstm": "lstm"}
"""The layers with which ours are compared."""

WIDTH = 64
EXPANSIONS = (1, 2, 3, 4)


def count_weights(mixer: str, d_model: int, d_hidden: int) -> int:
    """Return the number of a mixer's weights, without biases."""
    with torch.device("meta"):
        made = MIXERS[mixer](d_model, d_hidden)
    return sum(weight.numel() for name, weight in made.named_parameters() if "bias" not in name)


def parameter_table() -> Table:
    """Return a table of every mixer's weights by state width, ours also relative to the layers they replace.

    Raises:
        RuntimeError: a count differs from the paper's formula.
    """
    rows = []
    for mixer in MIXERS:
        counts = [count_weights(mixer, WIDTH, WIDTH * times) for times in EXPANSIONS]
        formula = FORMULAS.get(mixer)
        if formula is not None:
            expected = [formula.weights(WIDTH, WIDTH * times) for times in EXPANSIONS]
            if counts != expected:
                raise RuntimeError(f"parameters: {mixer} must have {expected} weights, got {counts}")
        cells = [f"{count:,}" for count in counts]
        if other := BESIDE.get(mixer):
            shares = [
                count / count_weights(other, WIDTH, WIDTH * times)
                for count, times in zip(counts, EXPANSIONS, strict=True)
            ]
            cells = [f"{cell} ({share:.0%} of {other})" for cell, share in zip(cells, shares, strict=True)]
        rows.append([mixer, formula.text if formula else "", *cells])
    head = ["mixer", "formula (published)", *(f"d_h = {times} d_x" for times in EXPANSIONS)]
    note = (
        f"Weights without biases, d_x = {WIDTH}, counted in the modules; where there is a formula, the count "
        f"is checked against it. Beside the recurrence, aaren, attention, mamba and s4d hold projections "
        f"that the others leave to the block."
    )
    return Table("Parameters of one layer", head, rows, note)
