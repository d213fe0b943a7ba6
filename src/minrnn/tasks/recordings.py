"""Episodes on disk: D4RL's flat HDF5 files and Minari's, one group for each episode, through h5py alone.

D4RL (Fu et al., arXiv 2004.07219) keeps one row for each step in `observations`, `actions`, `rewards`,
`terminals` and `timeouts`; an episode ends where one of the two flags is set. Minari keeps `episode_0`,
`episode_1` and so on, each with T actions, rewards, terminations and truncations and T + 1 observations, of
which the last, on which nothing was done, is left out here; `metadata.json` beside the file names the
environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minrnn.files import behind_link
from minrnn.tasks.environments import INSTALL
from minrnn.tasks.episodes import Episodes

if TYPE_CHECKING:
    import h5py

D4RL_FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")
MINARI_FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")
MINARI_FILE, MINARI_METADATA = "main_data.hdf5", "metadata.json"

COMPARED_STEPS = 1 << 16  # rows that are compared at once, so that no copies of a large file are made
COMPRESSED_STEPS = 4096  # rows that are compressed together, 176 KiB of Hopper's observations


def read_episodes(path: str | Path, environment: str | None = None) -> Episodes:
    """Read recorded episodes into memory.

    Of D4RL's layout, an episode ends where `terminals` or `timeouts` is set, and is terminated where
    `terminals` is. The last one may lack both, and counts as cut off. So does one in a file that was joined
    from several, where what follows is not what `next_observations` says, if the file has those. Other
    fields are left alone.

    Args:
        path: an HDF5 file in D4RL's or Minari's layout, or the folder of a Minari data set.
        environment: gymnasium's id; by default what the file says, which D4RL's own files do not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not HDF5 or is cut short, a field is missing, lengths disagree, numbers are not
            finite, or observations are not vectors.
        ImportError: h5py is not installed.
    """
    h5py = _import_h5py("read_episodes")
    file_path = _find_file(Path(path).expanduser())
    try:
        # A number too large for float32 becomes infinite, which is an error that names its place.
        with h5py.File(file_path, "r") as file, np.errstate(over="ignore"):
            names = [name for name in file if re.fullmatch(r"episode_\d+", name)]
            episodes = _read_minari(file, file_path, names) if names else _read_d4rl(file, file_path)
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # what h5py says of a damaged file
        raise ValueError(
            f"read_episodes: {file_path} must be a whole HDF5 file, got none or a damaged one ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"read_episodes: {file_path}: {error}") from error
    return episodes if environment is None else replace(episodes, environment=environment)


def write_episodes(path: Path, episodes: Episodes, next_observations: NDArray[np.float32]) -> None:
    """Write episodes in D4RL's layout, compressed, whole or not at all.

    Beside D4RL's fields the file has the attributes `environment` and `about` (JSON), which `read_episodes`
    reads. The last step of an episode that is not terminated is marked in `timeouts`, whatever cut it off.

    Args:
        path: the file, which is replaced where it exists.
        episodes: what it holds.
        next_observations: (N, S) float32, what was seen after each action.

    Raises:
        ValueError: there are not as many next observations as observations.
        OSError: it cannot be written.
        ImportError: h5py is not installed.
    """
    if next_observations.shape != episodes.observations.shape:
        raise ValueError(
            f"write_episodes: next_observations must have the shape of observations, "
            f"{episodes.observations.shape}, got {next_observations.shape}"
        )
    h5py = _import_h5py("write_episodes")
    is_last = np.zeros((2, len(episodes)), np.bool_)
    is_last[np.where(episodes.terminated, 0, 1), episodes.ends - 1] = True
    fields = (episodes.observations, episodes.actions, episodes.rewards, *is_last, next_observations)
    place = behind_link(path)
    partial = place.with_name(place.name + ".partial")
    try:
        with h5py.File(partial, "w") as file:
            for name, values in zip((*D4RL_FIELDS, "next_observations"), fields, strict=True):
                chunks = (min(COMPRESSED_STEPS, len(values)), *values.shape[1:])
                file.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True)
            file.attrs["about"] = json.dumps(dict(episodes.about))
            if episodes.environment is not None:
                file.attrs["environment"] = episodes.environment
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _import_h5py(function: str) -> ModuleType:
    try:
        import h5py
    except ImportError as missing:
        raise ImportError(f"{function}: HDF5 files need h5py, which is not here; {INSTALL}") from missing
    return h5py


def _find_file(path: Path) -> Path:
    """Return the file that a path means: itself, or that of the Minari data set in a folder."""
    if path.is_file():
        return path
    for file_path in (path / "data" / MINARI_FILE, path / MINARI_FILE):
        if file_path.is_file():
            return file_path
    wanted = f"a folder with data/{MINARI_FILE}" if path.is_dir() else "an existing file or folder"
    raise FileNotFoundError(f"read_episodes: path must be an HDF5 file or {wanted}, got {path}")


def _field(group: h5py.Group, name: str) -> NDArray[Any]:
    """Return a field's numbers.

    Raises:
        ValueError: it is a group of several, or holds no numbers.
    """
    field = group[name]
    if not hasattr(field, "dtype"):  # Minari's form of a dict or tuple of observations or actions
        raise ValueError(f"{group.name}: {name} must be one array, got the parts {', '.join(field)}")
    if field.dtype.kind not in "biuf":
        raise ValueError(f"{group.name}: {name} must be numbers, got {field.dtype}")
    return np.asarray(field[()])


def _fields(group: h5py.Group, names: tuple[str, ...]) -> list[NDArray[Any]]:
    missing = [name for name in names if name not in group]
    if missing:
        found = ", ".join(group) or "nothing"
        raise ValueError(f"{group.name}: the fields {', '.join(names)} must be there, got {found}")
    return [_field(group, name) for name in names]


def _check_lengths(place: str, lengths: Mapping[str, int], expected: int) -> None:
    if set(lengths.values()) != {expected}:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{place}: the fields must hold {expected} steps each, got {said}")


def _as_actions(values: NDArray[Any]) -> NDArray[Any]:
    """Return discrete actions, a row of integers, as int64, and all others as float32."""
    is_discrete = values.ndim == 1 and values.dtype.kind in "biu"
    return values.astype(np.int64 if is_discrete else np.float32)


# --- D4RL ------------------------------------------------------------------------------------------------


def _read_d4rl(file: h5py.File, path: Path) -> Episodes:
    arrays = _fields(file, D4RL_FIELDS)
    lengths = {name: len(array) for name, array in zip(D4RL_FIELDS, arrays, strict=True)}
    _check_lengths("/", lengths, lengths["observations"])
    observations = arrays[0].astype(np.float32, copy=False)
    rewards, terminals, timeouts = map(_as_column, D4RL_FIELDS[2:], arrays[2:])
    terminated = terminals.astype(np.bool_)
    is_last = terminated | timeouts.astype(np.bool_)
    is_last[-1:] = True
    if "next_observations" in file:
        is_last |= _joints(observations, _field(file, "next_observations"), is_last)
    ends = np.flatnonzero(is_last) + 1
    about = {"source": "file", "name": path.stem, **json.loads(file.attrs.get("about", "{}"))}
    return Episodes(
        observations,
        _as_actions(arrays[1]),
        rewards.astype(np.float32, copy=False),
        ends,
        terminated[ends - 1],
        str(file.attrs["environment"]) if "environment" in file.attrs else None,
        about,
    )


def _as_column(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return (N,) from that or (N, 1)."""
    if values.size != len(values):
        raise ValueError(f"/: {name} must hold one number a step, got {values.shape}")
    return values.reshape(-1)


def _joints(
    observations: NDArray[np.float32], following: NDArray[Any], is_last: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return where one recording was joined to another in mid-episode: what follows was not what came next.

    A joint is rare. Where there would be more joints than ends, the fields mean something else (scaled
    observations, say), and there are none.
    """
    joints = np.zeros_like(is_last)
    if following.shape == observations.shape:
        for start in range(0, len(joints) - 1, COMPARED_STEPS):
            block = slice(start, min(start + COMPARED_STEPS, len(joints) - 1))
            shown = observations[block.start + 1 : block.stop + 1]
            joints[block] = ~np.isclose(shown, following[block], rtol=1e-3, atol=1e-3, equal_nan=True).all(
                axis=1
            )
    joints &= ~is_last
    return joints if joints.sum() <= is_last.sum() else np.zeros_like(joints)


# --- Minari ----------------------------------------------------------------------------------------------


def _read_minari(file: h5py.File, path: Path, names: Iterable[str]) -> Episodes:
    in_order = sorted(names, key=lambda name: int(name.removeprefix("episode_")))
    parts = [part for name in in_order if len((part := _read_group(file[name]))[2])]  # those with steps
    if not parts:
        raise ValueError("there must be episodes with steps, got none")
    observations, actions, rewards, terminated = zip(*parts, strict=True)
    metadata = _read_metadata(path.with_name(MINARI_METADATA))
    return Episodes(
        _concatenate("observations", observations),
        _concatenate("actions", actions),
        _concatenate("rewards", rewards),
        np.cumsum([len(part) for part in rewards], dtype=np.int64),
        np.array(terminated, np.bool_),
        metadata.pop("environment", None),
        {"source": "minari", "name": path.stem, **metadata},
    )


def _read_group(
    group: h5py.Group,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32], bool]:
    """Return an episode's observations (T, S), actions, rewards (T,), and whether it terminated."""
    arrays = _fields(group, MINARI_FIELDS)
    lengths = {name: len(array) for name, array in zip(MINARI_FIELDS[1:], arrays[1:], strict=True)}
    lengths["observations less the last"] = len(arrays[0]) - 1
    _check_lengths(group.name, lengths, lengths["actions"])
    observations, actions, rewards, terminations, _ = arrays
    if observations.ndim != 2:
        raise ValueError(f"{group.name}: observations must be vectors, (T + 1, S), got {observations.shape}")
    is_terminated = bool(terminations.size and terminations.reshape(-1)[-1])
    return (
        observations[:-1].astype(np.float32),
        _as_actions(actions),
        rewards.astype(np.float32),
        is_terminated,
    )


def _concatenate(name: str, parts: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    """Return all episodes' arrays end to end.

    Raises:
        ValueError: they do not have the same width.
    """
    widths = sorted({part.shape[1:] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"{name} must be of one size in all episodes, got {', '.join(map(str, widths))}")
    return np.concatenate(parts)


def _read_metadata(path: Path) -> dict[str, Any]:
    """Return what metadata.json says of the environment and the data; nothing where there is none."""
    if not path.is_file():
        return {}
    metadata = json.loads(path.read_text(encoding="utf-8"))
    said = {"name": metadata.get("dataset_id"), "algorithm": metadata.get("algorithm_name")}
    if "env_spec" in metadata:
        said["environment"] = json.loads(metadata["env_spec"]).get("id")
    space = json.loads(metadata.get("action_space", "{}"))
    if space.get("type") == "Discrete":
        said["num_actions"] = space["n"]
    return {name: value for name, value in said.items() if value is not None}
