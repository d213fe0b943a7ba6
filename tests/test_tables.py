"""Tables mean what they say: every table on small hand-made records whose right answers are literals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minrnn.benchmarks import BENCHES
from minrnn.cli.main import main
from minrnn.experiments import (
    EXPERIMENTS,
    formal_languages,
    inference,
    listops,
    runtime,
    scores,
    selective_copying,
    shakespeare,
)
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.page import write_page
from minrnn.experiments.parameters import parameter_table
from minrnn.experiments.published import Published
from minrnn.experiments.records import bests, by_kind, points, spread
from minrnn.experiments.stability import roughness, steps_to
from minrnn.experiments.timed import series
from minrnn.experiments.trained import _curves
from minrnn.tasks.listops import SYMBOLS, ListOpsConfig, _apply, generate_expressions
from minrnn.tasks.locomotion import REFERENCES, normalized_score

REPOSITORY = Path(__file__).parents[1]


def record(setting: dict[str, Any], failed: str | None = None, **result: Any) -> Record:
    """Return a trial's record with the entries that tables read."""
    where = {"device": "cpu", "machine": {"processor": "Abacus", "threads": 2}, "versions": {"torch": "2"}}
    return {
        **where,
        "cell": "-".join(map(str, setting.values())),
        "setting": setting,
        "failed": failed,
        "result": result if failed is None else None,
        "seconds": 1800.0,
        "commit": "0123456789abcdef",
    }


def tables_of(name: str, records: list[Record]) -> list[Table]:
    return EXPERIMENTS[name].load().tables(records)


def rows_of(table: Table) -> list[list[str]]:
    return [list(row) for row in table.rows]


# --- queries of records ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "digits", "scale", "text"),
    [
        ([1.0, 2.0, 3.0, 4.0], 3, 1.0, "2.500 ± 1.291"),  # the sample's deviation; the population's is 1.118
        ([0.9, 1.0], 1, 100, "95.0 ± 7.1"),
        ([1.0, 1.0, 4.0], 2, 1.0, "2.00 ± 1.73"),  # the median is 1
        ([90.0], 1, 1 / 60, "1.5"),
        ([5.0, 5.0], 0, 1.0, "5 ± 0"),
    ],
)
def test_a_spread_is_the_mean_and_the_sample_deviation(
    values: list[float], digits: int, scale: float, text: str
) -> None:
    assert spread(values, digits, scale) == text
    assert spread([0.12345]) == "0.123"


def test_failed_trials_are_in_no_group() -> None:
    b, a, again = record({"m": "b", "n": 1}), record({"m": "a"}), record({"m": "b", "n": 1})
    groups = by_kind([b, record({"m": "c"}, "diverged"), a, again], "m", "n")
    assert list(groups) == [("b", 1), ("a", None)]
    assert groups["b", 1] == [b, again]


def test_entries_are_looked_up_by_their_path() -> None:
    runs = [record({}, seconds=n, test={"x1": {"accuracy": n / 10}}) for n in (1, 3)]
    assert bests(runs, "seconds") == [1, 3]
    assert bests(runs, "test", "x1", "accuracy") == [0.1, 0.3]
    with pytest.raises(KeyError):
        bests(runs, "test", "x2", "accuracy")


def test_points_are_of_the_evaluations_that_have_the_metric() -> None:
    evaluations = [{"step": 1, "seconds": 5.0, "a": 0.1}, {"step": 2, "seconds": 6.0, "b": 0.2}]
    run = record({}, evaluations=[*evaluations, {"step": 3, "seconds": 7.0, "a": 0.3}])
    assert points(run, "a") == [(1, 0.1), (3, 0.3)]
    assert points(run, "a", "seconds") == [(5.0, 0.1), (7.0, 0.3)]


# --- selective copying -----------------------------------------------------------------------------------


def copying(mixer: str, layers: int, *runs: tuple[float, ...]) -> list[Record]:
    """Return a record for each (validation loss, accuracies at 1x, 2x and 4x, exact match, seconds)."""
    return [
        record(
            {"mixer": mixer, "layers": layers, "seed": seed},
            parameters=1000 * layers,
            seconds=seconds,
            val_loss=0.0,
            best={"val_loss": loss, "step": 1},
            test={
                "x1": {"accuracy": x1, "exact_match": exact},
                "x2": {"accuracy": x2, "exact_match": 0.0},
                "x4": {"accuracy": x4, "exact_match": 0.0},
            },
        )
        for seed, (loss, x1, x2, x4, exact, seconds) in enumerate(runs)
    ]


COPYING = [
    *copying("mingru", 1, (0.5, 0.4, 0, 0, 0, 1), (0.7, 0.5, 0, 0, 0, 1)),
    *copying("mingru", 2, (0.1, 0.9, 0.8, 0.1, 0.5, 60), (0.3, 0.94, 0.9, 0.2, 0.7, 120)),
    # Better than two layers on test sequences and in its best run, worse in the mean on validation.
    *copying("mingru", 3, (0.05, 1.0, 1, 1, 1, 1), (0.9, 0.98, 1, 1, 1, 1)),
    record({"mixer": "minlstm", "layers": 1, "seed": 0}, "training diverged at step 3"),
    *copying("minlstm", 2, (0.3, 0.95, 0.6, 0.25, 0.5, 90)),
    *copying("gru", 4, (0.4, 1.0, 0.5, 0.5, 1.0, 30)),
]


def test_accuracy_by_depth() -> None:
    depth, _ = tables_of("selective-copying", COPYING)
    assert list(depth.head) == [
        "layers",
        *("mingru, %", "seeds", "published mingru, length 4,096, %"),
        *("minlstm, %", "seeds", "published minlstm, length 4,096, %"),
    ]
    recalled = "(as recalled, unconfirmed)"
    assert rows_of(depth) == [
        ["1", "45.0 ± 7.1", "2", f"37.0 ± 2.3 {recalled}", "", "0", f"37.6 ± 2.0 {recalled}"],
        ["2", "92.0 ± 2.8", "2", f"96.8 ± 3.2 {recalled}", "95.0", "1", f"85.7 ± 5.8 {recalled}"],
        ["3", "99.0 ± 1.4", "2", "99.5 ± 0.2 (as published)", "", "0", "96.0 ± 2.8 (as published)"],
    ]


def test_the_depth_is_chosen_on_validation_and_not_on_what_is_reported() -> None:
    _, mixers = tables_of("selective-copying", COPYING)
    assert [name.split(",")[0] for name in mixers.head] == [
        *("mixer", "layers", "parameters", "seeds", "token accuracy", "exact match"),
        *("token accuracy at 2x", "at 4x", "minutes a run", "published"),
    ]
    assert rows_of(mixers) == [
        ["gru", "4", "4,000", "1", "**100.0**", "100.0", "50.0", "50.0", "0.5", ""],
        [
            "minlstm",
            "2",
            "2,000",
            "1",
            "**95.0**",
            "50.0",
            "60.0",
            "25.0",
            "1.5",
            "96.0 ± 2.8 (as published)",
        ],
        [
            *("mingru", "2", "2,000", "2", "**92.0 ± 2.8**", "60.0 ± 14.1", "85.0 ± 7.1", "15.0 ± 7.1"),
            *("1.5 ± 0.7", "99.5 ± 0.2 (as published)"),
        ],
    ]


# --- stability -------------------------------------------------------------------------------------------


def learned(mixer: str, bias: float, loss: float, accuracies: dict[int, float], *curve: float) -> Record:
    return record(
        {"mixer": mixer, "forget_bias": bias, "seed": 0},
        val_loss=loss,
        accuracy=list(accuracies.values())[-1],
        evaluations=[{"step": step, "accuracy": found} for step, found in accuracies.items()],
        curve=[[10 * index, 99.0 - index, one] for index, one in enumerate(curve)],
    )


def test_failed_runs_are_counted_with_their_seeds() -> None:
    records = [
        learned("mingru", 0.0, 0.1, {100: 0.5, 200: 0.9, 300: 0.95}, 1.0, 0.8, 1.1, 0.7),
        learned("mingru", 0.0, 0.3, {100: 0.5, 200: 0.89}, 1.0, 1.4, 1.0),
        record({"mixer": "mingru", "forget_bias": 0.0, "seed": 2}, "training diverged at step 3"),
        learned("minlstm", 1.0, 0.2, {100: 0.91, 200: 0.8}, 1.0),
        learned("minlstm", 1.0, 0.2, {200: 0.1, 300: 1.0}, 1.0),
        record({"mixer": "minlstm", "forget_bias": 3.0, "seed": 0}, "training diverged at step 3"),
    ]
    (table,) = tables_of("stability", records)
    assert list(table.head) == [
        *("cell", "forget bias", "seeds", "failed", "loss at the end", "lowest to highest"),
        *("token accuracy at the end, %", "steps to 90%", "roughness"),
    ]
    first, second, third = rows_of(table)
    assert first[:6] == ["mingru", "0", "3", "2", "0.200 ± 0.141", "0.100 to 0.300"]
    assert first[6:] == ["92.0 ± 4.2", "200", "0.1500 ± 0.0707"]
    assert second[:6] == ["minlstm", "1", "2", "0", "0.200 ± 0.000", "0.200 to 0.200"]
    assert second[6:] == ["90.0 ± 14.1", "200 ± 141", "0.0000 ± 0.0000"]
    assert third == ["minlstm", "3", "1", "1", "", "", "", "", ""]


def test_the_first_step_counts_and_a_fall_is_not_rough() -> None:
    run = learned("mingru", 0.0, 0.1, {100: 0.5, 200: 0.9, 300: 0.95}, 1.0, 0.8, 1.1, 0.7)
    assert steps_to(run, 0.9) == 200
    assert steps_to(run, 0.951) is None
    assert roughness(run) == pytest.approx(0.1)  # a rise of 0.3 in three intervals
    assert roughness(learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0)) == 0.0


# --- Shakespeare -----------------------------------------------------------------------------------------


def language(
    mixer: str,
    matched: str,
    windowed: float,
    carried: float,
    chosen: int,
    training_seconds: float,
    *evaluations: tuple[int, float, float],
) -> Record:
    """Return a run with its test losses, and (step, seconds, loss in windows) of its evaluations."""
    return record(
        {"mixer": mixer, "matched": matched, "seed": 0},
        parameters=1000,
        training_seconds=training_seconds,
        seconds=9999.0,
        best={"step": chosen},
        val_loss=9.0,
        test={"val_loss_windowed": windowed, "val_loss": carried},
        evaluations=[
            {"step": step, "seconds": seconds, "val_loss_windowed": loss, "val_loss": loss - 1}
            for step, seconds, loss in evaluations
        ],
    )


SHAKESPEARE = [
    language("mingru", "both", 1.7, 1.6, 100, 8.0, (100, 4.0, 1.6), (200, 8.0, 1.5)),
    language("mingru", "both", 1.8, 1.6, 200, 10.0, (100, 4.0, 1.75), (200, 8.0, 1.5)),
    language("transformer", "width", 1.65, 1.9, 200, 20.0, (100, 10.0, 2.0), (200, 20.0, 1.6)),
    language("transformer", "width", 1.75, 1.9, 200, 20.0, (100, 10.0, 1.9), (200, 20.0, 1.7)),
    language("transformer", "parameters", 1.9, 1.9, 100, 20.0, (100, 10.0, 0.1)),
    language("lstm", "parameters", 1.5, 1.4, 100, 30.0, (100, 10.0, 1.71)),
    record({"mixer": "rnn", "matched": "width", "seed": 0}, "training diverged at step 3"),
]


def test_runs_are_timed_to_the_loss_that_each_run_of_the_transformer_reached() -> None:
    width, parameters = tables_of("shakespeare", SHAKESPEARE)
    assert (width.title, parameters.title) == ("Matched width", "Matched parameters")
    head = [
        "mixer",
        "parameters",
        "seeds",
        "test loss in windows",
        "with the state carried",
        "chosen at step",
    ]
    head += ["steps to the transformer's loss", "seconds to it", "seconds of training"]
    assert list(width.head) == [*head, "published best, width 384"]
    assert list(parameters.head) == head
    assert rows_of(width) == [
        [
            *("transformer", "1,000", "2", "**1.700 ± 0.071**", "1.900 ± 0.000", "200 ± 0"),
            *("200 ± 0", "20 ± 0", "20 ± 0", "1.547 at step 2,000 (as published)"),
        ],
        [
            *("mingru", "1,000", "2", "**1.750 ± 0.071**", "1.600 ± 0.000", "150 ± 71"),
            *("150 ± 71", "6 ± 3", "9 ± 1", "1.548 at step 575 (as published)"),
        ],
    ]
    assert rows_of(parameters)[0] == [
        *("lstm", "1,000", "1", "**1.500**", "1.400", "100", "never: 1", "never: 1", "30")
    ]
    assert [row[0] for row in parameters.rows] == ["lstm", "mingru", "transformer"]
    assert "The transformer's loss: 1.700 on the validation part" in width.note
    assert "(their lowest: 1.600, 1.700)" in width.note


def test_without_the_transformer_there_is_nothing_to_reach() -> None:
    width, _ = tables_of("shakespeare", SHAKESPEARE[:2])
    assert rows_of(width)[0][6:8] == ["", ""]
    assert width.note == ""


def test_our_best_run_beside_nanogpts() -> None:
    run = record(
        {"mixer": "mingru", "seed": 0},
        parameters=1_234_567,
        tokens=2_457_600,
        curve=[[10, 20.0, 3.0], [20, 50.0, 2.0], [30, 65.0, 1.5]],
        best={"val_loss_windowed": 1.43214, "val_loss": 1.41005},
        val_loss_windowed=1.45,
        val_loss=1.44,
        test={"val_loss_windowed": 1.33333, "val_loss": 1.3},
    )
    whole = record(
        {"mixer": "mingru", "trained_on": "nine tenths", "seed": 0},
        **{name: value for name, value in run["result"].items() if name != "test"},
    )
    (table,) = tables_of("shakespeare-best", [run, whole])
    columns = (
        f"{what}: {how}" for what in ("best of 20", "last step", "held out") for how in ("windows", "carried")
    )
    head = ["model", "trained on", "parameters", "tokens", "seeds", *columns, "seconds a step"]
    assert list(table.head) == head
    losses = ["1.4321", "1.4101", "1.4500", "1.4400", "1.3333", "1.3000"]
    assert rows_of(table) == [
        ["mingru", "eight tenths", "1,234,567", "2.5 M", "1", *losses, "2.00"],
        ["mingru", "nine tenths", "1,234,567", "2.5 M", "1", *losses[:4], "", "", "2.00"],
        ["nanoGPT (as published)", "nine tenths", "10.65 M", "82 M", "", "1.4697", *[""] * 6],
    ]


def test_ways_to_read_the_same_text() -> None:
    def run(reads: str, seed: int, bits: float, seconds: float) -> Record:
        return record(
            {"mixer": "mingru", "reads": reads, "seed": seed},
            parameters=1_234_567,
            tokens=1_640_000,
            training_seconds=seconds,
            bits_per_byte=9.0,
            test={"bits_per_byte": bits, "val_loss": 9.0},
        )

    runs = [run("bytes", 0, 2.0, 60.0), run("bytes", 1, 2.2, 120.0), run("4,096 subwords", 0, 1.75, 90.0)]
    (table,) = tables_of("documents", runs)
    assert list(table.head)[3:] == ["bits a byte", "tokens trained on", "minutes of training"]
    assert rows_of(table) == [
        ["bytes", "1,234,567", "2", "**2.100 ± 0.141**", "1.6 M", "1.5 ± 0.7"],
        ["4,096 subwords", "1,234,567", "1", "**1.750**", "1.6 M", "1.5"],
    ]


def cpu_run(mixer: str, seed: int, carried: float, seconds: float) -> dict[str, Any]:
    """Return results.json of an earlier run."""
    return {
        "mixer": mixer,
        "seed": seed,
        "parameters": 2000,
        "seconds": seconds,
        "val_loss": carried,
        "val_loss_windowed": carried + 0.1,
        "val_loss_windowed_64": carried + 0.3,
        "machine": {"processor": "Sage", "cores": 2, "threads": 1},
        "versions": {"torch": "1"},
    }


CPU_RUNS = [
    cpu_run("gru", 0, 1.9, 600.0),
    cpu_run("rnn", 0, 1.7, 450.0),
    cpu_run("lstm", 0, 2.0, 750.0),
    cpu_run("mingru", 0, 1.5, 100.0),
    cpu_run("mingru", 1, 1.7, 200.0),
    cpu_run("minlstm", 0, 1.8, 3000.0),
]
CPU_ROWS = [
    ["mingru", "2,000", "2", "**1.600**", "1.500 to 1.700", "1.700", "1.900", "2.5"],
    ["rnn", "2,000", "1", "**1.700**", "1.700 to 1.700", "1.800", "2.000", "7.5"],
    ["minlstm", "2,000", "1", "**1.800**", "1.800 to 1.800", "1.900", "2.100", "50.0"],
    ["gru", "2,000", "1", "**1.900**", "1.900 to 1.900", "2.000", "2.200", "10.0"],
    ["lstm", "2,000", "1", "**2.000**", "2.000 to 2.000", "2.100", "2.300", "12.5"],
]


def test_earlier_runs_are_ranked_and_the_slowdown_is_theirs_over_mingrus(tmp_path: Path) -> None:
    (tmp_path / "shakespeare-cpu").mkdir()
    for run in CPU_RUNS:
        path = tmp_path / "shakespeare-cpu" / f"{run['mixer']}-{run['seed']}.json"
        path.write_text(json.dumps(run))
    (table,) = tables_of("shakespeare-cpu", shakespeare.earlier_runs(tmp_path / "shakespeare-cpu"))
    assert list(table.head) == [
        *("mixer", "parameters", "seeds", "state carried", "lowest to highest"),
        *("windows of 256", "windows of 64", "minutes"),
    ]
    assert rows_of(table) == CPU_ROWS
    (tmp_path / "page.md").write_text("{shakespeare[slowdown]} {shakespeare[machine][processor]}")
    write_page(tmp_path / "page.md", tmp_path, tmp_path / "results", tmp_path / "R.md")
    assert (tmp_path / "R.md").read_text() == "3.0 to 5.0 Sage"  # rnn's and lstm's, over a mean of 150 s


# --- formal languages and ListOps ------------------------------------------------------------------------


def test_languages_by_mixer_with_the_best_constant_answer() -> None:
    def run(name: str, mixer: str, accuracy: float, *by_length: float) -> Record:
        lengths = dict(zip(("40", "64", "128"), by_length, strict=True))
        setting = {"mixer": mixer, "language": name, "seed": 0}
        return record(setting, test={"accuracy": accuracy}, constant=0.625, by_length=lengths, accuracy=0.0)

    records = [
        run("parity", "gru", 1.0, 1.0, 0.9, 0.8),
        run("parity", "mingru", 0.5, 0.7, 0.6, 0.5),
        run("parity", "mingru", 0.7, 0.9, 0.6, 0.5),
        run("majority", "mingru", 0.9, 1.0, 1.0, 1.0),
        record({"mixer": "lstm", "language": "parity", "seed": 0}, "training diverged at step 3"),
    ]
    overall, by_length = tables_of("formal-languages", records)
    assert list(overall.head) == ["mixer", "seeds", "majority", "parity"]
    published = "(published, as recalled, unconfirmed)"
    assert rows_of(overall) == [
        ["mingru", "1 to 2", "0.90", "0.60 ± 0.14"],
        ["gru", "1", "", "1.00"],
        ["*best constant answer*", "", "0.62", "0.62"],
        [f"minLSTM {published}", "", "0.93", ""],
        [f"xLSTM[1:0] {published}", "", "0.74", ""],
        [f"Mamba {published}", "", "0.69", ""],
        [f"RWKV {published}", "", "0.63", ""],
    ]
    assert by_length.title == "Accuracy on parity by length"
    assert list(by_length.head) == ["mixer", "40", "64", "128"]
    assert rows_of(by_length) == [
        ["mingru", "0.800 ± 0.141", "0.600 ± 0.000", "0.500 ± 0.000"],
        ["gru", "1.000", "0.900", "0.800"],
    ]


def test_listops_mixers_in_the_full_block_and_blocks_of_minlstm() -> None:
    def run(mixer: str, block: str, accuracy: float, seconds: float) -> Record:
        setting = {"mixer": mixer, "block": block, "seed": 0}
        found = {"parameters": 3000, "seconds": seconds, "constant": 0.125, "accuracy": 0.0}
        return record(setting, test={"accuracy": accuracy}, **found)

    records = [
        run("minlstm", "conv + mlp", 0.5, 60.0),
        run("minlstm", "conv + mlp", 0.6, 120.0),
        run("gru", "conv + mlp", 0.56, 30.0),
        run("minlstm", "mlp", 0.9, 60.0),
        run("minlstm", "plain", 0.25, 60.0),
    ]
    mixers, blocks = tables_of("listops", records)
    assert [name.split(",")[0] for name in mixers.head] == [
        *("mixer", "parameters", "seeds", "accuracy", "minutes a run", "published")
    ]
    recalled = "(as recalled, unconfirmed)"
    assert rows_of(mixers) == [
        ["gru", "3,000", "1", "**0.560**", "0.5", ""],
        ["minlstm", "3,000", "2", "**0.550 ± 0.071**", "1.5 ± 0.7", f"0.59 {recalled}"],
        ["*best constant answer*", "", "", "0.125", "", ""],
    ]
    assert rows_of(blocks) == [
        ["plain", "1", "0.250", f"0.46 {recalled}"],
        ["mlp", "1", "0.900", f"0.52 {recalled}"],
        ["conv + mlp", "2", "0.550 ± 0.071", f"0.59 {recalled}"],
    ]
    assert len(tables_of("listops", records[:3])) == 1  # one block is no ablation


# --- locomotion ------------------------------------------------------------------------------------------


def policy(
    mixer: str,
    env: str,
    seed: int,
    scores: tuple[float, ...],
    sha256: str = "s",
    data: str = "local",
    **others: Any,
) -> Record:
    """Return a run with its scores for the targets mean, best tenth and highest; bc has but one."""
    targets = (None,) if mixer == "bc" else (10.0, 20.0, 30.0)
    names = ("best tenth",) if mixer == "bc" else ("mean", "best tenth", "highest")
    asked = {
        name: {"target_return": target, "score": one}
        for name, target, one in zip(names, targets, scores, strict=True)
    }
    own = {"hopper": 40.0, "walker2d": 50.0}[env]
    about = {"sha256": sha256, "episodes": 2000, "steps": 1_000_000, "mean_return": 1234.5, "score": own}
    setting = {"mixer": mixer, "env": env, "quality": "medium", "data": data, "seed": seed}
    result = {
        "environment": "Pendulum-v1",  # D4RL has no score of it: the return is the score
        "score": asked["best tenth"]["score"],
        "target_return": asked["best tenth"]["target_return"],
        "asked": asked,
        "parameters": 5000 if env == "hopper" else 6000,
        "training_seconds": 60.0 * (seed + 1),
        "seconds_per_action": 0.002 * (seed + 1),
        "returns": [1.0] * 10,
        "data": {**about, "best_return": 3000.0, "best_score": 90.0},
    }
    return record(setting, **result | others)


POLICIES = [
    policy("bc", "hopper", 0, (99.0,)),
    policy("mingru", "walker2d", 0, (50.0, 70.0, 90.0)),
    policy("mingru", "hopper", 0, (40.0, 60.0, 80.0)),
    policy("mingru", "hopper", 1, (0.0, 62.0, 0.0)),
    policy("gru", "hopper", 0, (1.0, 71.0, 3.0)),
    policy("gru", "walker2d", 0, (1.0, 73.0, 5.0)),
    policy("gru", "walker2d", 2, (1.0, 77.0, 5.0)),
    policy("gru", "hopper", 2, (1.0, 73.0, 5.0)),
    policy("lstm", "hopper", 0, (0.0, 0.0, 0.0), data="d4rl"),
    record({"mixer": "rnn", "env": "hopper", "quality": "medium", "data": "local", "seed": 0}, "diverged"),
]


def test_scores_average_the_seeds_that_were_run_on_all_data() -> None:
    table = tables_of("locomotion", POLICIES)[0]
    assert table.title == "Scores on local data"
    assert list(table.head) == [
        *("policy", "parameters", "seeds", "hopper medium", "walker2d medium"),
        *("average", "minutes of training", "ms an action"),
    ]
    assert rows_of(table) == [
        ["gru", "5,000 to 6,000", "2", "72.0 ± 1.4", "75.0 ± 2.8", "**73.5 ± 2.1**", "2.0", "4.00"],
        ["mingru", "5,000 to 6,000", "1 to 2", "61.0 ± 1.4", "70.0", "**65.0**", "1.3", "2.67"],
        ["bc", "5,000", "1", "99.0", "", "", "1.0", "2.00"],  # not run on all: no average, and last
        ["*the data's own mean*", "", "", "40.0", "50.0", "45.0", "", ""],
    ]
    assert "the mean of 10 episodes" in table.note


def test_scores_by_target_and_the_properties_of_the_data() -> None:
    _, targets, data, d4rl, *_ = tables_of("locomotion", POLICIES)
    assert rows_of(targets) == [
        ["mingru", "45.0", "65.0", "85.0"],
        ["gru", "1.0 ± 0.0", "73.5 ± 2.1", "4.5 ± 0.7"],
        ["*target return*", "10.0", "20.0", "30.0"],
    ]
    assert rows_of(data) == [
        [
            *(f"{env} medium", "Pendulum-v1", "2,000", "1,000,000", f"1,234.5 ({own})", "3,000.0 (90.0)"),
            "20.0",
        ]
        for env, own in (("hopper", "40.0"), ("walker2d", "50.0"))
    ]
    assert "different files" not in data.note
    assert (d4rl.title, d4rl.rows[0][0]) == ("Scores on d4rl data", "lstm")
    mixed = [*POLICIES, policy("rnn", "hopper", 0, (0.0, 0.0, 0.0), sha256="another")]
    assert tables_of("locomotion", mixed)[2].note.startswith("**Runs of one column were trained on different")


def test_scores_are_d4rls_where_it_has_some() -> None:
    assert scores.score("Hopper-v5", 3234.3) == pytest.approx(100)
    assert scores.score("HalfCheetah-v5", -280.178953) == 0
    assert scores.score("Pendulum-v1", -150.0) == -150.0


# --- times -----------------------------------------------------------------------------------------------


def timed(setting: dict[str, Any], phase: str, **systems: Any) -> Record:
    """Return a record of each system: (median seconds of a phase, other entries), or why it failed."""
    found = {
        name: {"failed": of}
        if isinstance(of, str)
        else {"seconds": {phase: {"median": of[0], "min": 0.0, "p10": 0.0, "p90": 99.0}}, **of[1]}
        for name, of in systems.items()
    }
    return record(setting, systems=found)


def steps_at(T: int, **systems: Any) -> Record:
    """Return times and peak bytes of a training step."""
    with_bytes = {
        name: of if isinstance(of, str) else (of[0], {"peak_bytes": of[1]}) for name, of in systems.items()
    }
    return timed({"B": 64, "D": 8, "T": T}, "step", **with_bytes)


RUNTIME: dict[str, Any] = {"minlstm": (0.002, 3e6), "lstm": (0.004, 2e6), "gru": (0.003, 1e6)}


def test_ratios_of_training_steps_are_theirs_over_ours_and_of_memory_ours_over_theirs() -> None:
    loop = {"gru-loop": (0.16, 2e6)}
    records = [
        steps_at(256, mingru=(0.004, 8e6), **RUNTIME, **{"gru-loop": "out of memory"}),
        steps_at(64, mingru=(0.001, 2e6), **RUNTIME, **loop),
        steps_at(128, mingru=(0.002, 4e6), **RUNTIME, **loop),
    ]
    steps, memory, less, faster, published = tables_of("runtime", records)
    assert list(steps.head) == ["system", "T = 64", "T = 128", "T = 256", "growth"]
    assert [row[:-1] for row in rows_of(steps)] == [
        ["mingru", "1", "2", "4"],
        ["minlstm", "2", "2", "2"],
        ["lstm", "4", "4", "4"],
        ["gru", "3", "3", "3"],
        ["gru-loop", "160", "160", "failed"],
    ]
    assert (steps.rows[0][-1], steps.rows[-1][-1]) == ("1.00", "")  # two points have no growth
    assert rows_of(memory)[0] == ["mingru", "2", "4", "8"]
    assert rows_of(memory)[-1] == ["gru-loop", "2", "2", ""]
    assert rows_of(less) == [
        ["mingru", "gru", "2", "4", "8"],
        ["mingru", "gru-loop", "1", "2", ""],
        ["minlstm", "lstm", "1.5", "1.5", "1.5"],
    ]
    assert list(less.head[:2]) == ["memory of", "over that of"]
    assert rows_of(faster) == [
        ["mingru", "gru-loop", "160", "80", ""],
        ["mingru", "gru", "3", "1.5", "0.75"],
        ["minlstm", "lstm", "2", "2", "2"],
    ]
    assert list(faster.head[:2]) == ["faster", "than"]
    assert published.title.startswith("Published")


def test_series_take_medians_of_the_chosen_setting_in_order() -> None:
    records = [
        steps_at(20, mingru=(0.5, 7)),
        steps_at(10, mingru=(0.25, 0), gru="out of memory"),
        timed({"B": 64, "D": 16, "T": 5}, "step", mingru=(1.0, {"peak_bytes": 1})),
    ]
    assert series(records, "T", "step", D=8) == {"mingru": [(10, 0.25), (20, 0.5)]}
    assert series(records, "T", "peak_bytes", D=8) == {"mingru": [(20, 7)]}  # a logarithm has no zero


def test_tokens_and_states_of_inference() -> None:
    def run(batch: int, context: int, **systems: Any) -> Record:
        made = timed({"B": batch, "D": 8, "context": context}, "token", **systems)
        for name, found in made["result"]["systems"].items():
            if "seconds" in found:
                found["seconds"]["context"] = {"median": 0.01 * context}
                found["state_bytes"] = 4000 if name == "mingru" else 100 * context
        return made

    records = [
        run(2, 40, mingru=(0.008, {}), attention="out of memory"),
        run(2, 10, mingru=(0.002, {}), attention=(0.001, {})),
        run(2, 20, mingru=(0.004, {}), attention=(0.004, {})),
        run(1, 10, mingru=(0.5, {}), attention=(0.25, {})),
        run(1, 20, mingru=(0.5, {}), attention=(0.25, {})),
    ]
    single, double, published = tables_of("inference", records)
    assert (single.title, double.title) == ("Batch 1", "Batch 2")
    assert rows_of(single) == [
        ["mingru", "500", "500", "", "200", "4 to 4"],
        ["attention", "250", "250", "", "200", "1 to 2"],
    ]
    assert list(double.head) == [
        *("mixer", "token after 10, ms", "token after 20, ms", "token after 40, ms", "growth"),
        *("reading 40, ms", "state, kB"),
    ]
    assert rows_of(double) == [
        ["mingru", "2", "4", "8", "1.00", "400", "4 to 4"],
        ["attention", "1", "4", "failed", "", "failed", ""],
    ]
    assert published.title.startswith("Published")


def test_actions_are_compared_with_attentions() -> None:
    def run(steps: int, **systems: Any) -> Record:
        made = timed({"B": 1, "D": 8, "steps": steps}, "action", **systems)
        for found in made["result"]["systems"].values():
            found |= {} if "failed" in found else {"state_bytes": 1000 * steps}
        return made

    records = [
        run(11, attention=(0.009, {}), mingru=(0.002, {}), s4d="out of memory"),
        run(1, attention=(0.001, {}), mingru=(0.002, {}), s4d=(0.004, {})),
    ]
    (table,) = tables_of("acting", records)
    assert list(table.head) == [
        *("policy", "after 0 steps, ms", "after 10 steps, ms", "times faster than attention after 10"),
        *("state at first, kB", "at last, kB"),
    ]
    assert rows_of(table) == [
        ["attention", "1", "9", "1.0", "1", "11"],
        ["mingru", "2", "2", "4.5", "1", "11"],
        ["s4d", "4", "failed", "", "1", ""],
    ]


# --- constants, as literals of their sources -------------------------------------------------------------


def test_references_of_scores_are_d4rls() -> None:
    """d4rl/infos.py of rail-berkeley/d4rl."""
    assert {name: tuple(reference[:4]) for name, reference in REFERENCES.items()} == {
        "hopper": (-20.272305, 3234.3, 11, 3),
        "halfcheetah": (-280.178953, 12135.0, 17, 6),
        "walker2d": (1.629008, 4592.3, 17, 6),
    }
    assert normalized_score("Walker2d-v5", 2000.0) == pytest.approx(100 * 1998.370992 / 4590.670992)
    assert normalized_score("Hopper-v4", 1607.0138475) == pytest.approx(50)


def test_listops_has_the_operators_of_long_range_arena() -> None:
    digits = tuple("0123456789")
    assert (*digits, "[MIN", "[MAX", "[MED", "[SM", "]", "=") == SYMBOLS
    values = [9, 2, 8, 8]
    assert [_apply(SYMBOLS.index(name), values) for name in ("[MIN", "[MAX", "[MED", "[SM")] == [2, 9, 8, 7]
    assert _apply(SYMBOLS.index("[MED"), [1, 4]) == 2  # 2.5, rounded down
    assert _apply(SYMBOLS.index("[MED"), [9, 0, 4]) == 4
    limits = {"max_length": 40, "min_length": 6, "max_depth": 5, "max_args": 5}
    made = generate_expressions(ListOpsConfig(**limits, num_train=3, num_validation=1, num_test=1))
    texts = [" ".join(SYMBOLS[token] for token in made.question(index)) for index in range(5)]
    assert list(zip(texts, made.values.tolist(), strict=True)) == [
        ("[SM [SM 7 8 [SM [MED 6 9 9 ] [MIN 4 6 8 2 ] 1 7 ] 8 ] 1 0 9 6 ]", 8),
        ("[MIN [MIN 8 [MIN 2 6 1 ] ] 0 ]", 0),
        ("[MIN [MIN [MAX 4 4 5 ] 3 8 5 ] 7 0 2 ]", 0),
        ("[MAX 8 [SM [MED 9 6 ] 2 ] 0 ]", 9),
        ("[MED 6 [MAX 8 0 4 [SM 6 8 ] 0 ] ]", 7),
    ]


def texts_of(figures: dict[Any, Published]) -> dict[Any, str]:
    return {name: figure.text for name, figure in figures.items()}


def certain(figures: dict[Any, Published]) -> set[Any]:
    """Return the names of the figures that are labeled as read in their source."""
    return {name for name, figure in figures.items() if figure.certainty == "published"}


def test_published_figures_of_selective_copying() -> None:
    """Tables 1 and 2 of the paper; figures that were not checked against it are labeled so."""
    assert texts_of(selective_copying.TABLE_1) == {
        ("minlstm", 1): "37.6 ± 2.0",
        ("minlstm", 2): "85.7 ± 5.8",
        ("minlstm", 3): "96.0 ± 2.8",
        ("mingru", 1): "37.0 ± 2.3",
        ("mingru", 2): "96.8 ± 3.2",
        ("mingru", 3): "99.5 ± 0.2",
    }
    assert certain(selective_copying.TABLE_1) == {("minlstm", 3), ("mingru", 3)}
    assert texts_of(selective_copying.TABLE_2) == {
        **{"mingru": "99.5 ± 0.2", "minlstm": "96.0 ± 2.8", "mamba": "99.8", "s4d": "18.3"}
    }
    assert len(certain(selective_copying.TABLE_2)) == 4


def test_published_figures_of_shakespeare() -> None:
    """The paper's best test losses, read in the full text of version 3."""
    assert texts_of(shakespeare.PUBLISHED) == {
        "mingru": "1.548 at step 575",
        "minlstm": "1.555 at step 625",
        "mamba": "1.575 at step 400",
        "transformer": "1.547 at step 2,000",
    }
    assert len(certain(shakespeare.PUBLISHED)) == 4


def test_published_figures_of_formal_languages_and_listops() -> None:
    """Tables 4 and 6 of the paper, all as recalled."""
    columns = ("bucket-sort", "missing-duplicate", "cycle-navigation", "even-pairs", "majority")
    assert (*columns, "majority-count") == formal_languages.REPORTED
    assert {name: list(texts_of(row).values()) for name, row in formal_languages.PUBLISHED.items()} == {
        "minLSTM": ["0.94", "0.26", "0.79", "0.93", "0.93", "0.47"],
        "xLSTM[1:0]": ["0.97", "0.33", "0.86", "1.0", "0.74", "0.46"],
        "Mamba": ["0.69", "0.15", "0.86", "1.0", "0.69", "0.45"],
        "RWKV": ["0.54", "0.21", "0.13", "1.0", "0.63", "0.13"],
    }
    assert texts_of(listops.TABLE_4) == {"minlstm": "0.59", "mamba": "0.33"}
    ablation = {"plain": "0.46", "conv": "0.45", "mlp": "0.52", "conv + mlp": "0.59"}
    assert texts_of(listops.TABLE_6) == ablation
    for row in (*formal_languages.PUBLISHED.values(), listops.TABLE_4, listops.TABLE_6):
        assert certain(row) == set()


def test_published_scores_of_d4rl() -> None:
    """Table 3 of the paper, all as recalled; the last row is the mean of the others."""
    columns = ("DT", "DS4", "DAaren", "DMamba", "minLSTM", "minGRU")
    assert all(tuple(row) == columns and not certain(row) for row in scores.TABLE_3.values())
    assert {name: list(texts_of(row).values()) for name, row in scores.TABLE_3.items()} == {
        "halfcheetah-medium": ["42.6", "42.5", "42.2", "42.8", "42.7 ± 0.7", "43.0 ± 0.4"],
        "hopper-medium": ["68.4", "54.2", "80.9", "83.5", "85.0 ± 4.4", "79.4 ± 8.2"],
        "walker2d-medium": ["75.5", "78.0", "74.4", "78.2", "72.0 ± 7.5", "73.3 ± 3.3"],
        "halfcheetah-medium-replay": ["37.0", "15.2", "37.9", "39.6", "38.6 ± 1.1", "38.5 ± 1.1"],
        "hopper-medium-replay": ["85.6", "49.6", "77.9", "82.6", "88.5 ± 4.7", "90.5 ± 0.9"],
        "walker2d-medium-replay": ["71.2", "69.0", "71.4", "70.9", "69.7 ± 10.7", "72.8 ± 8.9"],
        "halfcheetah-medium-expert": ["88.8", "92.7", "75.7", "91.9", "85.4 ± 1.7", "86.3 ± 0.5"],
        "hopper-medium-expert": ["109.6", "110.8", "103.9", "111.1", "110.3 ± 1.6", "109.7 ± 2.7"],
        "walker2d-medium-expert": ["109.3", "105.7", "110.5", "108.3", "110.3 ± 0.5", "110.3 ± 0.4"],
        "average of the nine": ["76.4", "68.6", "75.0", "78.8", "78.1", "78.2"],
    }
    (_, *rows) = (row for row in reversed(list(scores.TABLE_3.values())))
    for column in columns:
        found = [float(row[column].text.split()[0]) for row in rows]
        average = float(scores.TABLE_3["average of the nine"][column].text)
        assert sum(found) / 9 == pytest.approx(average, abs=0.0501)
    table = scores.published_table()
    assert list(table.head) == ["data", *(f"published {name}" for name in columns)]
    assert table.rows[1][5] == "85.0 ± 4.4 (as recalled, unconfirmed)"


def test_published_times_and_memory() -> None:
    """The paper's full text, figures derived from it, and a notebook of the MVA course."""
    as_published, derived = "(as published)", "(derived from published figures)"
    paper, replication = "paper, T4", "replication, D = 256, half precision"
    table = runtime.published_table()
    assert list(table.head) == ["source", "figure", "T = 512", "T = 4,096", "length not given"]
    assert rows_of(table) == [
        [
            *(paper, "minGRU / minLSTM / Mamba, ms", f"2.72 / 2.97 / 2.71 {as_published}"),
            *(f"3.25 / 3.41 / 3.15 {as_published}", ""),
        ],
        [
            *(paper, "time of GRU's loop over minGRU's"),
            *(f"175 {as_published}", f"1,324 {as_published}", ""),
        ],
        [
            *(paper, "time of LSTM's loop over minLSTM's"),
            *(f"235 {as_published}", f"1,361 {as_published}", ""),
        ],
        [paper, "GRU's / LSTM's loop, ms", f"476 / 698 {derived}", f"4,303 / 4,641 {derived}", ""],
        [paper, "memory of minGRU and minLSTM over GRU's and LSTM's", "", "", f"1.88 {as_published}"],
        [paper, "memory of Mamba over minGRU's", "", "", f"1.56 {as_published}"],
        [
            *(replication, "time of GRU's loop over minGRU's"),
            *(f"50 {as_published}", f"56 {as_published}", ""),
        ],
        [
            *(replication, "memory of minGRU over GRU's"),
            *(f"1.19 {as_published}", f"1.21 {as_published}", ""),
        ],
    ]
    table = inference.published_table()
    assert list(table.head[1:]) == ["batch 8", "batch 16", "batch 32", "batch 64"]
    assert rows_of(table) == [
        ["minGRU faster than Mamba by", *(f"{n} % {as_published}" for n in ("6.6", "4.1", "4.9", "2.9"))],
        ["minLSTM slower than Mamba by", *(f"{n} % {as_published}" for n in ("3.6", "2.9", "0", "1.3"))],
        ["minGRU faster than GRU by", "", "", "", f"19.6 % {as_published}"],
        ["minLSTM faster than LSTM by", "", "", "", f"41.5 % {as_published}"],
    ]


def test_weights_of_a_layer_beside_those_that_it_replaces() -> None:
    """The paper: 2 d_h d_x of minGRU against 3 d_h (d_x + d_h) of GRU, 3 against 4 for minLSTM; d_x = 64."""
    table = parameter_table()
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert list(table.head[2:]) == ["d_h = 1 d_x", "d_h = 2 d_x", "d_h = 3 d_x", "d_h = 4 d_x"]
    assert rows["mingru"][0] == "2 d_h d_x"
    assert rows["mingru"][1:] == [
        *("8,192 (33% of gru)", "16,384 (22% of gru)", "24,576 (17% of gru)", "32,768 (13% of gru)")
    ]
    assert rows["minlstm"][0] == "3 d_h d_x"
    assert rows["minlstm"][1:] == [
        *("12,288 (38% of lstm)", "24,576 (25% of lstm)", "36,864 (19% of lstm)", "49,152 (15% of lstm)")
    ]
    assert rows["gru"] == ["3 d_h (d_x + d_h)", "24,576", "73,728", "147,456", "245,760"]
    assert rows["lstm"] == ["4 d_h (d_x + d_h)", "32,768", "98,304", "196,608", "327,680"]


# --- the page --------------------------------------------------------------------------------------------


def test_results_md_is_written_again_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, experiments included, by the command as a user gives it."""
    for name in ("docs", "benchmarks", "results"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    committed = (REPOSITORY / "RESULTS.md").read_text(encoding="utf-8")
    assert main(["reproduce", "report", *(["--changed"] if " with changes" in committed else [])]) == 0
    written = (tmp_path / "RESULTS.md").read_bytes()
    assert written == (REPOSITORY / "RESULTS.md").read_bytes()
    for name, entry in EXPERIMENTS.items():
        measured = (REPOSITORY / "results" / f"{name}-cpu" / "cells").is_dir()
        assert (f"\n## {entry.load().title}\n".encode() in written) == measured


def write_records(root: Path, name: str, records: list[Record]) -> None:
    """Write records into the folder of an experiment at the scale cpu."""
    cells = root / f"{name}-cpu" / "cells"
    cells.mkdir(parents=True)
    for index, one in enumerate(records):
        about = {"format": 1, "experiment": name, "config": {}, "cell": f"{index}-{one['cell']}"}
        (cells / f"{about['cell']}.json").write_text(json.dumps(one | about))


def page_of(tmp_path: Path, *, changed: bool = False) -> str:
    """Return the section of experiments, with links relative to the folder."""
    (tmp_path / "page.md").write_text("{experiments}")
    (tmp_path / "shakespeare-cpu").mkdir(exist_ok=True)
    for index, run in enumerate(CPU_RUNS):
        (tmp_path / "shakespeare-cpu" / f"{index}.json").write_text(json.dumps(run))
    write_page(tmp_path / "page.md", tmp_path, tmp_path / "results", tmp_path / "R.md", changed=changed)
    return (tmp_path / "R.md").read_text()


def test_the_page_gives_hours_machines_commits_and_what_diverged(tmp_path: Path) -> None:
    setting = {"mixer": "rnn", "forget_bias": 0.0, "seed": 0}
    records = [
        learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0),
        learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0) | {"commit": "fedcba9876543210-dirty"},
        learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0) | {"commit": "abcdefabcdefabcdef", "changes": "0" * 64},
        record(setting, "training diverged at step 3") | {"commit": None},
    ]
    write_records(tmp_path / "results", "stability", records)
    text = page_of(tmp_path, changed=True)
    assert text.startswith("## Parameters\n")
    assert (
        "4 trials, 2.0 hours of computing in all, on Abacus (2 threads), torch 2; "
        "commit 0123456789ab, abcdefabcdef with changes, fedcba987654 with changes, of an installed package. "
        "Diverged: 3-rnn-0.0-0.\n"
    ) in text
    assert "| rnn | 0 | 1 | 1 |" in text
    assert "    minrnn reproduce stability\n" in text
    missing = text.partition("## Not measured yet")[2]
    assert "`runtime` (figure 1)" in missing
    assert "stability" not in missing
    assert "shakespeare-cpu" not in missing  # its earlier runs are in the page's own text


@pytest.mark.parametrize("kind", [{"commit": "fedcba9876543210-dirty"}, {"changes": "0" * 64}])
def test_results_of_changed_code_are_shown_only_if_asked_for(kind: dict[str, str], tmp_path: Path) -> None:
    clean, changed = (learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0) | made for made in ({}, kind))
    write_records(tmp_path / "results", "stability", [clean, changed, changed])
    with pytest.raises(
        ValueError, match=r"2 in .*stability-cpu \(1-mingru-0\.0-0, \.\.\.\); make them again"
    ):
        page_of(tmp_path)
    assert "with changes" in page_of(tmp_path, changed=True)

    other = tmp_path / "other"
    write_records(other / "results", "stability", [clean] * 3)
    assert "with changes" not in page_of(other)
    (other / "scan.json").write_text(json.dumps({"commit": "0123", **kind}))  # a benchmark's
    with pytest.raises(ValueError, match=r"1 in .* \(scan\.json, \.\.\.\); make them again"):
        page_of(other)


def test_machines_are_told_apart_by_what_ran_on_them(tmp_path: Path) -> None:
    gpu = {"device": "NVIDIA H200"}
    one = {"machine": {"processor": "Abacus", "threads": 1}}
    records = [
        learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0) | one,
        learned("minlstm", 0.0, 0.1, {100: 0.5}, 1.0) | gpu,
        learned("gru", 0.0, 0.1, {100: 0.5}, 1.0) | gpu,
    ]
    write_records(tmp_path / "results", "stability", records)
    assert (
        "several machines, whose times do not compare (Abacus (1 thread), torch 2: mingru; "
        "NVIDIA H200, torch 2: gru, minlstm)"
    ) in page_of(tmp_path)


def test_a_record_with_a_result_and_a_failure_is_refused(tmp_path: Path) -> None:
    both = learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0) | {"failed": "diverged"}
    write_records(tmp_path / "results", "stability", [both])
    with pytest.raises(ValueError, match="must hold either a result or why it failed"):
        page_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "records", "entry"),
    [
        ("selective-copying", COPYING, ("test", "x1")),
        ("stability", [learned("mingru", 0.0, 0.1, {100: 0.5}, 1.0)], ("curve",)),
        ("shakespeare", SHAKESPEARE, ("evaluations",)),
        ("locomotion", POLICIES, ("data",)),
    ],
)
def test_a_record_that_lacks_an_entry_of_a_table_is_refused(
    name: str, records: list[Record], entry: tuple[str, ...], tmp_path: Path
) -> None:
    records = json.loads(json.dumps(records))
    place = records[0]["result"]
    for key in entry[:-1]:
        place = place[key]
    del place[entry[-1]]
    write_records(tmp_path / "results", name, records)
    with pytest.raises(ValueError, match=rf"one lacks an entry of a table \(KeyError: '{entry[-1]}'\)"):
        page_of(tmp_path)


# --- benchmarks ------------------------------------------------------------------------------------------


def system(seconds: tuple[float, ...], phases: tuple[str, ...], times_ours: float, **others: Any) -> Any:
    """Return a system's measurements, with other statistics that no table shows."""
    times = {
        phase: {"median": median, "p10": 0.0, "p90": 99.0, "min": 0.0, "samples": 3}
        for phase, median in zip(phases, seconds, strict=True)
    }
    return {"status": "equal", "error": {}, "detail": "", "seconds": times, "times_ours": times_ours} | others


def case(shape: dict[str, int], systems: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"gate": "mingru", "dtype": "float32", "threads": 2, "shape": shape, "systems": systems} | others


def rendered(name: str, *results: dict[str, Any], **document: Any) -> list[list[str]]:
    """Return the cells of a benchmark's table: head, then rows."""
    lines = BENCHES[name].load().render({"results": list(results), **document}).splitlines()
    tables = [line for line in lines if line.startswith("|") and "---" not in line]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in tables]


PHASES = ("forward", "backward", "step")
SHAPE = {"B": 8, "T": 256, "D": 512}
FAILED = {"status": "failed", "error": {}, "detail": "RuntimeError: no memory"}


def scans(threads: int, step: float) -> dict[str, Any]:
    """Return a scan's case, whose copy moves 40 GB/s forward and 20 backward."""
    share = {"forward": 0.5, "backward": 0.75, "step": 0.6}
    ours = system((0.001, 0.002, step), PHASES, 1.0, peak_bytes=3_000_000, share=share)
    speeds = {"forward": 40e9, "backward": 20e9}
    copy = system((0.0005, 0.0015, 0.002), PHASES, 0.667, bytes_per_second=speeds, peak_bytes=None)
    return case(SHAPE, {"copy": copy, "minrnn": ours, "peer": FAILED}, threads=threads)


def test_scans_are_shown_by_system() -> None:
    head, *rows = rendered("scan", scans(1, 0.003), scans(1, 0.003) | {"gate": "minlstm"})
    assert head == [
        *("B, T, D", "gate", "system", "forward, ms", "backward, ms", "step, ms"),
        *("times ours", "memory at the peak, MB"),
    ]
    assert rows[:3] == [
        ["8, 256, 512", "mingru", "copy", "0.50", "1.50", "2.00", "0.67", ""],
        ["8, 256, 512", "mingru", "minrnn", "1.00", "2.00", "3.00", "1.00", "3"],
        ["8, 256, 512", "mingru", "peer", "failed", "", "", "", ""],
    ]
    assert [row[1] for row in rows[3:]] == ["minlstm"] * 3


def test_scans_with_several_threads_are_shown_by_their_share_and_the_time_of_one_thread() -> None:
    head, *rows = rendered("scan", scans(1, 0.004), scans(2, 0.003))
    assert head == [
        *("B, T, D", "gate", "dtype", "forward, ms", "backward, ms", "copy, GB/s"),
        *("share forward", "backward", "speed of one thread"),
    ]
    assert rows == [["8, 256, 512", "mingru", "float32", "1.00", "2.00", "20", "50%", "75%", "75%"]]


def test_exported_steps_are_shown_with_their_files() -> None:
    ours = system((0.00003,), ("step",), 1.0)
    file = system((0.0012,), ("step",), 40.0, bytes=3_456_000)
    head, *rows = rendered(
        "export", case({"B": 64, "D": 192, "L": 4}, {"minrnn": ours, "onnxruntime": file, "peer": FAILED})
    )
    assert head == ["rows", "width", "layers", "runtime", "step, us", "file, MB"]
    assert rows == [
        ["64", "192", "4", "a Decoder", "30", ""],
        ["64", "192", "4", "onnxruntime", "1,200", "3.46"],
        ["64", "192", "4", "peer", "failed", ""],
    ]


def test_compiled_training_steps_are_shown_with_the_steps_that_regain_compiling() -> None:
    shape, before = {"B": 8, "T": 256, "D": 192, "L": 4}, system((0.3,), ("step",), 1.0)
    faster = system((0.25,), ("step",), 0.8, compile_seconds=100)
    slower = system((0.36,), ("step",), 1.2, compile_seconds=100)
    head, *rows = rendered(
        "train",
        case(shape, {"minrnn": before, "compiled": faster}),
        case(shape, {"minrnn": before, "compiled": slower}),
        case(shape, {"minrnn": before, "compiled": FAILED}),
    )
    assert head == [
        *("mixer", "batch", "steps", "width", "layers", "plain, ms", "compiled, ms", "compiled / plain"),
        *("compiling, s", "regained after"),
    ]
    named = ["mingru", "8", "256", "192", "4"]
    assert rows == [
        [*named, "300", "250", "0.83", "100", "2,000 steps"],
        [*named, "300", "360", "1.20", "100", "never"],
    ]


def test_layers_are_shown_by_length_where_nothing_else_varies() -> None:
    ours = system((0.001, 0.002, 0.0104), PHASES, 1.0, peak_bytes=5_400_000)
    peer = system((0.001, 0.002, 0.026), PHASES, 2.5, peak_bytes=1_600_000)
    short = case(SHAPE | {"T": 64}, {"gru": peer, "minrnn": ours})
    long = case(SHAPE | {"T": 4096}, {"minrnn": ours})
    assert rendered("layer", short, long) == [
        ["T", "minrnn, ms", "gru, times ours", "minrnn, MB", "gru, MB"],
        ["64", "10.4", "2.50", "5", "2"],
        ["4,096", "10.4", "", "5", ""],
    ]
    wider = case(SHAPE | {"D": 64}, {"minrnn": ours})
    assert rendered("layer", short, wider)[0][:2] == ["B, T, D", "system"]
    assert rendered("layer", short)[1] == ["8, 64, 512", "gru", "1.00", "2.00", "26.00", "2.50", "2"]


def test_single_steps_are_in_microseconds() -> None:
    shape = {"B": 1, "D": 512}
    systems = {
        "linear": system((0.0000123,), ("step",), 0.4),
        "minrnn": system((0.00003,), ("step",), 1.0),
        "gru": FAILED,
    }
    assert rendered("decode", case(shape, systems), case(shape, systems, dtype="bfloat16"))[:4] == [
        ["B, D", "dtype", "system", "step, us", "times ours"],
        ["1, 512", "float32", "linear", "12.3", "0.40"],
        ["1, 512", "float32", "minrnn", "30.0", "1.00"],
        ["1, 512", "float32", "gru", "failed", ""],
    ]


def test_a_models_steps_are_those_of_torch_over_ours() -> None:
    def run(*seconds: float) -> dict[str, Any]:
        names = ("minrnn", "torch", "gru")
        systems = {name: system((one,), ("step",), 9.0) for name, one in zip(names, seconds, strict=False)}
        return case({"B": 1000, "D": 64, "L": 3}, systems)

    failed = run(0.0002)
    failed["systems"] |= {"torch": FAILED, "gru": FAILED}
    head, *rows = rendered("step", run(0.0002, 0.001, 0.0004), failed)
    assert head[:3] == ["rows", "width", "layers"]
    assert head[3:] == [
        *("in one call, ms", "in torch's operations, ms", "a GRU in torch, ms"),
        "torch's operations, times the call",
    ]
    assert rows == [
        ["1,000", "64", "3", "0.2", "1", "0.4", "5.0"],
        ["1,000", "64", "3", "0.2", "failed", "failed", ""],
    ]


def test_selective_scans_are_shown_by_system() -> None:
    shape = {"B": 2, "T": 64, "D": 8, "N": 16}
    ours = system((0.001, 0.002, 0.003), PHASES, 1.0, peak_bytes=7_000_000)
    assert rendered("selective", case(shape, {"minrnn": ours})) == [
        [
            *("B, T, D, N", "system", "forward, ms", "backward, ms", "step, ms", "times ours"),
            "memory at the peak, MB",
        ],
        ["2, 64, 8, 16", "minrnn", "1.00", "2.00", "3.00", "1.00", "7"],
    ]


def test_errors_are_shown_by_length_and_forgetting() -> None:
    def run(name: str, T: int, forgetting: str, error: float | None) -> dict[str, Any]:
        where = {"gate": "mingru", "T": T, "forgetting": forgetting, "system": name, "dtype": "float32"}
        return where | {"error": {"h": error, "dz": 1.0}}

    results = [
        run("minrnn", 4096, "slow", 2e-6),
        run("minrnn", 256, "slow", 1.26e-7),
        run("minrnn", 512, "slow", 9.0),
        run("minrnn", 256, "fast", 3e-7),
        run("minrnn", 4096, "fast", 4e-7),
        run("log-space", 256, "slow", 5e-4),
        run("log-space", 4096, "slow", None),
    ]
    assert rendered("accuracy", *results) == [
        ["system", "forgetting", "T = 256", "T = 4,096"],
        ["minrnn float32", "slow", "1.3e-07", "2.0e-06"],
        ["minrnn float32", "fast", "3.0e-07", "4.0e-07"],
        ["log-space float32", "slow", "5.0e-04", "not finite"],
    ]
    assert rendered("accuracy", results[2])[0] == ["system", "forgetting", "T = 512"]
    assert rendered("accuracy", results[1], results[3] | {"gate": "minlstm"})[0][0] == "gate"


def test_kernels_are_shown_one_a_row() -> None:
    result = {
        **{"capability": 90, "gate": "mingru", "dtype": "bfloat16", "shape": [8, 4096, 2048]},
        **{"direction": "backward", "bytes": 14, "budget": 12, "message_bytes": 0.0625, "steps": 128},
        **{"registers": 64, "stack_bytes": 16, "instructions_a_step": 23.4},
    }
    head, row = rendered("kernels", result)
    assert head[3:] == [
        *("bytes an element", "budget", "messages", "steps in a chunk"),
        *("registers", "spilled, bytes", "instructions a step"),
    ]
    assert row[:3] == ["sm_90 mingru bfloat16", "8 x 4,096 x 2,048", "backward"]
    assert row[3:] == ["14", "12", "0.06", "128", "64", "16", "23"]


def test_the_page_of_a_gpu_has_a_table_for_each_stage_and_what_was_left_out() -> None:
    document = {
        **{"device": "Card", "engines": {"triton": "sm_90"}, "versions": {"torch": "2"}},
        **{"tests": {"status": "passed"}, "command": "minrnn bench gpu"},
        "options": {"tf32": False, "dry": False},
        "left_out": [{"stage": "peers", "setting": "8x4x2", "reason": "no memory"}],
        "results": [
            scans(2, 0.003) | {"stage": "shares"},
            case(SHAPE, {"minrnn": system((1e-6, 2e-6, 3e-6), PHASES, 1.0)}, stage="steps"),
        ],
    }
    text = BENCHES["gpu"].load().render(document)
    assert "Products in float32: float32 throughout. The engine's tests: passed." in text
    assert "| 8, 256, 512 | mingru | float32 | 1000.0 | 2000.0 | 20 | 50% | 75% |" in text
    assert "| 8, 256, 512 | minrnn | 1.0 | 2.0 | 3.0 | 1.00 |" in text
    assert "Left out: peers, 8x4x2: no memory." in text
    assert "Other implementations" not in text
    assert "dry run" not in text
    dry = BENCHES["gpu"].load().render(document | {"options": {"tf32": True, "dry": True}})
    assert dry.startswith("**A dry run on the CPU.**")
    assert "Products in float32: TF32." in dry


def test_prefixes_stand_beside_their_scans() -> None:
    names = ("forward", "prefix", "backward", "prefix of gradients")
    seconds = {name: {"median": time} for name, time in zip(names, (0.08, 0.004, 0.2, 0.001), strict=True)}
    ours = {"minrnn": {"seconds": seconds, "bytes_sent": 2048}}
    result = {"gate": "mingru", "shape": {"B": 1, "T": 9, "D": 256}, "dtype": "float32", "systems": ours}
    text = BENCHES["prefix"].load().render({"results": [result]})
    assert text.splitlines()[-1] == (
        "| 1, 9, 256 | mingru | float32 | 80.00 | 4.00 | 200.00 | 1.00 | 5.0% | 0.5% | 2.0 | 2.0 |"
    )


def test_several_processes_stand_beside_one() -> None:
    step = {"seconds": {"step": {"median": 2.0}}}
    found = {"minrnn": step, "replicated": {"status": "failed"}, "sharded": step}
    result = {"gate": "mingru", "shape": {"B": 3, "T": 1000, "D": 8, "L": 1}, "threads": 2, "systems": found}
    lines = BENCHES["ranks"].load().render({"results": [result]}).splitlines()
    assert lines[2:] == [
        "| mingru | 3 | 1,000 | 8 | 1 | 2 | one process | 2,000.0 | 1,500 |",
        "| mingru | 3 | 1,000 | 8 | 1 | 2 | 2 processes, replicated weights | failed |  |",
        "| mingru | 3 | 1,000 | 8 | 1 | 2 | 2 processes, sharded weights | 2,000.0 | 1,500 |",
    ]


def test_every_benchmark_has_a_table_here() -> None:
    assert set(BENCHES) == {
        "scan",
        "layer",
        "decode",
        "step",
        "export",
        "train",
        "ranks",
        "selective",
        "prefix",
        "accuracy",
        "gpu",
        "kernels",
    }


# --- learning curves -------------------------------------------------------------------------------------


def test_curves_have_the_seconds_of_training_up_to_each_evaluation() -> None:
    lines = [
        {"step": 0, "val_loss": 9.0},
        {"step": 2, "loss": 1.0, "tokens": 100, "tokens_per_second": 50.0, "seconds": 77.0},
        {"step": 3, "val_loss": 2.0, "accuracy": 0.5},
        {"step": 4, "loss": 0.9, "tokens": 200, "tokens_per_second": 25.0, "seconds": 99.0},
        {"step": 4, "val_loss": 1.5},
    ]
    found = _curves(lines)
    assert found["training_seconds"] == 6.0
    assert found["curve"] == [[2, 2.0, 1.0], [4, 6.0, 0.9]]
    assert found["evaluations"] == [
        {"step": 0, "val_loss": 9.0, "seconds": 0.0},
        {"step": 3, "val_loss": 2.0, "accuracy": 0.5, "seconds": 2.0},
        {"step": 4, "val_loss": 1.5, "seconds": 6.0},
    ]


def test_long_curves_are_thinned_to_eighty_points_and_keep_the_last() -> None:
    lines = [
        {"step": n, "loss": float(n), "tokens": n, "tokens_per_second": 1.0, "seconds": 0.0}
        for n in range(1, 241)
    ]
    curve = _curves(lines)["curve"]
    assert len(curve) == 80
    assert (curve[0], curve[-1]) == ([3, 3.0, 3.0], [240, 240.0, 240.0])
    assert len(_curves(lines[:81])["curve"]) == 40
