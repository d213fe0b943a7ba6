"""Policies that make data, in numpy: a small network on normalized observations, and what training left of "
"it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

OBSERVATION_CLIP = 10.0  # as stable-baselines3's VecNormalize, with which the networks were trained
OBSERVATION_EPSILON = 1e-8


@dataclass(frozen=True)
class Behavior:
    """A policy: tanh between the layers of a network on normalized observations, noise on its actions.

        x = clip((observation - mean) / sqrt(variance + epsilon), -10, 10)
        action = W_k tanh(... tanh(W_1 x + b_1) ...) + b_k + noise

    Args:
        parameters: (P,), every layer's W, row by row, then its b.
        sizes: widths from the observation's to the action's; two of them are a linear policy.
        mean: (S,), of the observations.
        variance: (S,).
        action_noise: (A,), the standard deviation of what is added to actions.
    """

    parameters: Floats
    sizes: tuple[int, ...]
    mean: Floats
    variance: Floats
    action_noise: Floats

    def act(self, observation: Floats, random: np.random.Generator) -> Floats:
        """Return an action (A,) on an observation (S,); it is the caller who keeps it within bounds."""
        x = (observation - self.mean) / np.sqrt(self.variance + OBSERVATION_EPSILON)
        x = np.clip(x, -OBSERVATION_CLIP, OBSERVATION_CLIP)
        start, layers = 0, list(pairwise(self.sizes))
        for number, (fan_in, fan_out) in enumerate(layers):
            end = start + fan_in * fan_out
            x = self.parameters[start:end].reshape(fan_out, fan_in) @ x + self.parameters[end : end + fan_out]
            x = np.tanh(x) if number < len(layers) - 1 else x
            start = end + fan_out
        return x + self.action_noise * random.standard_normal(len(x))
