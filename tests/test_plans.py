"""What a demonstration is made of: which policy of a training, its noise, how many steps, from what seed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from minrnn.cli import make_data as command
from minrnn.cli.main import main
from minrnn.demonstrations import QUALITIES, TRAINERS, make, make_data, plan_for, trainers
from minrnn.demonstrations import record as recorder
from minrnn.demonstrations.behavior import Behavior
from minrnn.demonstrations.history import History, read_history, train_behavior
from minrnn.demonstrations.record import Share, always, play_episode, record, replayed, uniform
from minrnn.demonstrations.trainers import PolicyGradient, RandomSearch, Round, training_environments
from minrnn.tasks.environments import make_environment
from minrnn.tasks.locomotion import normalized_score
from minrnn.tasks.recordings import read_episodes
from minrnn.training import Interrupted

PENDULUM = "InvertedPendulum-v5"


def behavior(value: float) -> Behavior:
    return Behavior(np.full(5, value), (4, 1), np.zeros(4), np.ones(4), np.full(1, 0.25))


def history(*returns: float, steps: int = 100) -> History:
    """Rounds of so many steps, whose behaviors have the number of the round as their parameters."""
    made = History()
    for number, mean_return in enumerate(returns):
        made.add(Round({}, behavior(float(number)), steps, mean_return))
    return made


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    monkeypatch.setattr(make, "EVALUATION_EPISODES", 3)


class Made:
    """A call of make_data whose training is given, with what it asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quality: str, **settings: Any) -> None:
        self.trained: list[tuple[Any, ...]] = []
        self.shares: list[Share] = []
        self.folders: list[Path] = []
        self.reports: list[str] = []

        def train(*given: Any) -> History:
            self.trained.append(given)
            return history(1.0, 5.0, 9.0, 5.0, 1.0, 1.0)

        def recording(environment: str, shares: list[Share], seed: int, folder: Path, report: Any) -> Any:
            self.shares += shares
            self.folders.append(folder)
            return record(environment, shares, seed, folder, report)

        monkeypatch.setattr(make, "train_behavior", train)
        monkeypatch.setattr(make, "record", recording)
        self.path = make_data(PENDULUM, quality, lambda what, *_: self.reports.append(what), **settings)
        self.episodes = read_episodes(self.path)

    def policies(self, share: int, count: int = 200) -> list[Behavior]:
        random = np.random.default_rng(0)
        return [self.shares[share].draw(random).__self__ for _ in range(count)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("steps", [30, 31])
def test_every_step_that_was_asked_for_is_recorded(
    quality: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(monkeypatch, quality, steps=steps)
    assert len(made.episodes) == sum(share.steps for share in made.shares) == steps


def test_medium_is_the_best_policy_with_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, "medium", steps=30, seed=3)
    (policy,) = made.policies(0, 1)
    assert (policy.parameters[0], policy.action_noise[0]) == (2.0, 0.25)
    about = made.episodes.about
    assert about["best_after_steps"] == 200  # two rounds before the one that began with it
    assert about["action_noise"] == [0.25]
    quiet = replace(behavior(2.0), action_noise=np.zeros(1))
    environment = make_environment(PENDULUM)
    returns = [
        play_episode(environment, always(quiet), (3, 4, number), 10_000).rewards.sum() for number in range(3)
    ]
    environment.close()
    assert about["policy_return"] == pytest.approx(np.mean(returns))
    assert about["policy_return_deviation"] == pytest.approx(np.std(returns))
    assert about["mean_return"] == pytest.approx(made.episodes.returns.mean())
    assert about["policy_score"] is about["score"] is normalized_score(PENDULUM, 1.0) is None


def test_one_half_of_medium_expert_has_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, "medium-expert", steps=31)
    halves = [(made.policies(share, 1)[0], made.shares[share].steps) for share in range(2)]
    assert [(policy.parameters[0], policy.action_noise[0], steps) for policy, steps in halves] == [
        (2.0, 0.25, 16),
        (2.0, 0.0, 15),
    ]


def test_replay_ends_with_the_best_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, "medium-replay", steps=30)
    assert {policy.parameters[0] for policy in made.policies(0)} == {0.0, 1.0, 2.0}


def test_evaluation_and_recording_meet_different_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, ...]] = []

    def played(environment: Any, draw: Any, seed: tuple[int, ...], limit: int) -> Any:
        seeds.append(seed)
        return play_episode(environment, draw, seed, limit)

    monkeypatch.setattr(make, "play_episode", played)
    monkeypatch.setattr(recorder, "play_episode", played)
    monkeypatch.setattr(recorder, "PART_STEPS", 10)
    Made(monkeypatch, "medium-expert", steps=200)
    assert len(seeds) > 10
    assert len(set(seeds)) == len(seeds)


def test_parts_and_trainings_are_kept_apart_by_all_that_they_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_one(quality: str = "medium", **settings: Any) -> tuple[Path, Path]:
        given = {"steps": 20, "output": tmp_path / f"{next(numbers)}.hdf5", **settings}
        made = Made(monkeypatch, quality, **given)
        ((_, _, steps, seed, file, _),) = made.trained
        assert steps == settings.get("training_steps", 300_000)
        assert seed == settings.get("seed", 0)
        return file, made.folders[0]

    seen: list[tuple[Path, Path]] = []
    numbers = count()
    for settings in ({}, {"seed": 1}, {"algorithm": "ars"}):
        seen.append(make_one(**settings))
    monkeypatch.setitem(TRAINERS, "ppo", replace(TRAINERS["ppo"], epochs=9))  # type: ignore[type-var]
    seen.append(make_one())
    monkeypatch.setattr(make, "library_versions", lambda _: {"gymnasium": "0.0"})
    trainings = [*seen, make_one()]
    assert len({training for training, _ in trainings}) == 5
    same = [make_one(), make_one("medium-replay"), make_one(training_steps=7), make_one(steps=21)]
    assert len({training for training, _ in same}) == 1  # one training serves all of these
    assert len({parts for _, parts in (*seen, *same)}) == 8


def test_a_file_of_other_settings_is_refused_whatever_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 20, "output": tmp_path / "a.hdf5"}
    first = Made(monkeypatch, "medium", **settings)
    assert Made(monkeypatch, "medium", **settings).trained == []  # it is left as it is
    assert "recording" in first.reports
    others: list[dict[str, Any]] = [{"steps": 21}, {"seed": 1}, {"training_steps": 9}, {"algorithm": "ars"}]
    for other in others:
        with pytest.raises(FileExistsError, match="was made with"):
            Made(monkeypatch, "medium", **{**settings, **other})
    with pytest.raises(FileExistsError, match="was made with"):
        Made(monkeypatch, "medium-replay", **settings)
    assert not list((tmp_path / "cache" / "demonstrations").glob("recording-*"))  # no part is left


@pytest.mark.parametrize("algorithm", ["ppo", "ars"])
def test_a_file_of_an_earlier_version_is_kept_if_its_steps_are_those_asked_for(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the settings of the training beside those of the recording, and PPO's `steps` among them."""
    settings: dict[str, Any] = {"steps": 20, "algorithm": algorithm, "output": tmp_path / "a.hdf5"}
    Made(monkeypatch, "medium", **settings)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        about = json.loads(file.attrs["about"])
        about["made"] |= about["made"].pop("training")
        file.attrs["about"] = json.dumps(about)
    assert Made(monkeypatch, "medium", **settings).trained == []
    with pytest.raises(FileExistsError, match="was made with"):
        Made(monkeypatch, "medium", **{**settings, "steps": 21})


@pytest.mark.parametrize("prefix", ["", "package.module:"])
def test_the_plan_is_that_of_the_environment(prefix: str) -> None:
    expected = {
        "Hopper-v5": ("ppo", 250_000),
        "HalfCheetah-v4": ("ars", 1_200_000),
        "Walker2d-v5": ("ppo", 500_000),
        "Ant-v5": ("ppo", 300_000),
    }
    assert {name: tuple(plan_for(prefix + name)) for name in expected} == expected


class Room:
    """Spaces alone."""

    spec = None

    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observations, actions

    def close(self) -> None: ...


VECTOR, ANGLES = spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,))


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (VECTOR, spaces.Box(-np.inf, np.inf, (2,))),
        (VECTOR, spaces.Box(np.array([-1.0, -np.inf]), np.ones(2))),
        (VECTOR, spaces.Box(0, 9, (2,), np.int64)),
        (VECTOR, spaces.Box(-1, 1, (2, 2))),
        (spaces.Box(-1, 1, (3, 3)), ANGLES),
        (spaces.Dict({"a": VECTOR}), ANGLES),
    ],
)
def test_spaces_without_a_behavior_are_refused(observations: Any, actions: Any) -> None:
    make._check_spaces(Room(VECTOR, ANGLES))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be vectors, and actions bounded floats"):
        make._check_spaces(Room(observations, actions))  # type: ignore[arg-type]


# --- the pieces -------------------------------------------------------------------------------------------


def test_a_behavior_is_the_network_that_is_written_down() -> None:
    """2 -> 2 -> 1, computed by hand."""
    weights = [1.0, -2.0, 0.5, 0.25, 0.1, -0.2, 3.0, -4.0, 0.7]  # W_1 by rows, b_1, W_2, b_2
    quiet = Behavior(np.array(weights), (2, 2, 1), np.array([1.0, 0.0]), np.array([4.0, 0.25]), np.zeros(1))
    x, y = (2.0 - 1.0) / 2, 3.0 / 0.5
    hidden = np.tanh([x - 2 * y + 0.1, 0.5 * x + 0.25 * y - 0.2])
    expected = 3 * hidden[0] - 4 * hidden[1] + 0.7
    random = np.random.default_rng(0)
    np.testing.assert_allclose(quiet.act(np.array([2.0, 3.0]), random), [expected], rtol=1e-6)
    far = Behavior(np.array([1.0, 0.5]), (1, 1), np.zeros(1), np.ones(1), np.zeros(1))
    np.testing.assert_allclose(far.act(np.array([1e6]), random), [10.5])  # as training clips what it sees


def test_the_numbers_of_an_action_have_noise_of_their_own() -> None:
    noisy = Behavior(np.zeros(6), (2, 2), np.zeros(2), np.ones(2), np.ones(2))
    random = np.random.default_rng(0)
    actions = np.array([noisy.act(np.zeros(2), random) for _ in range(2000)])
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.1


def test_rounds_are_added_up_and_cut_where_they_reach() -> None:
    made = history(1.0, 2.0, 3.0, steps=10)
    assert (made.steps, made.total_steps, made.last_start) == ([10, 20, 30], 30, 20)
    assert [made.until(steps).total_steps for steps in (1, 10, 11, 20, 30)] == [10, 10, 20, 20, 30]
    assert (History().total_steps, History().last_start, history(1.0).last_start) == (0, 0, 0)
    nan = float("nan")
    assert history(1.0, nan, 5.0, nan, nan, nan).best() == 2  # rounds in which no episode ended say nothing


def test_a_saved_history_is_read_with_its_state_and_strictly(tmp_path: Path) -> None:
    made = history(1.0, float("nan"))
    made.state = {"weights": np.arange(3.0), "policy/a": np.ones((2, 2))}
    made.save(tmp_path / "a.npz")
    read = read_history(tmp_path / "a.npz")
    assert read.steps == made.steps
    np.testing.assert_array_equal(read.returns, made.returns)
    assert read.state.keys() == made.state.keys()
    for name, value in made.state.items():
        np.testing.assert_array_equal(read.state[name], value)
    for one, other in zip(read.behaviors, made.behaviors, strict=True):
        assert one.sizes == other.sizes
        np.testing.assert_array_equal(one.parameters, other.parameters)
    made.steps = [100, 100]  # a round without steps
    made.save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="must hold equal numbers of rounds, in order"):
        read_history(tmp_path / "a.npz")


class Counted:
    """A trainer of rounds of ten steps that notes its seeds and states."""

    library, title, environments, parameter_noise = "stable-baselines3", "counted", 1, 0.0

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []

    def train(self, environment: Any, state: Any, seed: int) -> Round:
        self.seen.append((seed, dict(state)))
        return Round({"round": np.array(len(self.seen))}, behavior(0.0), 10, 1.0)


def test_a_longer_training_goes_on_with_the_state_and_seeds_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(trainer: Counted, steps: int) -> History:
        return train_behavior(PENDULUM, trainer, steps, 5, tmp_path / "a.npz", lambda *_: None)  # type: ignore[arg-type]

    whole = Counted()
    assert train(whole, 30).steps == [10, 20, 30]
    assert len({seed for seed, _ in whole.seen}) == 3
    assert [state.get("round") for _, state in whole.seen] == [None, 1, 2]
    assert all(0 <= seed < 2**31 for seed, _ in whole.seen)
    more = Counted()
    assert train(more, 40).steps == [10, 20, 30, 40]
    ((seed, state),) = more.seen
    assert (int(state["round"]), seed in {seed for seed, _ in whole.seen}) == (3, False)
    assert train(more, 20).steps == [10, 20]
    assert len(more.seen) == 1


def test_random_search_has_its_own_noise_and_no_bonus_for_being_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sb3_contrib

    given: dict[str, Any] = {}

    class Noted(sb3_contrib.ARS):
        def __init__(self, *args: Any, **settings: Any) -> None:
            given.update(settings)
            super().__init__(*args, **settings)

    monkeypatch.setattr(sb3_contrib, "ARS", Noted)
    trainer = RandomSearch(3, 2, 0.05, 0.1, 0.4, alive_bonus=1.5)
    with training_environments("Pendulum-v1", trainer) as environments:  # type: ignore[arg-type]
        made = trainer.train(environments, {}, 7)
    assert made.behavior.action_noise.tolist() == pytest.approx(
        [0.8]
    )  # 0.4 of 2, half the distance of -2 and 2
    expected = {"n_delta": 3, "n_top": 2, "learning_rate": 0.05, "delta_std": 0.1, "seed": 7}
    assert given.items() >= {**expected, "alive_bonus_offset": -1.5}.items()


def test_parts_of_a_recording_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = make_environment(PENDULUM)
    draw = uniform(environment.action_space.low, environment.action_space.high)
    environment.close()
    record(PENDULUM, [Share(draw, 20)], 0, tmp_path / "parts", lambda *_: None)
    (part,) = (tmp_path / "parts").glob("*.npz")
    with np.load(part) as file:
        arrays = dict(file)
    for name in ("rewards", "actions", "observations", "next_observations", "terminated"):
        np.savez(part, **{**arrays, name: arrays[name][:-1]})
        with pytest.raises(ValueError, match=r"must hold arrays of consistent lengths; remove it"):
            record(PENDULUM, [Share(draw, 20)], 0, tmp_path / "parts", lambda *_: None)


def test_proximal_policy_optimization_has_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second round goes on with the first one's optimizer and statistics."""
    import stable_baselines3

    made: list[Any] = []
    given: dict[str, Any] = {}

    class Noted(stable_baselines3.PPO):
        def __init__(self, *args: Any, **settings: Any) -> None:
            given.update(settings)
            super().__init__(*args, **settings)
            made.append(self)

        def learn(self, *args: Any, **settings: Any) -> Any:
            self.before = self.policy.optimizer.state_dict()["state"].get(0, {}).get("exp_avg_sq")
            self.counted = float(self.env.obs_rms.count)  # type: ignore[union-attr]
            return super().learn(*args, **settings)

    monkeypatch.setattr(stable_baselines3, "PPO", Noted)
    trainer = PolicyGradient(2, 8, 3, 4, 5, 2e-3, 6)
    with training_environments(PENDULUM, trainer) as environments:
        first = trainer.train(environments, {}, 7)
        trainer.train(environments, first.state, 8)
    expected = {"n_steps": 8, "batch_size": 4, "n_epochs": 5, "learning_rate": 2e-3, "seed": 8}
    assert given.items() >= expected.items()
    assert given["policy_kwargs"] == {"net_arch": [6, 6]}
    assert first.steps == 2 * 8 * 3
    assert made[0].env.norm_reward
    assert made[0].before is None
    np.testing.assert_array_equal(made[1].before, first.state["optimizer/0/exp_avg_sq"])
    assert made[1].before.any()
    assert made[1].counted == pytest.approx(float(first.state["observation_count"]))
    assert made[1].counted > made[0].counted
    assert first.behavior.action_noise.tolist() == [1.0]  # exp of 0, with which training begins


@pytest.mark.parametrize("returns", [[], [1.0, 4.0]])
def test_a_round_in_which_no_episode_ended_has_no_return(returns: list[float]) -> None:
    class Model:
        ep_info_buffer = [{"r": value} for value in returns]  # noqa: RUF012

    assert str(trainers._mean_return(Model())) == ("2.5" if returns else "nan")  # type: ignore[arg-type]


def test_an_interruption_saves_the_round_that_was_just_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minrnn.demonstrations.history.SAVE_EVERY", float("inf"))

    def ask(what: str, done: int, total: int, text: str) -> None:
        if done == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="20 of 50 steps of training"):
        train_behavior(PENDULUM, Counted(), 50, 5, tmp_path / "a.npz", ask)  # type: ignore[arg-type]
    assert read_history(tmp_path / "a.npz").steps == [10, 20]


def test_a_replayed_step_is_one_of_the_round_that_it_lies_in() -> None:
    made = history(1.0, 1.0, 1.0, steps=10)

    class Fixed:
        def __init__(self, step: int) -> None:
            self.step = step

        def integers(self, high: int) -> int:
            assert high == 30
            return self.step

    rounds = [replayed(made, 0.0)(Fixed(step)).__self__.parameters[0] for step in range(30)]  # type: ignore[arg-type, attr-defined]
    assert rounds == [0.0] * 10 + [1.0] * 10 + [2.0] * 10


def test_no_part_repeats_the_episodes_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PART_STEPS", 25)
    environment = make_environment(PENDULUM)
    draw = uniform(environment.action_space.low, environment.action_space.high)
    environment.close()
    made = record(PENDULUM, [Share(draw, 120), Share(draw, 80)], 0, tmp_path / "parts", lambda *_: None)
    assert len(list((tmp_path / "parts").glob("*.npz"))) > 4
    starts = np.concatenate([[0], made.ends[:-1]])
    assert len(np.unique(made.observations[starts], axis=0)) == len(starts) > 8


@pytest.mark.parametrize("score", [None, 12.34])
def test_the_command_says_what_the_policy_earns(
    score: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"policy_return": 3456.7, "policy_score": score, "mean_return": 9.0, "best_after_steps": 1200}
    about |= {"algorithm": "an algorithm", "label": "a label", "name": "local/a"}

    class Data:
        def __init__(self) -> None:
            self.about = about

        def describe(self) -> str:
            return "described"

    monkeypatch.setattr(command, "make_data", lambda *_, **__: tmp_path / "a.hdf5")
    monkeypatch.setattr(command, "read_episodes", lambda _: Data())
    assert main(["make-data", PENDULUM]) == 0
    scored = "" if score is None else ", D4RL's score 12.3"
    assert capsys.readouterr().out.splitlines() == [
        "described",
        f"policy without noise: return 3,457{scored}, after 1,200 steps of an algorithm",
        "a label",
        f"file: {tmp_path / 'a.hdf5'}",
        "next: minrnn train decisions --task.data local/a",
    ]


def test_an_interrupted_command_has_the_status_of_its_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM, "a part")

    monkeypatch.setattr(command, "make_data", stopped)
    assert main(["make-data", PENDULUM]) == 128 + signal.SIGTERM
    assert "the same command resumes" in capsys.readouterr().out
