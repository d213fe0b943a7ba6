"""Locally made data: behaviors are the libraries' policies, and an interruption changes nothing."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3

from minrnn.cli.main import main
from minrnn.demonstrations import QUALITIES, TRAINERS, make_data, plan_for
from minrnn.demonstrations import record as recorder
from minrnn.demonstrations.behavior import Behavior
from minrnn.demonstrations.history import History, read_history, train_behavior
from minrnn.demonstrations.record import Share, always, play_episode, record, replayed, uniform
from minrnn.demonstrations.trainers import PolicyGradient, RandomSearch, Round, Trainer, training_environments
from minrnn.files import InUseError
from minrnn.tasks.environments import make_environment
from minrnn.tasks.locomotion import find_episodes, local_name, normalized_score
from minrnn.tasks.recordings import D4RL_FIELDS, read_episodes
from minrnn.training import BROKEN_PIPE, Interrupted

PENDULUM = "InvertedPendulum-v5"  # light, and episodes end soon where nothing has been learnt

SMALL: dict[str, Trainer] = {
    "ppo": PolicyGradient(environments=2, steps=32, updates=2, batch_size=16, epochs=2, hidden_size=8),
    "ars": RandomSearch(directions=4, top=2),
}


def unseen(*_: object) -> None:
    """Take a report, and show it to nobody."""


class Stop:
    """Interrupts at the n-th report of something."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count = what, count

    def __call__(self, what: str, done: int, total: int, text: str) -> None:
        self.count -= what == self.what
        if not self.count:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train little, save often, and stay out of the user's cache."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINRNN_DATA", raising=False)
    for name, trainer in SMALL.items():
        monkeypatch.setitem(TRAINERS, name, trainer)
    monkeypatch.setattr("minrnn.demonstrations.history.SAVE_EVERY", 0.0)
    monkeypatch.setattr(recorder, "PART_STEPS", 40)


def each_trainer(test: Callable[..., None]) -> Any:
    return pytest.mark.parametrize("name", SMALL)(test)


def assert_equal_histories(one: History, two: History) -> None:
    assert one.steps == two.steps
    np.testing.assert_array_equal(one.returns, two.returns)
    for left, right in zip(one.behaviors, two.behaviors, strict=True):
        for part in ("parameters", "mean", "variance", "action_noise"):
            np.testing.assert_array_equal(getattr(left, part), getattr(right, part), err_msg=part)


# --- others at work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["random", "medium"])
def test_what_another_process_makes_is_left_to_it(quality: str, tmp_path: Path) -> None:
    path = tmp_path / "made.hdf5"

    def make(output: Path, report: Callable[..., None] = unseen) -> None:
        make_data(PENDULUM, quality, report, output=output, steps=50, training_steps=64, algorithm="ppo")

    def again(what: str, done: int, total: int, text: str) -> None:
        with pytest.raises(InUseError, match="in use by process"):
            make(path)
        with pytest.raises(InUseError, match="in use by process"):  # which needs the same parts or training
            make(tmp_path / what)

    wanted = {"random": "recording", "medium": "training"}[quality]

    def report(what: str, *rest: Any) -> None:
        if what == wanted:
            again(what, *rest)

    make(path, report)
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["made.hdf5"]


@pytest.mark.parametrize("moment", ["training", "recording"])
@pytest.mark.parametrize("asks", ["signal", "pipe"])
def test_a_request_to_stop_keeps_what_is_done(asks: str, moment: str, tmp_path: Path) -> None:
    def make(name: str, report: Callable[..., None] = unseen) -> Path:
        settings: dict[str, Any] = {"steps": 130, "training_steps": 300, "algorithm": "ppo", "seed": 2}
        return make_data(PENDULUM, "medium", report, output=tmp_path / name, **settings)

    def ask(what: str, done: int, total: int, text: str) -> None:
        if what == moment and asks == "pipe":
            raise BrokenPipeError(errno.EPIPE, "gone")
        if what == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Interrupted, match=r"stopped and saved after [\d,]+ (of [\d,]+ steps of tr|of 130 rec)"
    ) as stop:
        make("parts.hdf5", ask)
    assert stop.value.signum == (signal.SIGTERM if asks == "signal" else BROKEN_PIPE)
    assert make("parts.hdf5").is_file()


# --- training --------------------------------------------------------------------------------------------


@each_trainer
def test_a_behaviour_acts_as_the_library_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    package, kind = {"ppo": (stable_baselines3, "PPO"), "ars": (sb3_contrib, "ARS")}[name]

    class Seen(getattr(package, kind)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            models.append(self)

    monkeypatch.setattr(package, kind, Seen)
    trainer = SMALL[name]
    with training_environments("Hopper-v5", trainer) as environments:
        first = trainer.train(environments, {}, 0)
        second = trainer.train(environments, first.state, 1)
    policy, behavior = models[0].policy, second.behavior  # with which the second round began
    normalise = models[0].get_vec_normalize_env().normalize_obs
    random = np.random.default_rng(0)
    quiet = replace(behavior, action_noise=np.zeros_like(behavior.action_noise))
    assert np.any(behavior.parameters)
    for observation in random.standard_normal((20, 11)) * 3:
        expected, _ = policy.predict(normalise(observation[None]), deterministic=True)
        np.testing.assert_allclose(
            np.clip(quiet.act(observation, random), -1, 1), expected[0], rtol=1e-4, atol=1e-5
        )


def test_noise_is_added_to_actions() -> None:
    noise = np.array([0.5, 0.0])
    behavior = Behavior(np.array([1.0, 2.0, 3.0, 4.0]), (1, 2), np.zeros(1), np.ones(1) - 1e-8, noise)
    random = np.random.default_rng(0)
    actions = np.array([behavior.act(np.array([2.0]), random) for _ in range(4000)])
    np.testing.assert_allclose(actions.mean(axis=0), [1 * 2 + 3, 2 * 2 + 4], atol=0.05)
    np.testing.assert_allclose(actions.std(axis=0), noise, atol=0.02)


@each_trainer
def test_training_that_goes_on_is_training_that_never_stopped(name: str, tmp_path: Path) -> None:
    def train(steps: int, file: str, report: Callable[..., None] = unseen) -> History:
        return train_behavior(PENDULUM, SMALL[name], steps, 3, tmp_path / file, report)

    whole = train(600, "whole.npz")
    assert len(whole.steps) > 3
    assert whole.steps[-2] < 600 <= whole.steps[-1]
    with pytest.raises(KeyboardInterrupt):
        train(600, "parts.npz", Stop("training", 3))
    assert 0 < len(read_history(tmp_path / "parts.npz").steps) < len(whole.steps)
    assert_equal_histories(train(600, "parts.npz"), whole)
    assert_equal_histories(train(300, "parts.npz"), train(300, "short.npz"))  # no training, and a shorter one
    other = train_behavior(PENDULUM, SMALL[name], 300, 4, tmp_path / "other.npz", unseen)
    assert other.returns != train(300, "short.npz").returns


def round_of(steps: int, mean_return: float) -> Round:
    behavior = Behavior(np.full(2, float(steps)), (1, 1), np.zeros(1), np.ones(1), np.ones(1))
    return Round({"state": np.array(steps)}, behavior, steps, mean_return)


def test_the_best_round_is_that_with_good_ones_beside_it() -> None:
    history = History()
    for value in (1.0, 90.0, 2.0, 60.0, 70.0, 60.0, 10.0, float("nan"), 3.0):
        history.add(round_of(10, value))
    assert history.best() == 4
    assert history.last_start == 80
    assert history.until(45).steps == [10, 20, 30, 40, 50]
    assert history.until(50).steps == [10, 20, 30, 40, 50]
    never = History()
    never.add(round_of(10, float("nan")))
    assert never.best() == 0


def test_a_damaged_training_is_refused(tmp_path: Path) -> None:
    history = History()
    history.add(round_of(10, 1.0))
    history.save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (whole[:-30], b"", b"text"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"a\.npz must be an \.npz file, got a damaged one .*; remove it"
        ):
            read_history(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", steps=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz must hold sizes, got steps; remove it"):
        read_history(tmp_path / "a.npz")


# --- recording -------------------------------------------------------------------------------------------


def test_replay_draws_moments_of_training_alike_with_their_noise() -> None:
    history = History()
    for steps in (100, 300, 600):
        history.add(round_of(steps, 0.0))
    random = np.random.default_rng(0)
    drawn = [replayed(history, 0.0)(random).__self__ for _ in range(3000)]  # type: ignore[attr-defined]
    share = [np.mean([who.parameters[0] == steps for who in drawn]) for steps in (100, 300, 600)]
    np.testing.assert_allclose(share, [0.1, 0.3, 0.6], atol=0.03)
    changed = [replayed(history, 0.5)(random).__self__ for _ in range(3000)]  # type: ignore[attr-defined]
    off = np.array([who.parameters - np.round(who.parameters, -2) for who in changed])
    np.testing.assert_allclose(off.std(axis=0), 0.5, atol=0.03)
    assert not any(who.action_noise.any() for who in changed)
    assert all(who.action_noise.all() for who in drawn)


def test_an_episode_is_a_function_of_its_seed_and_ends_as_the_environment_says() -> None:
    for environment, is_terminated, steps in ((PENDULUM, True, None), ("Pendulum-v1", False, 200)):
        made = make_environment(environment)
        draw = uniform(made.action_space.low, made.action_space.high)
        one, two, other = (play_episode(made, draw, (0, seed), 1000) for seed in (5, 5, 6))
        for name in one._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        assert not np.array_equal(one.observations[0], other.observations[0])
        assert one.terminated == [is_terminated]
        assert one.ends == [len(one.rewards)] == [steps or one.ends[0]]
        np.testing.assert_array_equal(one.next_observations[:-1], one.observations[1:])
        cut = play_episode(made, draw, (0, 5), 3)
        np.testing.assert_array_equal(cut.actions, one.actions[:3])
        assert cut.terminated == [False]
        made.close()


def test_actions_stay_within_bounds() -> None:
    made = make_environment("Pendulum-v1")
    wild = Behavior(np.array([9.0, 9.0, 9.0, 0.0]), (3, 1), np.zeros(3), np.ones(3), np.array([50.0]))
    actions = play_episode(made, always(wild), (0,), 100).actions
    assert actions.dtype == np.float32
    assert set(np.unique(actions)) >= {-2.0, 2.0}
    assert np.abs(actions).max() == 2
    made.close()


def test_recording_that_goes_on_is_recording_that_never_stopped(tmp_path: Path) -> None:
    made = make_environment(PENDULUM)
    draw = uniform(made.action_space.low, made.action_space.high)
    made.close()
    shares = [Share(draw, 150), Share(draw, 101)]
    whole = record(PENDULUM, shares, 0, tmp_path / "whole", unseen)
    with pytest.raises(KeyboardInterrupt):
        record(PENDULUM, shares, 0, tmp_path / "parts", Stop("recording", 5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert 0 < len(before) < len(list((tmp_path / "whole").iterdir()))
    again = record(PENDULUM, shares, 0, tmp_path / "parts", unseen)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name), err_msg=name)
    assert all((tmp_path / "parts" / name).read_bytes() == content for name, content in before.items())
    assert len(whole.rewards) == whole.ends[-1] == 251
    assert 150 in whole.ends  # each share has its own steps, and its own episodes
    assert not np.array_equal(whole.observations[:101], whole.observations[150:])
    assert not whole.terminated[-1]
    assert whole.terminated[0]


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_is_a_labelled_file_in_d4rls_layout(quality: str, tmp_path: Path) -> None:
    path = make_data(PENDULUM, quality, unseen, steps=120, training_steps=300, algorithm="ppo")
    with h5py.File(path) as file:
        assert {*D4RL_FIELDS, "next_observations"} == set(file)
        assert all(file[name].compression == "gzip" for name in file)
        for name in ("observations", "next_observations", "actions", "rewards"):
            assert file[name].dtype == np.float32
            assert len(file[name]) == 120
    episodes = find_episodes(local_name(PENDULUM, quality))
    assert len(episodes) == 120
    assert episodes.environment == PENDULUM
    about = episodes.about
    assert about["source"] == "local"
    assert about["name"] == f"local/{PENDULUM}-{quality}"
    assert about["quality"] == quality
    assert about["mean_return"] == pytest.approx(episodes.returns.mean())
    assert about["made"]["seed"] == 0
    assert {"gymnasium", "mujoco", "stable-baselines3"} == set(about["versions"])
    assert "not one of D4RL's" in about["label"]
    if quality != "random":
        assert about["policy_return"] > 0
        assert "proximal policy optimization" in about["algorithm"]
        assert about["made"]["training_steps"] == 300
        assert 0 <= about["best_after_steps"] < 300
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not list((tmp_path / "cache" / "demonstrations").glob("recording-*"))


def test_one_training_serves_all_qualities_and_seeds_are_apart(tmp_path: Path) -> None:
    trained: list[int] = []

    def report(what: str, done: int, total: int, text: str) -> None:
        trained.append(what == "training")

    digests = set()
    for quality in QUALITIES:
        path = make_data(PENDULUM, quality, report, steps=60, training_steps=200, algorithm="ars")
        digests.add(read_episodes(path).sha256)
    count = sum(trained)
    assert len(list((tmp_path / "cache" / "demonstrations").glob("training-*.npz"))) == 1
    path = make_data(PENDULUM, "medium", report, seed=1, steps=60, training_steps=200, algorithm="ars")
    assert sum(trained) > count
    assert path.stem == f"{PENDULUM}-medium-seed1"
    assert len({*digests, read_episodes(path).sha256}) == 5


@pytest.mark.parametrize(("what", "count"), [("training", 2), ("evaluating", 3), ("recording", 2)])
def test_an_interruption_anywhere_changes_nothing(what: str, count: int, tmp_path: Path) -> None:
    def make(file: str, report: Callable[..., None]) -> Path:
        arguments = {"steps": 150, "training_steps": 300, "algorithm": "ppo", "output": tmp_path / file}
        return make_data(PENDULUM, "medium-expert", report, **arguments)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        make("a.hdf5", Stop(what, count))
    assert not (tmp_path / "a.hdf5").exists()
    resumed = read_episodes(make("a.hdf5", unseen))
    for file in (tmp_path / "cache" / "demonstrations").iterdir():
        file.unlink()
    whole = read_episodes(make("b.hdf5", unseen))
    assert resumed.sha256 == whole.sha256
    assert dict(resumed.about) == dict(whole.about)


def test_a_file_that_is_there_is_kept_or_refused(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "a.hdf5"

    def make(steps: int) -> Path:
        return make_data(PENDULUM, "random", unseen, steps=steps, output=output)

    content = make(50).read_bytes()
    assert make(50) == output
    with pytest.raises(FileExistsError, match=r"a\.hdf5 exists, and was made with .*'steps': 50.*--output"):
        make(51)
    assert output.read_bytes() == content


def test_scores_are_d4rls_where_it_has_references(tmp_path: Path) -> None:
    path = make_data("Hopper-v5", "random", unseen, steps=60, output=tmp_path / "a.hdf5")
    about = read_episodes(path).about
    assert about["score"] == pytest.approx(normalized_score("Hopper-v5", about["mean_return"]))
    assert -5 < about["score"] < 5
    assert {plan_for(f"{name}-v5").algorithm for name in ("Hopper", "HalfCheetah", "Walker2d", "Ant")} <= set(
        TRAINERS
    )


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quality": "expert"}, "quality must be one of random, medium, .* got 'expert'"),
        ({"algorithm": "sac"}, "algorithm must be one of ppo, ars, got 'sac'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"training_steps": -5}, "training_steps must be at least 1, got -5"),
        ({"environment": "Hoper-v5"}, "did you mean 'Hopper-v5'"),
        ({"environment": "CartPole-v1"}, r"actions must be continuous, got Discrete\(2\)"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"environment": PENDULUM, "quality": "random", **arguments}
    with pytest.raises(ValueError, match=message):
        make_data(given.pop("environment"), given.pop("quality"), unseen, **given)


@pytest.mark.parametrize(("module", "name"), [("stable_baselines3", "ppo"), ("sb3_contrib", "ars")])
def test_a_missing_library_names_the_extra(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in list(sys.modules):
        if loaded.split(".")[0] == module:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"make_data: training needs .* pip install 'minrnn\[rl\]'"):
        make_data(PENDULUM, "medium", unseen, steps=50, training_steps=50, algorithm=name)


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_makes_says_and_names_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["make-data", PENDULUM, "--steps", "100", "--training-steps", "200", "--algorithm", "ppo"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "training 2" in said
    assert "recording 100/100" in said
    assert f"local/{PENDULUM}-medium (local): 100 steps in " in said
    assert "policy without noise: return" in said
    assert said.endswith(f"next: minrnn train decisions --task.data local/{PENDULUM}-medium\n")
    assert main(args) == 0
    assert "training" not in capsys.readouterr().out.partition("next:")[0].replace("after", "")
    assert main([*args, "--seed", "1", "--output", str(tmp_path / "a.hdf5")]) == 0
    assert f"--task.data {tmp_path / 'a.hdf5'}" in capsys.readouterr().out


def test_the_command_says_that_it_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minrnn.cli.make_data.make_data", stopped)
    assert main(["make-data", PENDULUM]) == 130
    assert "the same command resumes" in capsys.readouterr().out
