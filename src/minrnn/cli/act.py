"""`minrnn act`: a trained policy in its environment, episode by episode."""

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
"""Episodes that are played at a time."""

MOST_EPISODES = 1 << 31

TABLE_ROWS = 20
"""Rows of the table while it moves: as many as fit on a screen."""


@dataclass(frozen=True)
class ActCommand:
    """Let a trained policy act in an environment; print what it earns, and write acting.json in the run."""

    run: tyro.conf.Positional[Path]
    """Directory of the run whose policy acts."""
    env: str | None = None
    """Environment, by gymnasium's name, such as Hopper-v5 or package.module:Name-v0 (None: the one that the
    policy learned from)."""
    episodes: int = 10
    """Episodes, each with a seed of its own."""
    target_return: float | None = None
    """Return that the policy asks for (None: what its run says, by default the mean of the best episodes
    that it learned from, those that hold a tenth of the steps)."""
    record: Path | None = None
    """File for a film of the first episode, without a screen too: .gif, .mp4, or .png for a few pictures side
    by side (None: no film)."""
    seed: int = 0
    """Seed of the first episode; the others follow."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    device: str = "auto"
    """Device to compute on: auto (a GPU when there is one), cpu, cuda, ..."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn act`."""
    command = parse(ActCommand, "act", args)
    check_range("act", "episodes", command.episodes, 1, MOST_EPISODES)
    check_range("act", "seed", command.seed, 0, MOST_SEEDS - 1 - command.episodes)
    device = choose_device(command.device)
    model, _, step, _ = load_trained(command.run, command.checkpoint, device)
    if not isinstance(model, DecisionModel):
        raise ValueError(
            f"act: {command.run} must be a run of decisions; what this one learned takes no actions"
        )
    name = command.env or model.config.environment
    if name is None:
        raise ValueError("act: --env must be given, as the data that the policy learned from name none")
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
    finally:  # of a run that is read-only, say: what was played can be seen all the same
        console.print(_table(f"{name}, {command.run}", played))
        if film is not None:
            why_not = attempt(film.write)
            said = f"film: {film.path}" if why_not is None else f"no film: {why_not}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
    print(_conclusion(results))
    return 0


def _play(
    policy: Policy, name: str, command: ActCommand, console: Output
) -> tuple[list[Rollout], Film | None]:
    """Play all episodes under a table that moves, where there is a terminal, and film the first."""
    first = make_environment(name) if command.record is None else make_filmed(name)
    rate = float(first.metadata.get("render_fps") or 25)
    film = None if command.record is None else Film(command.record, rate)
    others = [make_environment(name) for _ in range(min(PARALLEL_EPISODES, command.episodes) - 1)]
    title = f"{name}, {command.run}"
    played: list[Rollout] = []

    def latest() -> Table:
        return _table(title, played[-TABLE_ROWS:])

    live: Live | None = None  # a thread of it draws, eight times a second
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
    """Say it in one line."""
    count = len(results["returns"])
    asked = "" if results["target_return"] is None else f", asked for {results['target_return']:,.1f}"
    score = "" if results["score"] is None else f"; D4RL's normalized score {results['score']:.1f}"
    spread = f" ± {results['spread']:,.1f}" if count > 1 else ""
    episodes = "1 episode" if count == 1 else f"{count} episodes"
    return f"return {results['mean_return']:,.1f}{spread} over {episodes}{asked}{score}"
