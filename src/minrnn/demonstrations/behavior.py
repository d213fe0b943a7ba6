"""Behavior policies in numpy: small networks on normalized observations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

OBSERVATION_CLIP = 10.0  # as in stable-baselines3's VecNormalize, used in training
OBSERVATION_EPSILON = 1e-8


@dataclass(frozen=True)
class Behavior:
    """A behavior policy: an MLP with tanh on normalized observations, with Gaussian noise on its actions.

        x = clip((observation - mean) / sqrt(variance + epsilon), -10, 10)
        action = W_k tanh(... tanh(W_1 x + b_1) ...) + b_k + noise

    Args:
        parameters: (P,), for each layer W in row-major order, then b.
        sizes: the widths of all layers, from the observation to the action; two for a linear policy.
        mean: (S,), the mean of the observations.
        variance: (S,), the variance of the observations.
        action_noise: (A,), the standard deviation of the noise on actions.
    """

    parameters: Floats
    sizes: tuple[int, ...]
    mean: Floats
    variance: Floats
    action_noise: Floats

    def act(self, observation: Floats, random: np.random.Generator) -> Floats:
        """Return an action (A,) for an observation (S,); it is not clipped to the environment's bounds."""
        x = (observation - self.mean) / np.sqrt(self.variance + OBSERVATION_EPSILON)
        x = np.clip(x, -OBSERVATION_CLIP, OBSERVATION_CLIP)
        start, layers = 0, list(pairwise(self.sizes))
        for number, (fan_in, fan_out) in enumerate(layers):
            end = start + fan_in * fan_out
            x = self.parameters[start:end].reshape(fan_out, fan_in) @ x + self.parameters[end : end + fan_out]
            x = np.tanh(x) if number < len(layers) - 1 else x
            start = end + fan_out
        return x + self.action_noise * random.standard_normal(len(x))
