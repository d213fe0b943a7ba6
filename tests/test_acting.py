"""Policies in environments: whole episodes, several at a time; what does not fit is said beforehand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from episode_files import MISSING, cannot_draw, write_pendulum_data

from minrnn.cli.main import main
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, Policy, save_checkpoint
from minrnn.tasks import DecisionsConfig
from minrnn.tasks.film import FORMATS, Film
from minrnn.training import RunConfig

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: the extra rl")

from minrnn.tasks.environments import make_environment  # noqa: E402 - after the skip
from minrnn.tasks.rollouts import MUJOCO, check_fit, make_filmed, picture, play  # noqa: E402

PENDULUM = {"observation_size": 3, "action_size": 1, "environment": "Pendulum-v1"}
CARTPOLE = {"observation_size": 4, "action_size": 2, "discrete": True, "environment": "CartPole-v1"}
LIMIT = 200  # steps of an episode of Pendulum-v1


def build(**settings: Any) -> DecisionModel:
    torch.manual_seed(0)
    trunk = ModelConfig(d_model=8, num_layers=1, conv_width=0)
    return DecisionModel(DecisionConfig(trunk, **{"target_return": 5.0, **settings})).double()


class Countdown(gymnasium.Env[Any, Any]):
    """An episode of as many steps as its seed says; it keeps what is done and pays the step's number."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(np.array([-1.0, 0.0]), np.array([0.5, 0.1]), dtype=np.float64)

    def __init__(self) -> None:
        self.actions: list[Any] = []
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.left, self.at = (seed or 0) % 4 + 1, 0
        return np.array([self.left, 0.0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.actions.append(action)
        self.left, self.at = self.left - 1, self.at + 1
        return np.array([self.left, self.at]), float(self.at), self.left == 0, False, {}


# --- episodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("window", [0, 3])
def test_episodes_are_the_same_however_many_play_at_a_time(count: int, window: int) -> None:
    model = build(observation_size=2, action_size=2, window=window)
    environments = [Countdown() for _ in range(count)]
    *_, played = play(Policy(model), environments, 7, seed=2)
    lengths = [(2 + number) % 4 + 1 for number in range(7)]
    assert [episode.steps for episode in played] == lengths
    assert [episode.total_return for episode in played] == [n * (n + 1) / 2 for n in lengths]
    assert {episode.ended for episode in played} == {"terminated"}
    assert [episode.number for episode in played] == list(range(7))
    seeds = sorted(seed for environment in environments for seed in environment.seeds if seed is not None)
    assert seeds == list(range(2, 9))
    first = sorted(tuple(action) for environment in environments for action in environment.actions)
    alone = Countdown()
    *_, _ = play(Policy(model), [alone], 7, seed=2)
    assert np.array(first) == pytest.approx(np.array(sorted(map(tuple, alone.actions))), abs=1e-6)


def test_actions_are_cut_to_what_the_environment_allows() -> None:
    model = build(observation_size=2, action_size=2)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([9.0, -9.0]))
    environment = Countdown()
    *_, _ = play(Policy(model), [environment], 3)
    assert {tuple(action.tolist()) for action in environment.actions} == {(0.5, 0.0)}


def test_every_step_is_told_of() -> None:
    seen = [
        [episode.steps for episode in played]
        for played in play(Policy(build(observation_size=2, action_size=2)), [Countdown()], 2, seed=1)
    ]
    assert seen == [[1], [2, 0], [2, 1], [2, 2], [2, 3]]


@pytest.mark.parametrize("settings", [PENDULUM, CARTPOLE])
def test_gymnasiums_environments_are_played(settings: dict[str, Any]) -> None:
    name = settings["environment"]
    environments = [make_environment(name) for _ in range(2)]
    *_, played = play(Policy(build(**settings)), environments, 3)
    again = list(play(Policy(build(**settings)), environments, 3))[-1]
    assert played == again
    if name == "Pendulum-v1":
        assert [(episode.steps, episode.ended) for episode in played] == [(LIMIT, "time limit")] * 3
    else:
        assert {episode.ended for episode in played} == {"terminated"}


# --- what does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        (PENDULUM, "CartPole-v1", r"observations of 3 numbers, .* got CartPole-v1 with Box"),
        (
            PENDULUM | {"action_size": 2},
            "Pendulum-v1",
            r"must take actions of 2 numbers, .* Pendulum-v1 with Box",
        ),
        (CARTPOLE | {"discrete": False}, "CartPole-v1", r"must take actions of 2 numbers, .* Discrete\(2\)"),
        (CARTPOLE | {"action_size": 3}, "CartPole-v1", r"one of 3 discrete actions, .* Discrete\(2\)"),
        (PENDULUM | {"discrete": True}, "Pendulum-v1", r"one of 1 discrete actions, .* with Box"),
        (PENDULUM | {"max_steps": 100}, "Pendulum-v1", r"end within 100 steps, .* --task.timesteps 200"),
    ],
)
def test_an_environment_of_another_kind_is_refused(
    settings: dict[str, Any], environment: str, message: str
) -> None:
    config = build(**settings).config
    with pytest.raises(ValueError, match=f"act: .*{message}"):
        check_fit(config, make_environment(environment))


def test_nothing_is_played_without_an_environment() -> None:
    policy = Policy(build(**PENDULUM))
    for environments, episodes in (([], 1), ([make_environment("Pendulum-v1")], 0)):
        with pytest.raises(ValueError, match="episodes must be at least 1, in one environment at least"):
            play(policy, environments, episodes)


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_dir(workplace: Path) -> Path:
    return write_run(workplace / "run", **PENDULUM)


def write_run(folder: Path, **settings: Any) -> Path:
    """What training leaves and acting needs."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RunConfig(task=DecisionsConfig(data="made")).to_dict()))
    save_checkpoint(
        folder / "checkpoints" / "best",
        build(**settings),
        extra={"step": 7, "vocabulary": None, "corpus": ""},
    )
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    status = main(["act", *args])
    error = capsys.readouterr().err
    assert re.fullmatch(r"minrnn: error: [^\n]+\n", error), error
    return status, error


def test_a_run_acts(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["act", "run", "--episodes", "3", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    found = json.loads((run_dir / "acting.json").read_text())
    assert found["environment"] == "Pendulum-v1"
    assert found["lengths"] == [LIMIT] * 3
    assert found["mean_return"] == pytest.approx(np.mean(found["returns"]))
    assert found["spread"] == pytest.approx(np.std(found["returns"], ddof=1))
    assert (found["step"], found["checkpoint"], found["target_return"], found["score"]) == (
        7,
        "best",
        5.0,
        None,
    )
    assert said.count("time limit") == 3
    assert f"return {found['mean_return']:,.1f} ± {found['spread']:,.1f} over 3 episodes, target 5.0" in said
    assert main(["act", "run", "--episodes", "1", "--seed", "2", "--target-return", "-100"]) == 0
    found_again = json.loads((run_dir / "acting.json").read_text())
    assert found_again["target_return"] == -100
    assert "over 1 episode, target -100.0" in capsys.readouterr().out


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_from_data_to_actions(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(workplace / "cache"))
    write_pendulum_data()
    small = (
        "--model.d-model 8 --model.num-layers 1 --train.steps 4 --train.warmup-steps 1 --train.batch-size 4"
    )
    data = "--task.data local/Pendulum-v1-medium --train.device cpu --run run"
    assert main(["train", "decisions", *data.split(), *small.split()]) == 0
    said = capsys.readouterr().out
    assert "joined tokens, streams, 20 steps at a time, to reach a return of" in said
    assert re.search(r"squared error of an action at step 4; next: minrnn act run\n$", said)
    results = json.loads(Path("run", "results.json").read_text())
    assert main(["evaluate", "run", "--checkpoint", "last"]) == 0
    evaluation = json.loads(Path("run", "evaluation.json").read_text())
    assert evaluation["val_loss"] == pytest.approx(results["val_loss"], rel=1e-6)
    assert main(["act", "run", "--episodes", "1"]) == 0
    found = json.loads(Path("run", "acting.json").read_text())
    assert found["environment"] == "Pendulum-v1"
    assert found["lengths"] == [LIMIT]
    capsys.readouterr()
    for verb in ("sample", "demo"):
        assert main([verb, "run" if verb == "sample" else "decisions"]) == 2
        assert "text" in capsys.readouterr().err


def test_a_terminal_shows_a_table_that_moves(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from minrnn.cli import act

    box = io.StringIO()
    monkeypatch.setattr(act, "Output", lambda: Console(file=box, force_terminal=True, width=100))
    assert main(["act", "run", "--episodes", "2"]) == 0
    assert "..." in box.getvalue()  # an episode that goes on
    assert "time limit" in box.getvalue()


def test_mistakes_are_one_line(run_dir: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(workplace / "nameless", **PENDULUM | {"environment": None})
    write_run(workplace / "clone", **PENDULUM | {"tokens": "observation", "target_return": None})
    for args, message in (
        ("nowhere", "nowhere is not a run directory"),
        ("run --episodes 0", "--episodes must be 1 to 2147483648, got 0"),
        ("run --env Pendulm-v1", "got 'Pendulm-v1'; did you mean 'Pendulum-v1'"),
        ("run --env CartPole-v1", "observations of 3 numbers"),
        ("run --record film.avi", "--record must end in one of .gif, .mp4, .png, got film.avi"),
        ("nameless", "--env must be given"),
        ("clone --target-return 3", "target_return must be left out"),
        ("run --checkpoint last", "has no checkpoint 'last' yet"),
    ):
        status, error = error_of(capsys, *args.split())
        assert status == 2
        assert message in error
    assert not (run_dir / "acting.json").exists()
    assert main(["act", "clone", "--episodes", "1"]) == 0


def test_without_gymnasium_the_extra_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    status, error = error_of(capsys, "run")
    assert status == 1
    assert "pip install 'minrnn[rl]'" in error


def test_a_run_of_text_takes_no_actions(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "corpus.txt").write_text("some text, " * 50)
    tiny = "--task.source corpus.txt --task.window 8 --model.d-model 8 --model.num-layers 1 --train.steps 1"
    assert main(["train", "demo", "--run", "text", *tiny.split(), "--train.batch-size", "2"]) == 0
    capsys.readouterr()
    status, error = error_of(capsys, "text")
    assert status == 2
    assert "text must be a run of decisions" in error


# --- films -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_films_are_written(suffix: str, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio", reason="imageio is not installed: the extra rl")
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed: the extra video")
    film = Film(tmp_path / "films" / f"film{suffix}", rate=125.0)
    assert film.every == 5
    for shade in range(0, 250, 25):
        film.add(np.full((32, 48, 3), shade, np.uint8))
    film.write()
    pictures = [np.asarray(frame) for frame in imageio.v3.imiter(film.path)]
    if suffix == ".png":
        assert [frame.shape[:2] for frame in pictures] == [(32, 6 * 48)]
        shades = pictures[0][0, ::48, 0].tolist()
        assert shades == sorted(shades)
        assert (shades[0], shades[-1]) == (0, 225)
    else:
        assert len(pictures) == 10
        assert {frame.shape[:2] for frame in pictures} == {(32, 48)}


def test_the_first_episode_is_filmed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pictures as its steps ask for, of it alone."""
    from minrnn.cli import act

    pytest.importorskip("imageio", reason="imageio is not installed: the extra rl")
    taken: list[Any] = []
    monkeypatch.setattr(act, "make_filmed", make_environment)
    monkeypatch.setattr(act, "picture", lambda env: taken.append(env) or np.zeros((8, 8, 3), np.uint8))
    assert main(["act", "run", "--episodes", "3", "--record", "film.gif"]) == 0
    assert len(taken) == LIMIT - 1  # Pendulum has 30 steps a second; the last ends it
    assert len(set(map(id, taken))) == 1
    assert Path("film.gif").read_bytes().startswith(b"GIF")


def test_what_draws_without_a_screen_draws() -> None:
    if undrawn := cannot_draw():
        pytest.skip(undrawn)
    environment = make_filmed("InvertedPendulum-v5")
    environment.reset(seed=0)
    found = picture(environment)
    assert found.shape == (240, 240, 3)
    assert found.dtype == np.uint8
    assert len(np.unique(found)) > 5
    assert environment.spec is not None
    assert str(environment.spec.entry_point).startswith(MUJOCO)


@pytest.mark.parametrize("name", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
def test_the_camera_goes_along(name: str) -> None:
    if undrawn := cannot_draw():
        pytest.skip(undrawn)
    environment = make_filmed(name)
    assert environment.unwrapped.mujoco_renderer.camera_id >= 0  # type: ignore[attr-defined]
    environment.close()


def test_a_film_that_cannot_be_written_is_said_before_it_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minrnn.tasks import film

    with pytest.raises(ValueError, match=r"must end in one of .gif, .mp4, .png, got"):
        Film(tmp_path / "film", 30.0)
    monkeypatch.setattr(film, "find_spec", lambda name: None if name == "imageio_ffmpeg" else object())
    with pytest.raises(ImportError, match=r"minrnn\[video\]', or record a .gif"):
        Film(tmp_path / "film.mp4", 30.0)
    monkeypatch.setattr(film, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"minrnn\[rl\]"):
        Film(tmp_path / "film.gif", 30.0)


# --- what a step says -------------------------------------------------------------------------------------


class Both(Countdown):
    """Its last step is an end of both kinds."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen, reward, ends, _, more = super().step(action)
        return seen, reward, ends, ends, more


def test_a_policy_is_told_the_reward_of_each_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = Policy(build(observation_size=2, action_size=2)), []
    act = policy.act

    def noted(observation: Any, reward: Any, *, reset: Any) -> torch.Tensor:
        told.append((float(reward[0]), bool(reset[0])))
        return act(observation, reward, reset=reset)

    monkeypatch.setattr(policy, "act", noted)
    *_, played = play(policy, [Both()], 2, seed=2)
    assert [reward for reward, is_start in told if not is_start] == [1.0, 2.0, 1.0, 2.0, 3.0]
    assert [is_start for _, is_start in told] == [True, False, False, True, False, False, False]
    assert [episode.ended for episode in played] == [
        "terminated",
        "terminated",
    ]  # by the environment, first of all


def test_an_episode_may_be_as_long_as_the_table_of_times() -> None:
    check_fit(build(**PENDULUM, max_steps=LIMIT).config, make_environment("Pendulum-v1"))
    with pytest.raises(ValueError, match="end within 199 steps"):
        check_fit(build(**PENDULUM, max_steps=LIMIT - 1).config, make_environment("Pendulum-v1"))


@pytest.mark.parametrize(
    ("rate", "every", "milliseconds"), [(125.0, 5, 40), (30.0, 1, 33), (60.0, 2, 33), (10.0, 1, 100)]
)
def test_a_film_is_as_long_as_its_episode(rate: float, every: int, milliseconds: int, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio", reason="imageio is not installed: the extra rl")
    film = Film(tmp_path / "film.gif", rate)
    assert film.every == every
    for shade in range(0, 90, 30):
        film.add(np.full((8, 8, 3), shade, np.uint8))
    film.write()
    shown = imageio.v3.immeta(tmp_path / "film.gif")["duration"]
    assert shown == pytest.approx(milliseconds, abs=10)  # a GIF counts in hundredths of a second


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 3), (6, 6), (7, 6), (50, 6)])
def test_a_strip_has_each_of_a_few_frames_once(count: int, width: int, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio", reason="imageio is not installed: the extra rl")
    film = Film(tmp_path / "film.png", 25.0)
    for shade in range(count):
        film.add(np.full((4, 4, 3), shade, np.uint8))
    film.write()
    shades = imageio.v3.imread(tmp_path / "film.png")[0, ::4, 0].tolist()
    assert len(set(shades)) == len(shades) == width
    assert (shades[0], shades[-1]) == (0, count - 1)
