"""Recorded episodes: the form in memory, D4RL's and Minari's files, downloads by name, and what is "
"refused."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import requests
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from minrnn.tasks import downloads, locomotion
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.environments import make_environment
from minrnn.tasks.episodes import Episodes
from minrnn.tasks.locomotion import (
    D4RL_NAMES,
    REFERENCES,
    fetch_d4rl,
    find_episodes,
    minari_folder,
    normalized_score,
)
from minrnn.tasks.recordings import read_episodes, write_episodes

LENGTHS = (3, 1, 5, 4)
TERMINATED = (True, False, True, False)

Fields = dict[str, Any]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's folders, and the user's settings out of the tests."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("MINRNN_DATA", "MINRNN_D4RL_URL"):
        monkeypatch.delenv(name, raising=False)


def made_up(
    lengths: tuple[int, ...] = LENGTHS, terminated: tuple[bool, ...] = TERMINATED, seed: int = 0
) -> tuple[Episodes, np.ndarray]:
    """Return episodes of Hopper's sizes, and what was seen after each step: within an episode, the next "
    "row."""
    rng = np.random.default_rng(seed)
    steps, ends = sum(lengths), np.cumsum(lengths)
    observations = rng.standard_normal((steps, 11)).astype(np.float32)
    following = np.roll(observations, -1, axis=0)
    following[ends - 1] = rng.standard_normal((len(ends), 11))
    episodes = Episodes(
        observations,
        rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
        rng.standard_normal(steps).astype(np.float32),
        ends,
        np.array(terminated),
    )
    return episodes, following


def d4rl_fields(episodes: Episodes, following: np.ndarray) -> Fields:
    """Return the arrays of D4RL's files, with the other fields that those of version 2 have."""
    flags = np.zeros((2, len(episodes)), np.bool_)
    flags[0, episodes.ends[episodes.terminated] - 1] = True
    flags[1, episodes.ends[~episodes.terminated] - 1] = True
    return {
        "observations": episodes.observations,
        "next_observations": following,
        "actions": episodes.actions,
        "rewards": episodes.rewards,
        "terminals": flags[0],
        "timeouts": flags[1],
        "infos/qpos": np.zeros((len(episodes), 6)),
        "infos/action_log_probs": np.zeros(len(episodes)),
        "metadata/algorithm": np.bytes_("SAC"),
    }


def write(path: Path, fields: Fields) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values
    return path


def assert_equal(read: Episodes, written: Episodes) -> None:
    for name in ("observations", "actions", "rewards", "ends", "terminated"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name), err_msg=name)
    assert read.sha256 == written.sha256


# --- in memory -------------------------------------------------------------------------------------------


def test_returns_to_go_are_what_is_still_earned_in_the_episode() -> None:
    episodes, _ = made_up()
    to_go, expected = episodes.returns_to_go(), []
    for start, end in zip(episodes.starts, episodes.ends, strict=True):
        expected += [episodes.rewards[t:end].sum() for t in range(start, end)]
    np.testing.assert_allclose(to_go, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(to_go[episodes.starts], episodes.returns, rtol=1e-6, atol=1e-6)
    assert list(episodes.lengths) == list(LENGTHS)
    assert to_go.dtype == np.float32
    assert len(episodes) == sum(LENGTHS)


def test_the_digest_depends_on_every_array_and_the_description_on_the_origin() -> None:
    episodes, _ = made_up()
    digests = {episodes.sha256, replace(episodes, terminated=~episodes.terminated).sha256}
    digests.add(replace(episodes, ends=episodes.ends[1:], terminated=episodes.terminated[1:]).sha256)
    for name in ("observations", "actions", "rewards"):
        digests.add(replace(episodes, **{name: getattr(episodes, name) + 1}).sha256)
    assert len(digests) == 6
    said = replace(episodes, about={"source": "d4rl", "name": "hopper-medium-v2"}).describe()
    assert said.startswith(
        "hopper-medium-v2 (d4rl): 13 steps in 4 episodes, observations of 11, actions of 3, "
    )
    assert "\n" not in said


def test_discrete_actions_are_counted() -> None:
    episodes, _ = made_up()
    actions = np.arange(len(episodes)) % 3
    discrete = replace(episodes, actions=actions)
    assert discrete.is_discrete
    assert discrete.num_actions == 3
    assert replace(discrete, about={"num_actions": 5}).num_actions == 5
    assert "actions one of 3" in discrete.describe()
    with pytest.raises(ValueError, match="got discrete ones; use num_actions"):
        _ = discrete.action_size
    with pytest.raises(ValueError, match="got continuous ones; use action_size"):
        _ = episodes.num_actions


def at(index: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a change that puts a value somewhere into a copy of an array."""

    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[index] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "observations",
            at((4, 2), np.nan),
            r"observations must be finite, got nan at step 4, the first of 1 such",
        ),
        ("actions", at((0, 0), np.inf), r"actions must be finite, got inf at step 0,"),
        ("rewards", at(12, -np.inf), "rewards must be finite, got -inf at step 12"),
        ("observations", lambda a: a[:-1], "as many .* got 12 observations, 13 actions, 13 rewards"),
        ("actions", lambda a: a[:5], "got 13 observations, 5 actions, 13 rewards"),
        ("observations", lambda a: a.astype(np.float64), r"\(N, S\) of float32, got \(13, 11\) float64"),
        ("observations", lambda a: a[:, 0], r"\(N, S\) of float32, got \(13,\) float32"),
        ("observations", lambda a: a.tolist(), "got list"),
        ("observations", lambda a: a[:, :0], r"must be steps with .*\(13, 0\)"),
        ("actions", lambda a: a[:, 0], r"of int64, got \(13,\) float32"),
        ("actions", lambda a: -np.ones(13, np.int64), "must be at least 0, got -1"),
        ("ends", at(3, 12), r"increase from at least 1 to the number of steps, 13, got \[ 3  4  9 12\]"),
        ("ends", at(1, 3), "must increase"),
        ("ends", at(0, 0), "must increase"),
        ("ends", lambda a: a[:0], "each of the 0 ends"),
        ("terminated", lambda a: a[:2], "each of the 4 ends .* got 2 values"),
        ("terminated", lambda a: a.astype(np.int64), r"\(E,\) of bool"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    episodes, _ = made_up()
    with pytest.raises(ValueError, match=f"Episodes: .*{message}"):
        replace(episodes, **{name: change(getattr(episodes, name))})


# --- D4RL's layout ---------------------------------------------------------------------------------------


def test_d4rl_episodes_end_at_terminals_and_timeouts(tmp_path: Path) -> None:
    episodes, following = made_up()
    path = write(tmp_path / "hopper_medium-v2.hdf5", d4rl_fields(episodes, following))
    read = read_episodes(path)
    assert_equal(read, episodes)
    assert read.environment is None
    assert read.about == {"source": "file", "name": "hopper_medium-v2"}
    assert read_episodes(path, "Hopper-v5").environment == "Hopper-v5"


def test_a_step_that_is_both_terminal_and_timeout_is_terminated(tmp_path: Path) -> None:
    episodes, following = made_up()
    fields = d4rl_fields(episodes, following)
    fields["timeouts"] |= fields["terminals"]
    assert_equal(read_episodes(write(tmp_path / "a.hdf5", fields)), episodes)


@pytest.mark.parametrize("length", [1, 2])
def test_a_ragged_end_is_an_episode_that_was_cut_off(length: int, tmp_path: Path) -> None:
    episodes, following = made_up((3, length), (True, False))
    fields = d4rl_fields(episodes, following)
    fields["timeouts"][:] = False
    assert_equal(read_episodes(write(tmp_path / "a.hdf5", fields)), episodes)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_joined_files_are_the_episodes_of_both(is_ragged: bool, tmp_path: Path) -> None:
    """D4RL's medium-expert: one file's rows, then the other's, where the first may end in mid-episode."""
    medium, expert = (d4rl_fields(*made_up((4, 6), (True, False), seed=seed)) for seed in (1, 2))
    if is_ragged:
        medium["timeouts"][-1] = False
    joined = {name: np.concatenate([medium[name], expert[name]]) for name in medium if "metadata" not in name}
    read = read_episodes(write(tmp_path / "a.hdf5", joined))
    assert list(read.ends) == [4, 10, 14, 20]
    assert list(read.terminated) == [True, False, True, False]
    del joined["next_observations"]  # which alone says where a recording broke off
    assert list(read_episodes(write(tmp_path / "b.hdf5", joined)).ends) == (
        [4, 14, 20] if is_ragged else [4, 10, 14, 20]
    )


def test_next_observations_that_mean_something_else_cut_nothing(tmp_path: Path) -> None:
    episodes, following = made_up()
    fields = d4rl_fields(episodes, following)
    for other in (following * 2 + 1, following[:, :4]):
        fields["next_observations"] = other
        assert_equal(read_episodes(write(tmp_path / "a.hdf5", fields)), episodes)


def test_columns_of_one_and_numbers_for_flags_are_taken(tmp_path: Path) -> None:
    episodes, following = made_up()
    fields = d4rl_fields(episodes, following)
    for name in ("rewards", "terminals", "timeouts"):
        fields[name] = fields[name].astype(np.float64)[:, None]
    assert_equal(read_episodes(write(tmp_path / "a.hdf5", fields)), episodes)


def test_discrete_actions_are_read(tmp_path: Path) -> None:
    episodes, following = made_up()
    fields = d4rl_fields(episodes, following)
    fields["actions"] = (np.arange(len(episodes)) % 4).astype(np.uint8)
    read = read_episodes(write(tmp_path / "a.hdf5", fields))
    assert read.num_actions == 4
    assert read.actions.dtype == np.int64


@pytest.mark.parametrize("is_discrete", [False, True])
def test_what_is_written_is_read_again(is_discrete: bool, tmp_path: Path) -> None:
    episodes, following = made_up()
    name, about = "Hopper-v5", {"source": "local", "seed": 3, "noise": 0.2}
    if is_discrete:
        episodes = replace(episodes, actions=np.arange(len(episodes)) % 2)
        name, about = "CartPole-v1", {**about, "num_actions": 2}
    episodes = replace(episodes, environment=name, about=about)
    write_episodes(tmp_path / "a.hdf5", episodes, following)
    read = read_episodes(tmp_path / "a.hdf5")
    assert_equal(read, episodes)
    assert read.environment == name
    assert read.about == {"name": "a", **episodes.about}
    assert [path.name for path in tmp_path.glob("a*")] == ["a.hdf5"]
    with pytest.raises(ValueError, match=r"must have the shape of observations, \(13, 11\), got \(12, 11\)"):
        write_episodes(tmp_path / "a.hdf5", episodes, following[1:])


def without(name: str) -> Callable[[Fields], None]:
    return lambda fields: fields.pop(name)


def with_field(name: str, change: Callable[[Any], Any]) -> Callable[[Fields], None]:
    return lambda fields: fields.update({name: change(fields[name])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("terminals"),
            "observations, actions, rewards, terminals, timeouts must be there, got actions",
        ),
        (without("timeouts"), "must be there, got actions, infos"),
        (with_field("rewards", lambda a: a[:-1]), "13 steps each, got .*rewards 12"),
        (with_field("timeouts", lambda a: a[:3]), "timeouts 3"),
        (with_field("observations", at((5, 1), np.nan)), "observations must be finite, got .* at step 5"),
        (
            with_field("observations", lambda a: a[:, 0]),
            r"observations must be vectors, \(N, S\), got \(13,\)",
        ),
        (with_field("actions", lambda a: a.round().astype(int)), "several whole numbers may be choices or"),
        (
            with_field("rewards", lambda a: np.ones((13, 2))),
            r"rewards must hold one number a step, got \(13, 2\)",
        ),
        (with_field("actions", lambda a: np.full(13, b"left")), "actions must be numbers, got"),
        (
            lambda fields: [fields.update({name: fields[name][:0]}) for name in fields if "/" not in name],
            "steps",
        ),
    ],
)
def test_d4rl_files_with_faults_are_refused(
    damage: Callable[[Fields], None], message: str, tmp_path: Path
) -> None:
    fields = d4rl_fields(*made_up())
    damage(fields)
    path = write(tmp_path / "a.hdf5", fields)
    with pytest.raises(ValueError, match=rf"read_episodes: .*a\.hdf5: .*{message}"):
        read_episodes(path)


def test_what_is_no_hdf5_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", d4rl_fields(*made_up()))
    whole = path.read_bytes()
    for content in (b"", b"observations,actions\n", whole[: len(whole) // 2], whole[100:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.hdf5 must be a whole HDF5 file"):
            read_episodes(path)
    for missing, message in (("b.hdf5", "an existing file"), (".", r"a folder with data/main_data\.hdf5")):
        with pytest.raises(FileNotFoundError, match=message):
            read_episodes(tmp_path / missing)


# --- files from anywhere ---------------------------------------------------------------------------------


def alter(path: Path, change: Callable[[h5py.File], object]) -> Path:
    """Write a whole file in D4RL's layout, and change it."""
    write(path, d4rl_fields(*made_up()))
    with h5py.File(path, "a") as file:
        change(file)
    return path


def put(name: str, link: Any) -> Callable[[h5py.File], None]:
    """Put a link in a field's place."""

    def change(file: h5py.File) -> None:
        file.move(name, "elsewhere")
        file[name] = link

    return change


def make(name: str, *args: Any, **settings: Any) -> Callable[[h5py.File], None]:
    """Put a data set in a field's place, empty but for what the settings say."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, *args, **settings)

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((13, 11), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "observations", (13, 11))
    del file["observations"]
    file.create_virtual_dataset("observations", layout)


def plugin(file: h5py.File) -> None:
    """A filter that is none of HDF5's own, marked as optional, so that a file can be written without it."""
    del file["rewards"]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((13,))
    properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 0))  # blosc
    space = h5py.h5s.create_simple((13,))
    h5py.h5d.create(file.id, b"rewards", h5py.h5t.IEEE_F32LE, space, properties)


SECRET = "a private file of this machine, which is nobody's data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("observations", h5py.ExternalLink("other.hdf5", "observations")),
            r"/observations .* \(ExternalLink\)",
        ),
        (put("observations", h5py.SoftLink("/elsewhere")), r"/observations must lie .* \(SoftLink\)"),
        (put("next_observations", h5py.SoftLink("/nowhere")), r"/next_observations must lie .* \(SoftLink\)"),
        (
            make("observations", (13, 2), "u1", external=[("secret.txt", 0, h5py.h5f.UNLIMITED)]),
            "/observations must lie in the file itself, got numbers of another file",
        ),
        (virtual, "/observations must lie in the file itself, got numbers of another file"),
        (plugin, "/rewards is compressed by filter 32001 .* a plugin of HDF5 that is not installed"),
        (make("rewards", (13,), h5py.ref_dtype), "rewards must be numbers"),
        (make("rewards", (13,), h5py.regionref_dtype), "rewards must be numbers"),
        (make("rewards", (13,), h5py.vlen_dtype(np.float32)), "rewards must be numbers"),
        (make("rewards", (13,), h5py.string_dtype()), "rewards must be numbers"),
        (make("rewards", (13,), [("a", "f4"), ("b", "f4")]), "rewards must be numbers"),
        (make("rewards", (13,), ("f4", (2,))), "rewards must be numbers"),
        (make("rewards", (13,), "c8"), "rewards must be numbers, got complex64"),
        (make("rewards", data=h5py.Empty("f4")), "rewards must have an axis of steps"),
        (make("rewards", data=1.0), "rewards must have an axis of steps"),
        (make("observations", (10**12, 11), "f4", chunks=(1024, 11)), "declares 44,000,000,000,000 bytes"),
        (
            make("rewards", (10**9,), "f4", chunks=(1024,), compression="gzip"),
            "of which the file holds 0: more",
        ),
        (make("rewards", (13,), "f4", maxshape=(None,), chunks=(1 << 28,)), "declares 1,073,741,824 bytes"),
        (lambda file: file.attrs.update(about="{"), "attribute about is not valid JSON"),
        (lambda file: file.attrs.update(about="[]"), r"attribute about: it must be a table, got \[\]"),
        (
            lambda file: file.attrs.update(about='{"num_actions": "3"}'),
            "about: num_actions must be int, got '3'",
        ),
        (lambda file: file.attrs.update(about=np.zeros(3)), "attribute about must be text, got ndarray"),
        (lambda file: file.attrs.update(environment=7), "attribute environment must be text, got int64"),
    ],
)
def test_what_leads_out_of_a_file_or_is_more_than_it_holds_is_refused(
    change: Callable[[h5py.File], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.hdf5", d4rl_fields(*made_up()))
    (tmp_path / "secret.txt").write_text(SECRET)
    path = alter(tmp_path / "a.hdf5", change)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=rf"^read_episodes: .*a\.hdf5: .*{message}") as refused:
        read_episodes(path)
    assert "\n" not in str(refused.value)


def test_groups_of_other_files_are_refused_too(tmp_path: Path) -> None:
    minari_file(tmp_path / "other.hdf5", minari_fields())
    path = minari_file(tmp_path / "a.hdf5", minari_fields())
    with h5py.File(path, "a") as file:
        file["episode_1"] = h5py.ExternalLink("other.hdf5", "episode_0")
    with pytest.raises(ValueError, match=r"/episode_1 must lie in the file itself, got a link"):
        read_episodes(path)
    with h5py.File(path, "a") as file:
        del file["episode_1"]
        file["episode_1"] = np.zeros(3)
    with pytest.raises(ValueError, match="/episode_1 must be a group, got an array"):
        read_episodes(path)


def test_many_names_of_one_array_are_counted_each_time(tmp_path: Path) -> None:
    """A small file may name a compressed array as often as it likes."""
    fields = minari_fields(1 << 18)
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file.create_dataset(f"episode_0/{name}", data=values, compression="gzip", compression_opts=9)
        for number in range(1, 1000):
            file[f"episode_{number}"] = file["episode_0"]
    with pytest.raises(ValueError, match="more than compression can explain"):
        read_episodes(path)


def test_what_compresses_well_and_what_was_never_written_is_read(tmp_path: Path) -> None:
    episodes, following = made_up((1 << 16,), (True,))
    still = {name: np.zeros_like(getattr(episodes, name)) for name in ("observations", "actions", "rewards")}
    episodes = replace(episodes, **still)
    write_episodes(tmp_path / "a.hdf5", episodes, following * 0)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["timeouts"]
        file.create_dataset("timeouts", (1 << 16,), np.bool_, chunks=True)  # all False
    assert_equal(read_episodes(tmp_path / "a.hdf5"), episodes)


def test_a_file_that_is_being_written_is_locked_not_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", d4rl_fields(*made_up()))
    code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'a'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(BlockingIOError, match=r"a\.hdf5 is locked by a process that writes it; wait"):
            read_episodes(path)
        writer.communicate()
    assert len(read_episodes(path)) == 13


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[]", r"metadata.json: it must be a table, got \[\]"),
        ("{", "metadata.json is not valid JSON"),
        ('{"dataset_id": 3}', "metadata.json: dataset_id must be str, got 3"),
        ('{"env_spec": "["}', "metadata.json: env_spec is not valid JSON"),
        ('{"env_spec": {}}', "metadata.json: env_spec must be str"),
        ('{"env_spec": "{\\"id\\": []}"}', r"metadata.json: env_spec: id must be str, got \[\]"),
        ('{"action_space": "3"}', "metadata.json: action_space: its text: it must be a table, got 3"),
        ('{"action_space": "{}"}', "metadata.json: action_space: type must be str, got None"),
        (
            '{"action_space": "{\\"type\\": \\"Discrete\\", \\"n\\": 1e9}"}',
            "metadata.json: action_space: n must be int",
        ),
        (
            '{"action_space": "{\\"type\\": \\"Discrete\\", \\"n\\": 1000000000000}"}',
            "action_space: there must be at least one action and at most 65536 choices",
        ),
        ('{"action_space": "{\\"type\\": \\"Box\\"}"}', "metadata.json: action_space: shape must be a list"),
    ],
)
def test_minaris_metadata_is_read_strictly(metadata: str, message: str, tmp_path: Path) -> None:
    path = minari_file(tmp_path / "main_data.hdf5", minari_fields())
    path.with_name("metadata.json").write_text(metadata)
    with pytest.raises(ValueError, match=message):
        read_episodes(path)


def test_damage_anywhere_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    episodes, following = made_up()
    whole = write(tmp_path / "a.hdf5", d4rl_fields(episodes, following)).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(len(whole), size=5):
            damaged[place] = random.integers(256)
        (tmp_path / "a.hdf5").write_bytes(damaged)
        try:
            read_episodes(tmp_path / "a.hdf5")
        except ValueError:
            refused += 1
    assert refused > 5


# --- Minari's layout -------------------------------------------------------------------------------------


def minari_buffers(episodes: Episodes, following: np.ndarray) -> list[EpisodeBuffer]:
    buffers = []
    for start, end, terminated in zip(episodes.starts, episodes.ends, episodes.terminated, strict=True):
        flags = np.zeros(end - start, np.bool_)
        flags[-1] = True
        seen = np.concatenate([episodes.observations[start:end], following[end - 1 : end]])
        buffers.append(
            EpisodeBuffer(
                observations=list(seen.astype(np.float64)),
                actions=list(episodes.actions[start:end]),
                rewards=list(episodes.rewards[start:end].astype(np.float64)),
                terminations=list(flags & terminated),
                truncations=list(flags & ~terminated),
            )
        )
    return buffers


def write_minari(name: str, episodes: Episodes, following: np.ndarray, action_space: spaces.Space) -> Path:
    """Write a data set with Minari's own writer, and return its folder."""
    minari.create_dataset_from_buffers(
        dataset_id=name,
        buffer=minari_buffers(episodes, following),
        env="Hopper-v5",
        algorithm_name="made up",
        action_space=action_space,
        observation_space=spaces.Box(-np.inf, np.inf, (11,), np.float64),
        author="somebody",
        author_email="nobody@nowhere",
        code_permalink="none",
        description="made up",
    )
    return minari_folder(name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_data_sets_are_read_by_id_folder_and_file() -> None:
    lengths = (2, 3, 1, 4, 2, 2, 1, 1, 1, 2, 3, 1)  # more than ten: groups are in the order of their numbers
    episodes, following = made_up(lengths, tuple(length > 1 for length in lengths))
    folder = write_minari("mujoco/hopper/made-up-v0", episodes, following, spaces.Box(-1, 1, (3,)))
    for source in ("mujoco/hopper/made-up-v0", folder, folder / "data", folder / "data" / "main_data.hdf5"):
        read = find_episodes(str(source))
        assert_equal(read, episodes)
        assert read.environment == "Hopper-v5"
        assert read.about == {
            "source": "minari", "name": "mujoco/hopper/made-up-v0", "algorithm": "made up"
        }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_says_how_many_discrete_actions_there_are() -> None:
    episodes, following = made_up()
    episodes = replace(episodes, actions=np.arange(len(episodes)) % 2)
    write_minari("discrete-v0", episodes, following, spaces.Discrete(6))
    read = find_episodes("discrete-v0")
    assert_equal(read, episodes)
    assert read.num_actions == 6


def minari_fields(steps: int = 3) -> Fields:
    return {
        "observations": np.zeros((steps + 1, 2)),
        "actions": np.zeros((steps, 1)),
        "rewards": np.zeros(steps),
        "terminations": np.zeros(steps, np.bool_),
        "truncations": np.zeros(steps, np.bool_),
    }


def minari_file(path: Path, *groups: Fields) -> Path:
    named = {
        f"episode_{i}/{name}": values for i, group in enumerate(groups) for name, values in group.items()
    }
    return write(path, named)


def test_a_minari_file_alone_is_enough_and_episodes_without_steps_are_left_out(tmp_path: Path) -> None:
    path = minari_file(tmp_path / "a.hdf5", minari_fields(), minari_fields(0), minari_fields(2))
    read = read_episodes(path)
    assert list(read.ends) == [3, 5]
    assert not read.terminated.any()
    assert read.environment is None
    assert read.about == {"source": "minari", "name": "a"}
    with pytest.raises(ValueError, match="there must be episodes with steps, got none"):
        read_episodes(minari_file(tmp_path / "b.hdf5", minari_fields(0)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("truncations"), "/episode_1: the fields .* truncations must be there"),
        (with_field("observations", lambda a: a[:-1]), "3 steps each, got .*observations less the last 2"),
        (with_field("rewards", lambda a: a[:-1]), "/episode_1: .* rewards 2"),
        (with_field("observations", lambda a: np.zeros(4)), r"must be vectors, \(T \+ 1, S\), got \(4,\)"),
        (
            with_field("observations", lambda a: np.zeros((4, 5))),
            r"one size in all episodes, got \(2,\), \(5,\)",
        ),
        (with_field("actions", lambda a: np.zeros(3, np.int64)), r"actions must be of one size"),
        (with_field("observations", at((1, 1), np.nan)), "observations must be finite, got .* at step 4"),
    ],
)
def test_minari_files_with_faults_are_refused(
    damage: Callable[[Fields], None], message: str, tmp_path: Path
) -> None:
    fields = minari_fields()
    damage(fields)
    path = minari_file(tmp_path / "a.hdf5", minari_fields(), fields)
    with pytest.raises(ValueError, match=rf"read_episodes: .*a\.hdf5: .*{message}"):
        read_episodes(path)


def test_observations_in_parts_are_refused(tmp_path: Path) -> None:
    fields = minari_fields()
    for name in ("goal", "achieved"):
        fields[f"observations/{name}"] = fields["observations"]
    del fields["observations"]
    with pytest.raises(ValueError, match="observations must be one array, got the parts achieved, goal"):
        read_episodes(minari_file(tmp_path / "a.hdf5", fields))


# --- by name ---------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path on this machine, all of it or, as a connection that breaks, `sent` "
    "bytes."""

    content = b""
    sent: int | None = None
    tells_length = True
    moved = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/folder"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.moved and not self.path.endswith("?moved"):
            self.send_response(302)
            self.send_header("Location", f"{self.path}?moved")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.sent])

    def log_message(self, *arguments: object) -> None:
        """Keep the tests quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of a Hopper file in D4RL's layout, larger than what is fetched at once."""
    episodes, following = made_up((4, 3000), (True, False))
    fields = {**d4rl_fields(episodes, following), "infos/noise": np.random.default_rng(0).random(400_000)}
    with Server() as running:
        running.content = write(tmp_path / "served.hdf5", fields).read_bytes()
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))  # seconds between looks
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def cached_files() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file())


def pin(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Let this be what D4RL's file of the name holds."""
    monkeypatch.setitem(locomotion.D4RL_SHA256, name, hashlib.sha256(content).hexdigest())


def test_d4rl_files_are_downloaded_once_and_labelled(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch, "hopper-medium-replay-v2", server.content)
    monkeypatch.setenv("MINRNN_D4RL_URL", server.url)
    for _ in range(2):
        read = find_episodes("hopper-medium-replay-v2")
        assert list(read.ends) == [4, 3004]
        assert read.environment == "Hopper-v4"
        assert read.about == {"source": "d4rl", "name": "hopper-medium-replay-v2"}
    assert server.paths == ["/folder/hopper_medium_replay-v2.hdf5"]
    assert cached_files() == ["hopper_medium_replay-v2.hdf5"]


def test_a_supplied_d4rl_file_needs_no_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supplied = tmp_path / "data" / "hopper_expert-v2.hdf5"
    write(supplied, d4rl_fields(*made_up()))
    monkeypatch.setenv("MINRNN_DATA", str(supplied.parent))
    with pytest.raises(
        ValueError, match=r"fetch_d4rl: .*hopper_expert-v2.hdf5 must be D4RL's hopper-expert-v2"
    ):
        fetch_d4rl("hopper-expert-v2", server.url)
    pin(monkeypatch, "hopper-expert-v2", supplied.read_bytes())
    assert fetch_d4rl("hopper-expert-v2", server.url) == supplied.resolve()
    assert server.paths == []


@pytest.mark.parametrize("tells_length", [True, False])
def test_half_a_file_is_never_taken_for_whole(
    tells_length: bool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks leaves nothing, whether or not the server had said how much there would be."""
    pin(monkeypatch, "hopper-random-v2", server.content)
    server.sent, server.tells_length = len(server.content) // 2, tells_length
    with pytest.raises((OSError, ValueError), match=r"cannot download|SHA256 hash of downloaded file"):
        fetch_d4rl("hopper-random-v2", server.url)
    assert cached_files() == []
    server.sent = None
    assert len(read_episodes(fetch_d4rl("hopper-random-v2", server.url))) == 3004
    assert cached_files() == ["hopper_random-v2.hdf5"]


def test_a_download_that_is_something_else_is_not_kept(server: Server) -> None:
    for content in (server.content, b"<html>no such file</html>"):
        server.content = content
        with pytest.raises(ValueError, match=r"SHA256 hash of downloaded file \(hopper_random-v2"):
            fetch_d4rl("hopper-random-v2", server.url)
    assert cached_files() == []


def test_every_d4rl_file_has_its_own_digest_and_comes_by_https() -> None:
    names = [
        f"{environment}-{quality}-v2"
        for environment in REFERENCES
        for quality in ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
    ]
    assert sorted(D4RL_NAMES) == sorted(names)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in locomotion.D4RL_SHA256.values())
    assert len(set(locomotion.D4RL_SHA256.values())) == len(names)
    assert locomotion.D4RL_URL.startswith("https://")


@pytest.mark.parametrize(
    ("url", "location", "refused"),
    [
        ("https://a.org/file", "http://a.org/file", True),
        ("https://a.org/file", "http://b.org/file", True),
        ("https://a.org/file", "//b.org/file", False),
        ("https://a.org/file", "/elsewhere", False),
        ("https://a.org/file", "https://b.org/file", False),
        ("http://127.0.0.1/file", "http://127.0.0.1/other", False),  # a mirror's own choice
    ],
)
def test_from_https_nothing_leads_back_to_http(url: str, location: str, refused: bool) -> None:
    answer = requests.Response()
    answer.status_code, answer.url = 302, url
    answer.headers["location"] = location
    refuses = pytest.raises(OSError, match="not encrypted") if refused else contextlib.nullcontext()
    with refuses:
        downloads._refuse_downgrade(answer)


def test_redirections_are_looked_at(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer on the way is shown to what refuses some."""
    seen: list[str] = []
    monkeypatch.setattr(downloads, "_refuse_downgrade", lambda answer, **_: seen.append(answer.url))
    pin(monkeypatch, "hopper-random-v2", server.content)
    server.moved = True
    fetch_d4rl("hopper-random-v2", server.url)
    assert [url.rsplit("/", 1)[1] for url in seen] == ["hopper_random-v2.hdf5", "hopper_random-v2.hdf5?moved"]


def test_without_a_network_the_error_says_where_to_put_the_file() -> None:
    with Server() as closed:
        url = closed.url
    message = (
        r"fetch_d4rl: cannot download http://127.* put the file, named hopper_medium-v2\.hdf5, .* MINRNN_DATA"
    )
    with pytest.raises(OSError, match=message):
        fetch_d4rl("hopper-medium-v2", url)
    assert cached_files() == []


def test_names_are_checked_and_the_nearest_is_named() -> None:
    assert len(D4RL_NAMES) == 18
    with pytest.raises(ValueError, match="got 'hoper-medium-v2'; did you mean 'hopper-medium-v2'"):
        find_episodes("hoper-medium-v2")
    with pytest.raises(ValueError, match=r"got 'pen/human-v2'.*; Minari's .* looked for in .*minari"):
        find_episodes("pen/human-v2")
    with pytest.raises(ValueError, match="got 'antmaze-umaze-v2'"):
        fetch_d4rl("antmaze-umaze-v2")


@pytest.mark.parametrize("name", REFERENCES)
def test_scores_are_0_for_random_and_100_for_the_expert(name: str) -> None:
    reference = REFERENCES[name]
    for environment in (reference.environment, f"{name}-medium-v2", name):
        assert normalized_score(environment, reference.random) == 0
        assert normalized_score(environment, reference.expert) == pytest.approx(100)
        assert normalized_score(environment, (reference.expert + reference.random) / 2) == pytest.approx(50)
    assert normalized_score("Ant-v5", 1000) is None


@pytest.mark.parametrize("name", REFERENCES)
def test_references_fit_the_environments(name: str) -> None:
    reference = REFERENCES[name]
    for environment in (reference.environment, reference.environment.replace("v4", "v5")):
        made = make_environment(environment)
        assert made.observation_space.shape == (reference.observation_size,)
        assert made.action_space.shape == (reference.action_size,)
        made.close()


# --- what is not there -----------------------------------------------------------------------------------


def test_environments_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="got 'Hoper-v5'; did you mean 'Hopper-v5'"):
        make_environment("Hoper-v5")
    with pytest.raises(ValueError, match="got 'no name!'"):
        make_environment("no name!")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> None:
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gymnasium, "make", lacking)
    with pytest.raises(ImportError, match=r"Hopper-v5 needs .*MuJoCo.* pip install 'minrnn\[rl\]'"):
        make_environment("Hopper-v5")
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # as if it were not installed
    with pytest.raises(
        ImportError, match=r"needs gymnasium, which is not installed; .* pip install 'minrnn\[rl\]'"
    ):
        make_environment("Hopper-v5")
    path = write(tmp_path / "a.hdf5", d4rl_fields(*made_up()))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"read_episodes: .* need h5py, .* pip install 'minrnn\[rl\]'"):
        read_episodes(path)


def test_returns_to_go_are_summed_in_double_precision() -> None:
    large = float(1 << 24)  # 1 less than the first whole number that float32 leaves out
    rewards = np.array([1, 1, 1, 1, large], np.float32)
    vectors = np.ones((5, 1), np.float32)
    episodes = Episodes(vectors, vectors, rewards, np.array([5]), np.array([True]))
    assert episodes.returns_to_go()[0] == large + 4
    assert episodes.returns[0] == large + 4
