"""Beside table 3: latency of an action against the number of steps since the episode began."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minrnn.benchmarks.measure import System
from minrnn.benchmarks.plots import draw_lines, finish, new_figure
from minrnn.benchmarks.timing import Phases, clock
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.inference import state_bytes
from minrnn.experiments.timed import TimedExperiment, TimedSize, scaled, series
from minrnn.experiments.variants import every_mixer
from minrnn.models import TOKENS, DecisionConfig, DecisionModel, ModelConfig, Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBSERVATION, ACTION = 17, 6
"""Sizes of HalfCheetah's and Walker2d's observations and actions."""

LAYERS = 3
WINDOW = 20
"""Window that attention reads again for every action, as Decision Transformer does."""

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "attention": {"tokens": "interleaved", "window": WINDOW, "max_steps": 4096},
    "attention-joined": {"tokens": "joined", "window": WINDOW},
    "attention-sliding": {"tokens": "interleaved", "keys": WINDOW},
    "attention-whole": {"tokens": "interleaved", "keys": 0},
}
"""Decision Transformer and variants of it; `keys`: steps whose keys are carried, 0 for all."""


@dataclass(frozen=True)
class ActingSize(TimedSize):
    """The settings of a scale."""

    width: int
    steps: tuple[int, ...]


class Acting(TimedExperiment):
    """Time an action after some steps of an episode."""

    name = "acting"
    title = "Time of an action (beside table 3)"
    question = (
        "A policy of three layers (a mixer and an MLP each), untrained, acts in one environment, on one CPU "
        "thread or a GPU; medians, measured in turns within one process. The action *after* so many steps "
        "of an episode is timed, from observation to action, including the updates of return-to-go and "
        "state. Recurrences read a step as one token and carry their state. "
        "`attention` is Decision Transformer: it reads its last 20 steps, three tokens each, again for "
        "every action. `attention-joined` does so with one token a step; `attention-sliding` carries the "
        "keys of 20 steps and `attention-whole` those of the whole episode."
    )
    changes = "The paper has no such figure. cpu and paper differ in how long is measured."
    threads = 1  # too little work for several
    sizes: ClassVar = {
        "cpu": ActingSize(2.0, 200, 128, (1, 100, 1000)),
        "paper": ActingSize(20.0, 1000, 128, (1, 10, 100, 1000, 4000)),
        "tiny": ActingSize(0.01, 3, 8, (1, 3, 6)),
    }

    def systems(self) -> Sequence[str]:
        return [*(mixer for mixer in every_mixer() if mixer not in TRANSFORMERS), *TRANSFORMERS]

    def settings(self, size: ActingSize) -> Iterator[dict[str, Any]]:
        for steps in size.steps:
            yield {"B": 1, "D": size.width, "steps": steps}

    def inputs(self, setting: Mapping[str, Any], device: torch.device) -> Tensor:
        return torch.randn(setting["steps"], OBSERVATION, device=device)

    def build(self, system: str, setting: Mapping[str, Any], inputs: Tensor) -> System:
        model = policy_model(system, setting["D"]).to(inputs.device).eval()
        policy = Policy(model, target_return=1000.0)
        for observation in inputs[:-1]:
            policy.act(observation, 1.0)

        def act() -> Phases:
            once = copy.copy(policy)  # its memory is replaced, not modified, so all samples are the same step
            start = clock(inputs.device)
            once.act(inputs[-1], 1.0)
            return {"action": clock(inputs.device) - start}

        once = copy.copy(policy)
        once.act(inputs[-1], 1.0)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        facts = {"parameters": parameters, "state_bytes": state_bytes(once.state)}
        return System(act, facts=facts)

    def tables(self, records: Sequence[Record]) -> list[Table]:
        lines, states = series(records, "steps", "action"), series(records, "steps", "state_bytes")
        steps = sorted({record["setting"]["steps"] for record in records})
        context = dict(lines.get("attention", []))
        rows = []
        for name, line in lines.items():
            at, state = dict(line), dict(states[name])
            rows.append(
                [
                    name,
                    *(f"{1e3 * at[step]:.3g}" if step in at else "failed" for step in steps),
                    f"{context[steps[-1]] / at[steps[-1]]:.1f}" if steps[-1] in context.keys() & at else "",
                    *(f"{state[step] / 1e3:.3g}" if step in state else "" for step in (steps[0], steps[-1])),
                ]
            )
        head = ["policy", *(f"after {step - 1:,} steps, ms" for step in steps)]
        head += [f"times faster than attention after {steps[-1] - 1:,}", "state at first, kB", "at last, kB"]
        return [Table("Time of an action", head, rows)]

    def draw(self, records: Sequence[Record]) -> Figure:
        figure, (action, state) = new_figure(1, 2)
        draw_lines(action, scaled(series(records, "steps", "action"), 1e3))
        finish(action, "an action, one environment", "step of the episode", "milliseconds", log="xy")
        draw_lines(state, scaled(series(records, "steps", "state_bytes"), 1e-3))
        finish(state, "carried state", "step of the episode", "kB", log="xy")
        return figure


def policy_model(system: str, width: int) -> DecisionModel:
    """Return a policy with a mixer or with one of TRANSFORMERS."""
    settings = {"tokens": "joined", **TRANSFORMERS.get(system, {})}
    keys = settings.pop("keys", None)
    tokens = TOKENS[settings["tokens"]]
    trunk = ModelConfig(
        d_model=width,
        num_layers=LAYERS,
        mixer="attention" if system in TRANSFORMERS else system,
        conv_width=0,
        mlp_ratio=4.0,
        expansion=2.0 if system == "mamba" else 1.0,
        window=None if keys is None else keys * tokens,
    )
    return DecisionModel(DecisionConfig(trunk, OBSERVATION, ACTION, return_scale=1000.0, **settings))


EXPERIMENT = Acting()
