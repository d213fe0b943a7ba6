"""Other people's environments: actions of every form are learnt and acted in the environment's own, or
refused when the data are read, with what to do."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="h5py is not installed: the extra rl")
gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: the extra rl")

from gymnasium import spaces  # noqa: E402 - after the skip

from minrnn.cli.main import main  # noqa: E402
from minrnn.tasks import environments  # noqa: E402
from minrnn.tasks.environments import known_actions, make_environment  # noqa: E402
from minrnn.tasks.locomotion import local_name, local_path  # noqa: E402
from minrnn.tasks.recordings import read_episodes, write_episodes  # noqa: E402
from minrnn.tasks.spaces import ActionSpace  # noqa: E402

STEPS, EPISODES = 6, 8
TRAIN = (
    "--train.steps 2 --train.warmup-steps 1 --train.batch-size 2 --task.window 4 --model.d-model 8 "
    "--model.num-layers 1 --train.device cpu"
)


class Room(gymnasium.Env[Any, Any]):
    """An episode of a few steps, with the action space that it is given; it takes no action of another."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, space: spaces.Space[Any], integers: bool = False) -> None:
        self.action_space = space
        if integers:
            self.observation_space = spaces.Box(0, 9, (3,), np.int64)

    def _seen(self) -> Any:
        return self.np_random.integers(0, 10, 3).astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = STEPS
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), (self.action_space, action)
        self.left -= 1
        return self._seen(), 1.0, self.left == 0, False, {}


SUPPORTED = {
    "choices": spaces.Discrete(3),
    "below": spaces.Discrete(3, start=-1),
    "above": spaces.Discrete(3, start=5),
    "one-of": spaces.MultiDiscrete([4]),
    "one-of-above": spaces.MultiDiscrete([4], start=[2]),
    "one-bit": spaces.MultiBinary(1),
    "numbers": spaces.Box(-1, 1, (2,)),
    "wide": spaces.Box(np.array([-5.0, 0.0]), np.array([-4.0, 100.0]), dtype=np.float64),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "matrix": spaces.Box(-1, 1, (2, 3)),
    "number": spaces.Box(-1, 1, ()),
    "column": spaces.Box(-1, 1, (1,)),
    "whole-numbers": spaces.Box(-3, 7, (2,), np.int64),
    "whole-number": spaces.Box(0, 9, (1,), np.int32),
}
REFUSED = {
    "several": spaces.MultiDiscrete([3, 4]),
    "bits": spaces.MultiBinary(3),
    "parts": spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(-1, 1, (2,))}),
    "pair": spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]),
}
ALL = SUPPORTED | REFUSED


@pytest.fixture(autouse=True, scope="module")
def rooms() -> Any:
    for name, space in ALL.items():
        gymnasium.register(f"rooms/{name}-v0", lambda space=space, **options: Room(space, **options))
    yield
    for name in ALL:
        del gymnasium.registry[f"rooms/{name}-v0"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def record(path: Path, name: str, as_column: bool = False, environment: str | None = "") -> Path:
    """Record random actions in an environment, as a stranger's script would: whatever the space samples."""
    environment = f"rooms/{name}-v0" if environment == "" else environment
    room, seen, done = Room(ALL[name]), [], []
    room.action_space.seed(0)
    for number in range(EPISODES):
        observation, _ = room.reset(seed=number)
        for _ in range(STEPS):
            seen.append(observation)
            done.append(room.action_space.sample())
            observation, *_ = room.step(done[-1])
    flags = np.zeros(len(seen), bool)
    flags[STEPS - 1 :: STEPS] = True
    if isinstance(done[0], dict):
        done = [np.concatenate([np.atleast_1d(part) for part in action.values()]) for action in done]
    actions = np.array(done)
    with h5py.File(path, "w") as file:
        file["observations"], file["rewards"] = np.array(seen), np.ones(len(seen))
        file["actions"] = actions.reshape(len(actions), -1) if as_column else actions
        file["terminals"], file["timeouts"] = flags, np.zeros_like(flags)
        if environment is not None:
            file.attrs["environment"] = environment
    return path


@pytest.mark.parametrize("name", SUPPORTED)
def test_actions_of_every_form_are_learnt_and_acted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = ActionSpace.from_gymnasium(SUPPORTED[name])
    episodes = read_episodes(record(tmp_path / "a.hdf5", name))
    assert read_episodes(record(tmp_path / "b.hdf5", name, as_column=True)).sha256 == episodes.sha256
    assert episodes.is_discrete == space.discrete
    assert (episodes.num_actions if space.discrete else episodes.action_size) == space.size
    assert main(["train", "decisions", "--task.data", "a.hdf5", "--run", "run", *TRAIN.split()]) == 0
    assert main(["act", "run", "--episodes", "2"]) == 0  # the room takes no action that is not its own
    assert json.loads(Path("run", "acting.json").read_text())["lengths"] == [STEPS] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_policy_takes_is_refused_when_it_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "a.hdf5", name)
    with pytest.raises(ValueError, match=r"a.hdf5: .* wrap the environment so that it takes one of these"):
        read_episodes(path)
    assert main(["train", "decisions", "--task.data", "a.hdf5", "--run", "run", *TRAIN.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_an_environment_several_whole_numbers_are_refused_and_one_is_a_choice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several whole numbers may be choices or numbers, got .* int64"):
        read_episodes(record(tmp_path / "a.hdf5", "several", environment=None))
    for as_column in (False, True):
        assert read_episodes(record(tmp_path / "a.hdf5", "choices", as_column, None)).num_actions == 3
        assert read_episodes(record(tmp_path / "a.hdf5", "number", as_column, None)).action_size == 1
    path = record(tmp_path / "a.hdf5", "below", environment=None)
    with pytest.raises(ValueError, match=r"numbered from 0 .* got -1 to 1; .* task.environment"):
        read_episodes(path)
    assert read_episodes(path, "rooms/below-v0").num_actions == 3
    with pytest.raises(ValueError, match=r"must be one of 3 choices, 5 to 7, .* got -1 to 1"):
        read_episodes(path, "rooms/above-v0")
    with pytest.raises(ValueError, match="must be 2 numbers, as the environment takes"):
        read_episodes(path, "rooms/numbers-v0")


def test_choices_that_start_elsewhere_are_written_as_they_were(tmp_path: Path) -> None:
    episodes = read_episodes(record(tmp_path / "a.hdf5", "below"))
    assert episodes.about["first_action"] == -1
    write_episodes(tmp_path / "b.hdf5", episodes, episodes.observations)
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert file["actions"][()].min() == -1
    again = read_episodes(tmp_path / "b.hdf5")
    assert again.sha256 == episodes.sha256
    assert again.num_actions == 3


@pytest.mark.parametrize(
    ("space", "values", "expected"),
    [
        ({"type": "Discrete", "n": 3, "start": -1}, np.array([-1, 0, 1]), [0, 1, 2]),
        ({"type": "Discrete", "n": 5, "start": 2}, np.array([[2], [4], [6]]), [0, 2, 4]),
        ({"type": "MultiDiscrete", "nvec": [3], "start": [0]}, np.array([[2], [0], [1]]), [2, 0, 1]),
        ({"type": "Discrete", "n": 3, "start": 0}, np.array([0.0, 2.0, 1.0]), [0, 2, 1]),
        (
            {"type": "Box", "shape": [2], "dtype": "int64"},
            np.arange(6).reshape(3, 2),
            [[0, 1], [2, 3], [4, 5]],
        ),
        ({"type": "Box", "shape": []}, np.zeros(3), [[0], [0], [0]]),
        ({"type": "Box", "shape": [1]}, np.zeros(3, int), [[0], [0], [0]]),
        ({"type": "MultiDiscrete", "nvec": [3, 2], "start": [0, 0]}, np.zeros((3, 2), int), "MultiDiscrete"),
        ({"type": "MultiBinary", "n": 2}, np.zeros((3, 2), np.int8), "MultiBinary"),
        ({"type": "Dict", "subspaces": {}}, np.zeros((3, 2)), "Dict"),
        ({"type": "Text", "max_length": 3}, np.zeros((3, 2)), "Text"),
        ({"type": "Discrete", "n": 3, "start": 0}, np.array([0.0, 0.5, 1.0]), "got fractions"),
        ({"type": "Discrete", "n": 3, "start": 0}, np.array([0, 3, 1]), "one of 3 choices, .* got 0 to 3"),
        ({"type": "Discrete", "n": 3, "start": 0}, np.zeros((3, 2)), r"one of 3 choices, .* got \(3, 2\)"),
        ({"type": "Box", "shape": [2]}, np.zeros((3, 3)), r"2 numbers, .* got \(3, 3\)"),
    ],
)
def test_what_minari_says_of_actions_counts(
    space: dict[str, Any], values: np.ndarray, expected: Any, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        file["episode_0/observations"], file["episode_0/actions"] = np.zeros((4, 2)), values
        for name in ("rewards", "terminations", "truncations"):
            file[f"episode_0/{name}"] = np.zeros(3)
    (tmp_path / "metadata.json").write_text(json.dumps({"action_space": json.dumps(space)}))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_episodes(tmp_path / "main_data.hdf5")
    else:
        episodes = read_episodes(tmp_path / "main_data.hdf5")
        assert episodes.actions.tolist() == expected
        assert episodes.is_discrete == (space["type"] != "Box")


@pytest.mark.parametrize(
    ("observations", "message"),
    [(np.zeros((48, 8, 8, 3), np.uint8), r"\(N, S\)"), (np.zeros(48, np.int64), r"\(N, S\)")],
)
def test_observations_that_are_no_vectors_are_refused_when_they_are_read(
    observations: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = record(tmp_path / "a.hdf5", "choices")
    with h5py.File(path, "a") as file:
        del file["observations"]
        file["observations"] = observations
    with pytest.raises(ValueError, match=rf"{message}.*FlattenObservation"):
        read_episodes(path)


def test_observations_of_whole_numbers_are_learnt_and_acted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "a.hdf5", "choices")
    with h5py.File(path, "a") as file:
        whole = file["observations"][()].astype(np.int64)
        del file["observations"]
        file["observations"] = whole
    assert main(["train", "decisions", "--task.data", "a.hdf5", "--run", "run", *TRAIN.split()]) == 0
    assert main(["act", "run", "--episodes", "1"]) == 0


def test_the_environment_that_the_user_names_must_take_what_was_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "a.hdf5", "numbers", environment=None)
    for name, message in (
        ("rooms/matrix-v0", "actions must be 6 numbers, as the environment takes, got"),
        ("rooms/choices-v0", "actions must be one of 3 choices, as the environment takes, got"),
        ("rooms/parts-v0", "rooms/parts-v0: actions are of the space Dict"),
        ("rooms/numbres-v0", "did you mean 'rooms/numbers-v0'"),
    ):
        args = ["--task.data", "a.hdf5", "--task.environment", name, "--run", "run", *TRAIN.split()]
        assert main(["train", "decisions", *args]) == 2
        assert message in capsys.readouterr().err


# --- ids that name a module ------------------------------------------------------------------------------

MODULE = """
import gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv
gymnasium.register("small/Pendulum-v0", PendulumEnv, max_episode_steps=20)
"""


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An id whose module registers it when it is imported."""
    package = tmp_path / "elsewhere" / "strangers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "small.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(package.parent))
    yield "strangers.small:small/Pendulum-v0"
    for module in ("strangers", "strangers.small"):
        sys.modules.pop(module, None)
    gymnasium.registry.pop("small/Pendulum-v0", None)


def test_ids_that_name_a_module_work_in_every_verb(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["make-data", named, "--quality", "random", "--steps", "100"]
    assert main(made) == 0
    assert "task.data local/strangers.small-small-Pendulum-v0-random" in capsys.readouterr().out
    source = local_name(named, "random")
    assert local_path(source).name == "strangers.small-small-Pendulum-v0-random.hdf5"
    run = ["--run", "run", *TRAIN.split()]
    assert main(["train", "decisions", "--task.data", source, *run]) == 0
    assert main(["act", "run", "--episodes", "1"]) == 0
    assert json.loads(Path("run", "acting.json").read_text())["environment"] == named
    run[1] = "other"
    assert main(["train", "decisions", "--task.data", source, "--task.environment", named, *run]) == 0
    assert main(["act", "other", "--env", named, "--episodes", "1"]) == 0


def test_the_module_must_be_there_and_data_have_none_imported(named: str) -> None:
    with pytest.raises(ImportError, match=r"strangers.none:A-v0 needs .*No module named .*PYTHONPATH=[.]"):
        make_environment("strangers.none:A-v0")
    assert known_actions(named, by_user=False) is None
    assert "strangers.small" not in sys.modules
    assert known_actions(named, by_user=True) == ActionSpace(False, 1)
    assert known_actions(named, by_user=False) == ActionSpace(False, 1)  # it is here now
    with pytest.raises(ValueError, match=r"got 'strangers.small:small/Pendulm-v0'; did you mean 'small/P"):
        make_environment("strangers.small:small/Pendulm-v0")


@pytest.mark.parametrize("name", ["a/b/../../c-v0", "a:b/c-v0", "a\\b-v0", "ä ö-v0", "x" * 10])
def test_names_made_from_ids_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    made = local_name(name, "random")
    assert made.count("/") == 1
    assert local_path(made).resolve().parent == (tmp_path / "cache" / "local").resolve()


@pytest.mark.parametrize("name", ["one-bit", "matrix", "unbounded", "whole-numbers", "choices", "parts"])
def test_make_data_says_which_actions_it_cannot_train(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-data", f"rooms/{name}-v0", "--quality", "random"]) == 2
    assert "actions must be continuous" in (error := capsys.readouterr().err) or "must be vectors" in error


def test_too_many_choices_are_no_actions() -> None:
    with pytest.raises(ValueError, match="at most 65536 choices"):
        ActionSpace(True, 10**12)


def test_the_environment_that_the_user_names_has_as_many_actions_as_the_data_say(tmp_path: Path) -> None:
    record(tmp_path / "a.hdf5", "choices")
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        about = json.loads(file.attrs.get("about", "{}")) | {"num_actions": 4}
        file.attrs["about"] = json.dumps(about)
    with pytest.raises(
        ValueError, match="actions are one of 4 choices, but rooms/choices-v0 takes one of 3 choices"
    ):
        read_episodes(tmp_path / "a.hdf5", "rooms/choices-v0")


@pytest.mark.parametrize(("number", "expected"), [(1.7, 2), (-0.6, -1), (9.0, 3), (-9.0, -2)])
def test_whole_numbers_are_the_nearest_within_bounds(number: float, expected: int) -> None:
    box = gymnasium.spaces.Box(-2, 3, (2, 1), np.int64)
    done = ActionSpace.from_gymnasium(box).to_environment(np.array([number, 0.0]), box)
    assert (done.tolist(), done.dtype) == ([[expected], [0]], np.int64)
    assert box.contains(done)


@pytest.mark.parametrize("is_supported", [True, False])
def test_an_environment_that_was_asked_for_its_actions_is_closed(
    is_supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Room:
        action_space = gymnasium.spaces.Discrete(3) if is_supported else gymnasium.spaces.Dict({})

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(environments, "make_environment", lambda _: Room())
    expected = (
        contextlib.nullcontext() if is_supported else pytest.raises(ValueError, match="of the space Dict")
    )
    with expected:
        assert environments.known_actions("any", by_user=True) == ActionSpace(True, 3)
    assert closed == [True]
