"""`minrnn act`: run a trained policy in its environment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import tyro
from rich.live import Live
from rich.table import Table

from minrnn.cli.arguments import check_range, parse
from minrnn.files import write_json
from minrnn.models import DecisionModel, Policy
from minrnn.tasks.environments import make_environment
from minrnn.tasks.film import Film
from minrnn.tasks.locomotion import normalized_score
from minrnn.tasks.rollouts import Rollout, make_filmed, picture, play
from minrnn.training import MOST_SEEDS, Output, attempt, choose_device, load_trained, provenance

PARALLEL_EPISODES = 10
"""Number of episodes run at a time."""

MOST_EPISODES = 1 << 31

TABLE_ROWS = 20
"""Rows of the live table, to fit on a screen."""


@dataclass(frozen=True)
class ActCommand:
    """Run a trained policy in an environment; print its returns, and write acting.json to the run."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    env: str | None = None
    """Environment, by gymnasium's id, such as Hopper-v5 or package.module:Name-v0 (None: the one of the
    training data)."""
    episodes: int = 10
    """Number of episodes, each with its own seed."""
    target_return: float | None = None
    """Return that the policy is conditioned on (None: that of its run, by default the mean return of the best
    training episodes, those with a tenth of the steps)."""
    record: Path | None = None
    """File for a video of the first episode, which needs no display: .gif, .mp4, or .png for a few frames
    side by side (None: no video)."""
    seed: int = 0
    """Seed of the first episode; episode k has the seed plus k."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, ..."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn act`."""
    command = parse(ActCommand, "act", args)
    check_range("act", "episodes", command.episodes, 1, MOST_EPISODES)
    check_range("act", "seed", command.seed, 0, MOST_SEEDS - 1 - command.episodes)
    device = choose_device(command.device)
    model, _, step, _ = load_trained(command.run, command.checkpoint, device)
    if not isinstance(model, DecisionModel):
        raise ValueError(
            f"act: {command.run} must be a run of decisions, got one of another task, without actions"
        )
    name = command.env or model.config.environment
    if name is None:
        raise ValueError("act: --env must be given, as the policy's training data name no environment")
    policy = Policy(model, target_return=command.target_return)
    console = Output()
    played, film = _play(policy, name, command, console)
    results = {
        "checkpoint": command.checkpoint,
        "step": step,
        "environment": name,
        "target_return": policy.target_return,
        **_summary(name, played),
        "seed": command.seed,
        **provenance(device),
    }
    try:
        write_json(command.run / "acting.json", results)
    finally:  # print the results even if the run directory is read-only
        console.print(_table(f"{name}, {command.run}", played))
        if film is not None:
            why_not = attempt(film.write)
            said = f"video: {film.path}" if why_not is None else f"no video: {why_not}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
    print(_conclusion(results))
    return 0


def _play(
    policy: Policy, name: str, command: ActCommand, console: Output
) -> tuple[list[Rollout], Film | None]:
    """Run all episodes, with a live table on a terminal, and record the first."""
    first = make_environment(name) if command.record is None else make_filmed(name)
    rate = float(first.metadata.get("render_fps") or 25)
    film = None if command.record is None else Film(command.record, rate)
    others = [make_environment(name) for _ in range(min(PARALLEL_EPISODES, command.episodes) - 1)]
    title = f"{name}, {command.run}"
    played: list[Rollout] = []

    def latest() -> Table:
        return _table(title, played[-TABLE_ROWS:])

    live: Live | None = None  # refreshed by a thread of its own
    if console.is_terminal:
        live = Live(console=console, refresh_per_second=8, transient=True, get_renderable=latest)
    with live or nullcontext():
        for step, played in enumerate(play(policy, [first, *others], command.episodes, seed=command.seed)):
            if film is not None and not played[0].ended and (played[0].steps - 1) % film.every == 0:
                film.add(picture(first))
            if live is not None and step == 0:
                live.refresh()
    for environment in (first, *others):
        environment.close()
    return played, film


def _table(title: str, played: Sequence[Rollout]) -> Table:
    table = Table("episode", "steps", "return", "ended", title=title)
    for episode in played:
        table.add_row(
            str(episode.number), str(episode.steps), f"{episode.total_return:,.1f}", episode.ended or "..."
        )
    return table


def _summary(name: str, played: Sequence[Rollout]) -> dict[str, Any]:
    returns = [episode.total_return for episode in played]
    return {
        "mean_return": mean(returns),
        "spread": stdev(returns) if len(returns) > 1 else 0.0,
        "score": normalized_score(name, mean(returns)),
        "returns": returns,
        "lengths": [episode.steps for episode in played],
    }


def _conclusion(results: dict[str, Any]) -> str:
    """Return the results in one line."""
    count = len(results["returns"])
    target = "" if results["target_return"] is None else f", target {results['target_return']:,.1f}"
    score = "" if results["score"] is None else f"; D4RL's normalized score {results['score']:.1f}"
    spread = f" ± {results['spread']:,.1f}" if count > 1 else ""
    episodes = "1 episode" if count == 1 else f"{count} episodes"
    return f"return {results['mean_return']:,.1f}{spread} over {episodes}{target}{score}"
