"""Tables and plots of policies' scores, and the paper's published scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from minrnn.benchmarks.plots import color, draw_lines, finish, new_figure
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.published import Published, recalled, shown
from minrnn.experiments.records import by_kind, spread
from minrnn.tasks.locomotion import normalized_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BC = "bc"
"""Behavior cloning: minGRU's trunk with one observation as its only input."""

ENVIRONMENTS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
"""Environments by D4RL's names, with the version of local data."""

QUALITIES: dict[str, tuple[str, ...]] = {
    "local": ("medium", "medium-replay"),
    "d4rl": ("medium", "medium-replay", "medium-expert"),
    "minari": ("simple", "medium", "expert"),
}
"""Kinds of data. They are of different policies and versions, so they never share a column."""

SOURCES = {
    "local": "`minrnn make-data` made them on one machine, with policies of its own",
    "d4rl": "D4RL's version 2",
    "minari": "Minari's version 0 of MuJoCo's environments",
}

MEAN, BEST_TENTH, HIGHEST = TARGETS = "mean", "best tenth", "highest"
"""Target returns, defined by the training episodes; scores are those of the second."""

TABLE_3: dict[str, dict[str, Published]] = {
    name: dict(zip(("DT", "DS4", "DAaren", "DMamba", "minLSTM", "minGRU"), map(recalled, row), strict=True))
    for name, row in {
        "halfcheetah-medium": ("42.6", "42.5", "42.2", "42.8", "42.7 ± 0.7", "43.0 ± 0.4"),
        "hopper-medium": ("68.4", "54.2", "80.9", "83.5", "85.0 ± 4.4", "79.4 ± 8.2"),
        "walker2d-medium": ("75.5", "78.0", "74.4", "78.2", "72.0 ± 7.5", "73.3 ± 3.3"),
        "halfcheetah-medium-replay": ("37.0", "15.2", "37.9", "39.6", "38.6 ± 1.1", "38.5 ± 1.1"),
        "hopper-medium-replay": ("85.6", "49.6", "77.9", "82.6", "88.5 ± 4.7", "90.5 ± 0.9"),
        "walker2d-medium-replay": ("71.2", "69.0", "71.4", "70.9", "69.7 ± 10.7", "72.8 ± 8.9"),
        "halfcheetah-medium-expert": ("88.8", "92.7", "75.7", "91.9", "85.4 ± 1.7", "86.3 ± 0.5"),
        "hopper-medium-expert": ("109.6", "110.8", "103.9", "111.1", "110.3 ± 1.6", "109.7 ± 2.7"),
        "walker2d-medium-expert": ("109.3", "105.7", "110.5", "108.3", "110.3 ± 0.5", "110.3 ± 0.4"),
        "average of the nine": ("76.4", "68.6", "75.0", "78.8", "78.1", "78.2"),
    }.items()
}
"""Normalized scores on D4RL's data; the paper took the first four columns from other papers."""

Runs = dict[tuple[Any, ...], list[Record]]
"""Records by mixer, environment and quality."""


def tables(records: Sequence[Record]) -> list[Table]:
    """Return tables for each kind of data, and the published one."""
    made = []
    for data in QUALITIES:
        if runs := _runs_of(records, data):
            made += [_scores(data, runs), _target_table(data, runs), _data_table(data, runs)]
    return [*made, published_table()]


def draw(records: Sequence[Record]) -> Figure:
    """Draw a row for each kind of data: scores, their cost, and scores against target returns."""
    kinds = {data: runs for data in QUALITIES if (runs := _runs_of(records, data))}
    figure, panels = new_figure(len(kinds) or 1, 3)
    for row, (data, runs) in enumerate(kinds.items()):
        scores, cost, target = panels[3 * row : 3 * row + 3]
        _draw_scores(scores, data, runs)
        _draw_cost(cost, runs)
        _draw_targets(target, runs)
    return figure


def score(environment: str, mean_return: float) -> float:
    """Return D4RL's normalized score, or the return itself if D4RL has none."""
    found = normalized_score(environment, mean_return)
    return mean_return if found is None else found


def _runs_of(records: Sequence[Record], data: str) -> Runs:
    chosen = [record for record in records if record["setting"]["data"] == data]
    return by_kind(chosen, "mixer", "env", "quality")


def _mixers(runs: Runs) -> list[str]:
    return list(dict.fromkeys(mixer for mixer, _, _ in runs))


def _columns(runs: Runs) -> list[tuple[str, str]]:
    """Return environments and qualities, in the order of their tables."""
    columns = {(env, quality) for _, env, quality in runs}
    order = [*ENVIRONMENTS, *sorted({env for env, _ in columns} - ENVIRONMENTS.keys())]
    qualities = list(dict.fromkeys(quality for kinds in QUALITIES.values() for quality in kinds))
    return sorted(columns, key=lambda column: (qualities.index(column[1]), order.index(column[0])))


def _averages(
    mixer: str, columns: Sequence[tuple[str, str]], runs: Runs, target: str = BEST_TENTH
) -> list[float]:
    """Return the mean over all data for each seed that was run on all of them."""
    by_seed: dict[int, list[float]] = {}
    for column in columns:
        for record in runs.get((mixer, *column), []):
            if played := record["result"]["asked"].get(target):
                by_seed.setdefault(record["setting"]["seed"], []).append(played["score"])
    return [mean(scores) for _, scores in sorted(by_seed.items()) if len(scores) == len(columns)]


def _of_data(runs: Runs, column: tuple[str, str]) -> Mapping[str, Any]:
    """Return the properties of the data."""
    found: Mapping[str, Any] = next(
        runs_of[0]["result"]["data"] for (_, *place), runs_of in runs.items() if tuple(place) == column
    )
    return found


def _scores(data: str, runs: Runs) -> Table:
    columns = _columns(runs)
    rows = []
    for mixer in _mixers(runs):
        found = [runs.get((mixer, *column), []) for column in columns]
        every = [record for some in found for record in some]
        counts = sorted({len(some) for some in found if some})
        averages = _averages(mixer, columns, runs)
        rows.append(
            (
                -mean(averages) if averages else np.inf,
                [
                    mixer,
                    " to ".join(f"{count:,}" for count in _ends(r["result"]["parameters"] for r in every)),
                    " to ".join(map(str, _ends(counts))),
                    *(spread([r["result"]["score"] for r in some], 1) if some else "" for some in found),
                    f"**{spread(averages, 1)}**" if averages else "",
                    f"{mean(r['result']['training_seconds'] for r in every) / 60:.1f}",
                    f"{1e3 * mean(r['result']['seconds_per_action'] for r in every):.2f}",
                ],
            )
        )
    own = [_of_data(runs, column)["score"] for column in columns]
    ranked = [row for _, row in sorted(rows, key=lambda item: item[0])]
    blank = ["", ""]
    ranked.append(
        ["*the data's own mean*", *blank, *(f"{score:.1f}" for score in own), f"{mean(own):.1f}", *blank]
    )
    head = ["policy", "parameters", "seeds", *(f"{env} {quality}" for env, quality in columns)]
    head += ["average", "minutes of training", "ms an action"]
    episodes = " to ".join(
        map(str, _ends(len(record["result"]["returns"]) for some in runs.values() for record in some))
    )
    note = (
        f"Normalized scores, the mean of {episodes} episodes of each run; ± is the deviation over seeds. "
        f"The data: {SOURCES[data]}. *ms an action*: in one environment, measured when each run has ended, "
        "not in turns, as `minrnn reproduce acting` does."
    )
    return Table(f"Scores on {data} data", head, ranked, note)


def _target_table(data: str, runs: Runs) -> Table:
    columns = _columns(runs)
    rows = []
    for mixer in _mixers(runs):
        if mixer != BC:
            averages = [_averages(mixer, columns, runs, target) for target in TARGETS]
            rows.append([mixer, *(spread(some, 1) if some else "" for some in averages)])
    if target_scores := _target_scores(runs):
        rows.append(["*target return*", *(f"{score:.1f}" for score in target_scores)])
    head = ["policy", "target: the data's mean", "their best tenth", "their highest"]
    note = (
        "Scores, averaged over all data, by target return. "
        "*Their best tenth*: the best episodes, which hold a tenth of the steps."
    )
    return Table(f"Scores by target return on {data} data", rows=rows, head=head, note=note)


def _target_scores(runs: Runs) -> list[float]:
    """Return the scores of the target returns, averaged over all data, in the order of TARGETS."""
    found: dict[str, dict[tuple[Any, ...], float]] = {target: {} for target in TARGETS}
    for (_, *column), records in runs.items():
        for record in records:
            for target, played in record["result"]["asked"].items():
                if played["target_return"] is not None:
                    found_score = score(record["result"]["environment"], played["target_return"])
                    found[target][tuple(column)] = found_score
    return [mean(scores.values()) for scores in found.values() if scores]


def _data_table(data: str, runs: Runs) -> Table:
    rows, digests = [], []
    for column in _columns(runs):
        of_data = _of_data(runs, column)
        some = [record for (_, *place), found in runs.items() if tuple(place) == column for record in found]
        digests.append(len({record["result"]["data"]["sha256"] for record in some}))
        targets = _ends(
            record["result"]["target_return"]
            for record in some
            if record["result"]["target_return"] is not None
        )
        rows.append(
            [
                " ".join(column),
                some[0]["result"]["environment"],
                f"{of_data['episodes']:,}",
                f"{of_data['steps']:,}",
                f"{of_data['mean_return']:,.1f} ({of_data['score']:.1f})",
                f"{of_data['best_return']:,.1f} ({of_data['best_score']:.1f})",
                " to ".join(f"{target:,.1f}" for target in targets),
            ]
        )
    head = ["data", "environment", "episodes", "steps", "mean return (score)", "best return (score)"]
    head += ["target return"]
    mixed = "" if set(digests) == {1} else "**Runs of one column were trained on different files.** "
    note = f"{mixed}All policies have the same target return, but `{BC}` has none."
    return Table(f"The {data} data", head, rows, note)


def published_table() -> Table:
    """Return the paper's published scores on D4RL's data."""
    columns = list(next(iter(TABLE_3.values())))
    rows = [[name, *(shown(row[column]) for column in columns)] for name, row in TABLE_3.items()]
    note = (
        "On D4RL's version 2, whose data and environments are others than those of local or Minari data: not "
        "to be compared with their scores. The first four columns are the paper's copies from other papers; "
        "it gives ± over five seeds for its own."
    )
    return Table("Published: D4RL, table 3", ["data", *(f"published {name}" for name in columns)], rows, note)


def _ends(values: Any) -> list[Any]:
    """Return the lowest and the highest of some values, or one value if all are equal."""
    found = sorted(set(values))
    return found if len(found) < 2 else [found[0], found[-1]]


def _draw_scores(axes: Axes, data: str, runs: Runs) -> None:
    columns = _columns(runs)
    mixers = _mixers(runs)
    for index, mixer in enumerate(mixers):
        offset = 0.6 * (index / max(1, len(mixers) - 1) - 0.5)
        for at, column in enumerate(columns):
            found = [run["result"]["score"] for run in runs.get((mixer, *column), [])]
            axes.scatter([at + offset] * len(found), found, s=14, color=color(mixer), zorder=3)
    for at, column in enumerate(columns):
        own = _of_data(runs, column)["score"]
        axes.hlines(own, at - 0.4, at + 0.4, color="#888888", linestyle=":", linewidth=1.2)
    names = [f"{env}\n{quality.replace('-', chr(10))}" for env, quality in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8)
    # No legend, which would cover points: the next panel names the mixers, in the same colors.
    finish(axes, f"{data} data, every seed; dotted: the data's own mean", "", "score", names="none")


def _draw_cost(axes: Axes, runs: Runs) -> None:
    for mixer in _mixers(runs):
        if averages := _averages(mixer, _columns(runs), runs):
            minutes = mean(
                run["seconds"] / 60 for kind, some in runs.items() if kind[0] == mixer for run in some
            )
            axes.scatter([minutes], [mean(averages)], s=30, color=color(mixer))
            axes.annotate(mixer, (minutes, mean(averages)), xytext=(4, 4), textcoords="offset points")
    finish(axes, "all data: average score", "minutes a run", "score", names="none")


def _draw_targets(axes: Axes, runs: Runs) -> None:
    """Draw averages over all data, of policies that were run with every target return."""
    columns, target_scores = _columns(runs), _target_scores(runs)
    lines = {}
    for mixer in _mixers(runs):
        averages = [_averages(mixer, columns, runs, target) for target in TARGETS]
        if target_scores and all(averages):
            lines[mixer] = list(zip(target_scores, map(mean, averages), strict=True))
    draw_lines(axes, lines)
    if lines:
        axes.plot(target_scores, target_scores, color="#888888", linestyle=":", linewidth=1.2)
    title = "all data: target is mean, best tenth, highest"
    finish(axes, title, "score of the target return", "score", names="legend")
