"""Episodes on disk: D4RL's flat HDF5 files and Minari's, one group for each episode, through h5py alone.

D4RL (Fu et al., arXiv 2004.07219) keeps one row for each step in `observations`, `actions`, `rewards`,
`terminals` and `timeouts`; an episode ends where one of the two flags is set. Minari keeps `episode_0`,
`episode_1` and so on, each with T actions, rewards, terminations and truncations and T + 1 observations, of
which the last, on which nothing was done, is left out here; `metadata.json` beside the file names the
environment.

A file may come from anywhere. What it holds is read from it alone: a link or a data set that leads to another
file is refused, as is one that declares more than a file of its size can hold, before memory is taken for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from minrnn.files import naming, parse_json, read_json, write_file
from minrnn.tasks.environments import INSTALL, known_actions
from minrnn.tasks.episodes import Episodes
from minrnn.tasks.spaces import ActionSpace, infer_actions

if TYPE_CHECKING:
    import h5py

D4RL_FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")
MINARI_FIELDS = ("observations", "actions", "rewards", "terminations", "truncations")
MINARI_FILE, MINARI_METADATA = "main_data.hdf5", "metadata.json"

COMPARED_STEPS = 1 << 16  # rows that are compared at once, so that no copies of a large file are made
COMPRESSED_STEPS = 4096  # rows that are compressed together, 176 KiB of Hopper's observations

EXPANSION = 1100
"""Bytes of a field for each that it takes in the file, at most; deflate, the best of HDF5's, reaches 1032."""

LONGEST = 200
"""Characters that a message takes over from h5py."""

FREE_BYTES = 1 << 24
"""Bytes of a field that need none in the file: of one that was never written, all are zero."""


def read_episodes(path: str | Path, environment: str | None = None) -> Episodes:
    """Read recorded episodes into memory.

    Of D4RL's layout, an episode ends where `terminals` or `timeouts` is set, and is terminated where
    `terminals` is. The last one may lack both, and counts as cut off. So does one in a file that was joined
    from several, where what follows is not what `next_observations` says, if the file has those. Other
    fields are left alone.

    Args:
        path: an HDF5 file in D4RL's or Minari's layout, or the folder of a Minari data set.
        environment: gymnasium's id; by default what the file says, which D4RL's own files do not.

    Actions become those of `Episodes`: numbers in any arrangement are a vector, choices count from 0. What
    they are, the file says (Minari's metadata, or the attribute `about`), else the environment where it can
    be made here; else one whole number a step is a choice.

    Raises:
        FileNotFoundError: there is no such file.
        BlockingIOError: another process is writing it.
        ValueError: it is not HDF5 or is cut short, a field is missing, leads out of the file or declares more
            than that can hold, lengths disagree, numbers are not finite, observations are not vectors, or
            actions are of a kind that no policy takes.
        ImportError: h5py is not installed.
    """
    h5py = _import_h5py("read_episodes")
    file_path = _find_file(Path(path).expanduser())
    # A number too large for float32 becomes infinite, which is an error that names its place.
    quiet = np.errstate(over="ignore", invalid="ignore")
    with _one_line_errors(file_path), quiet, h5py.File(file_path, "r") as opened:
        file = _Fields(opened, EXPANSION * file_path.stat().st_size + FREE_BYTES)
        names = [name for name in opened if re.fullmatch(r"episode_\d+", name)]
        read = _read_minari(file, file_path, names) if names else _read_d4rl(file, file_path)
    with naming(f"read_episodes: {file_path}"), np.errstate(over="ignore", invalid="ignore"):
        about = dict(read.about)
        space = _action_space(read, environment)
        if space is not None and space.discrete:
            about["num_actions"] = space.size
            if space.start:
                about["first_action"] = space.start
        return Episodes(
            read.observations,
            infer_actions(read.actions) if space is None else space.from_recorded(read.actions),
            read.rewards,
            read.ends,
            read.terminated,
            environment or read.environment,
            about,
        )


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Make one line that names the file of whatever h5py says."""
    try:
        yield
    except BlockingIOError as error:
        raise BlockingIOError(
            f"read_episodes: {path} is locked by a process that writes it; wait until that is done"
        ) from error
    except PermissionError:
        raise
    except MemoryError as error:
        raise ValueError(f"read_episodes: {path} holds more than fits into memory") from error
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # what h5py says of a damaged file
        said = " ".join(str(error).split())[:LONGEST]
        if "already open for write" in said:
            raise ValueError(
                f"read_episodes: {path} is being written, or was not closed by who wrote it ({said})"
            ) from error
        raise ValueError(
            f"read_episodes: {path} must be a whole HDF5 file, got none or a damaged one ({said})"
        ) from error
    except ValueError as error:
        raise ValueError(f"read_episodes: {path}: {error}") from error


def _action_space(read: _Read, named: str | None) -> ActionSpace | None:
    """Return what actions are, by what the data say or else by the environment; None where neither is known.

    Raises:
        ValueError: the environment that the user named takes others than the data say, or none that a policy
            has.
    """
    if named is None and read.space is None and read.environment is not None:
        return known_actions(read.environment, by_user=False)
    takes = None if named is None else known_actions(named, by_user=True)
    if read.space is None or takes is None:
        return read.space or takes
    if (takes.discrete, takes.size) != (read.space.discrete, read.space.size):
        raise ValueError(f"actions are {read.space}, but {named} takes {takes}")
    return read.space


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
    actions = episodes.actions + (episodes.about.get("first_action", 0) if episodes.is_discrete else 0)
    fields = (episodes.observations, actions, episodes.rewards, *is_last, next_observations)
    with write_file(path) as partial, h5py.File(partial, "w") as file:
        for name, values in zip((*D4RL_FIELDS, "next_observations"), fields, strict=True):
            chunks = (min(COMPRESSED_STEPS, len(values)), *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True)
        file.attrs["about"] = json.dumps(dict(episodes.about))
        if episodes.environment is not None:
            file.attrs["environment"] = episodes.environment


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


class _Recorded(TypedDict):
    """What D4RL's files may say of themselves: `about`, as `write_episodes` writes it; more is kept."""

    name: NotRequired[str]
    source: NotRequired[str]
    num_actions: NotRequired[int]
    first_action: NotRequired[int]


class _Read(NamedTuple):
    """A file's arrays, actions as they lie there."""

    observations: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    ends: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    environment: str | None
    space: ActionSpace | None
    about: Mapping[str, Any]


class _Fields:
    """The data sets of a group, read from this file alone, and no more than it can hold.

    Args:
        group: of an open file.
        allowance: bytes that may be read of this file in all; shared with its groups.
    """

    def __init__(self, group: h5py.Group, allowance: int | list[int]) -> None:
        self.name = group.name
        self._group = group
        self._allowance = allowance if isinstance(allowance, list) else [allowance]

    def __contains__(self, name: str) -> bool:
        return name in self._group.keys()  # noqa: SIM118 - without following a link

    def group(self, name: str) -> _Fields:
        """Return a group's fields.

        Raises:
            ValueError: it is no group, or lies elsewhere.
        """
        group = self._own(name)
        if not hasattr(group, "keys"):
            raise ValueError(f"{self._place(name)} must be a group, got an array")
        return _Fields(group, self._allowance)

    def all(self, names: tuple[str, ...]) -> list[NDArray[Any]]:
        """Return fields' numbers, an axis of steps first.

        Raises:
            ValueError: one is not there, or see `one`.
        """
        if not all(name in self for name in names):
            found = ", ".join(self._group) or "nothing"
            raise ValueError(f"{self.name}: the fields {', '.join(names)} must be there, got {found}")
        return [self.one(name) for name in names]

    def one(self, name: str) -> NDArray[Any]:
        """Return a field's numbers.

        Raises:
            ValueError: it is a group of several, holds no numbers or is a single one, lies in another file,
                is compressed by what is not here, or declares more than the file can hold.
        """
        field = self._own(name)
        if not hasattr(field, "dtype"):  # Minari's form of a dict or tuple of observations or actions
            raise ValueError(f"{self.name}: {name} must be one array, got the parts {', '.join(field)}")
        if field.dtype.kind not in "biuf":
            raise ValueError(f"{self.name}: {name} must be numbers, got {field.dtype}")
        if not field.shape:
            raise ValueError(f"{self.name}: {name} must have an axis of steps, got a single value or none")
        if field.external or field.is_virtual:
            raise ValueError(f"{self._place(name)} must lie in the file itself, got numbers of another file")
        self._check_filters(name, field)
        self._check_size(name, field)
        return np.asarray(field[()])

    def text(self, attribute: str) -> str | None:
        """Return an attribute that is text; None where it is not there.

        Raises:
            ValueError: it is something else.
        """
        if attribute not in self._group.attrs:
            return None
        value = self._group.attrs[attribute]
        if isinstance(value, bytes):
            value = value.decode()
        if not isinstance(value, str):
            raise ValueError(f"attribute {attribute} must be text, got {type(value).__name__}")
        return str(value)

    def _own(self, name: str) -> Any:
        """Return what is stored here under a name, and follow no link."""
        link = type(self._group.get(name, getlink=True)).__name__
        if link != "HardLink":
            raise ValueError(f"{self._place(name)} must lie in the file itself, got a link ({link})")
        return self._group[name]

    def _place(self, name: str) -> str:
        return f"{(self.name or '').rstrip('/')}/{name}"

    def _check_filters(self, name: str, field: h5py.Dataset) -> None:
        from h5py import h5z

        pipeline = field.id.get_create_plist()
        for index in range(pipeline.get_nfilters()):
            number, _, _, called = pipeline.get_filter(index)
            if not h5z.filter_avail(number):
                said = called.decode(errors="replace") if called else "unnamed"
                raise ValueError(
                    f"{self._place(name)} is compressed by filter {number} ({said}), a plugin of HDF5 that "
                    "is not here; write it with gzip"
                )

    def _check_size(self, name: str, field: h5py.Dataset) -> None:
        stored, item = field.id.get_storage_size(), field.dtype.itemsize
        declared = item * max(prod(field.shape), prod(field.chunks or (0,)))
        self._allowance[0] -= declared
        if declared > FREE_BYTES + EXPANSION * stored or self._allowance[0] < 0:
            raise ValueError(
                f"{self._place(name)} declares {declared:,} bytes, {field.shape} of {field.dtype}, of which "
                f"the file holds {stored:,}: more than compression can explain"
            )


def _check_lengths(place: str, lengths: Mapping[str, int], expected: int) -> None:
    if set(lengths.values()) != {expected}:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{place}: the fields must hold {expected} steps each, got {said}")


def _check_vectors(place: str, shape: str, observations: NDArray[Any]) -> None:
    if observations.ndim != 2:
        raise ValueError(
            f"{place}: observations must be vectors, {shape}, got {observations.shape}; record what "
            "gymnasium.wrappers.FlattenObservation makes of images, numbers of states and parts"
        )


# --- D4RL ------------------------------------------------------------------------------------------------


def _read_d4rl(file: _Fields, path: Path) -> _Read:
    arrays = file.all(D4RL_FIELDS)
    lengths = {name: len(array) for name, array in zip(D4RL_FIELDS, arrays, strict=True)}
    _check_lengths("/", lengths, lengths["observations"])
    _check_vectors("/", "(N, S)", arrays[0])
    observations = arrays[0].astype(np.float32, copy=False)
    rewards, terminals, timeouts = map(_as_column, D4RL_FIELDS[2:], arrays[2:])
    terminated = terminals.astype(np.bool_)
    is_last = terminated | timeouts.astype(np.bool_)
    is_last[-1:] = True
    if "next_observations" in file:
        is_last |= _find_joints(observations, file.one("next_observations"), is_last)
    ends = np.flatnonzero(is_last) + 1
    said = parse_json(file.text("about") or "{}", _Recorded, "attribute about")
    space = None
    if "num_actions" in said:
        space = ActionSpace(True, said["num_actions"], said.get("first_action", 0))
    return _Read(
        observations,
        arrays[1],
        rewards.astype(np.float32, copy=False),
        ends,
        terminated[ends - 1],
        file.text("environment"),
        space,
        {"source": "file", "name": path.stem, **said},
    )


def _as_column(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return (N,) from that or (N, 1)."""
    if values.size != len(values):
        raise ValueError(f"/: {name} must hold one number a step, got {values.shape}")
    return values.reshape(-1)


def _find_joints(
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


def _read_minari(file: _Fields, path: Path, names: Iterable[str]) -> _Read:
    in_order = sorted(names, key=lambda name: int(name.removeprefix("episode_")))
    read = map(_read_group, map(file.group, in_order))
    parts = [part for part in read if len(part[2])]  # those with steps
    if not parts:
        raise ValueError("there must be episodes with steps, got none")
    observations, actions, rewards, terminated = zip(*parts, strict=True)
    environment, space, about = _read_metadata(path.with_name(MINARI_METADATA))
    return _Read(
        _concatenate("observations", observations),
        _concatenate("actions", actions),
        _concatenate("rewards", rewards),
        np.cumsum([len(part) for part in rewards], dtype=np.int64),
        np.array(terminated, np.bool_),
        environment,
        space,
        {"source": "minari", "name": path.stem, **about},
    )


def _read_group(
    group: _Fields,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32], bool]:
    """Return an episode's observations (T, S), actions, rewards (T,), and whether it terminated."""
    arrays = group.all(MINARI_FIELDS)
    lengths = {name: len(array) for name, array in zip(MINARI_FIELDS[1:], arrays[1:], strict=True)}
    lengths["observations less the last"] = len(arrays[0]) - 1
    _check_lengths(str(group.name), lengths, lengths["actions"])
    observations, actions, rewards, terminations, _ = arrays
    _check_vectors(str(group.name), "(T + 1, S)", observations)
    is_terminated = bool(terminations.size and terminations.reshape(-1)[-1])
    return observations[:-1].astype(np.float32), actions, rewards.astype(np.float32), is_terminated


def _concatenate(name: str, parts: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    """Return all episodes' arrays end to end.

    Raises:
        ValueError: they do not have the same width.
    """
    widths = sorted({part.shape[1:] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"{name} must be of one size in all episodes, got {', '.join(map(str, widths[:8]))}")
    return np.concatenate(parts)


class _Metadata(TypedDict):
    """What Minari says of a data set, as far as it is used; the last two are JSON in JSON."""

    dataset_id: NotRequired[str | None]
    algorithm_name: NotRequired[str | None]
    env_spec: NotRequired[str | None]
    action_space: NotRequired[str | None]


class _EnvSpec(TypedDict):
    """What gymnasium says of an environment, as far as it is used."""

    id: NotRequired[str]


def _read_metadata(path: Path) -> tuple[str | None, ActionSpace | None, dict[str, Any]]:
    """Return what metadata.json says: the environment, its actions, and where the data come from."""
    if not path.is_file():
        return None, None, {}
    metadata = read_json(path, _Metadata)
    said = {"name": metadata.get("dataset_id"), "algorithm": metadata.get("algorithm_name")}
    space = None
    if (described := metadata.get("action_space")) is not None:
        with naming(f"{path}: action_space"):
            space = ActionSpace.from_minari(parse_json(described, dict[str, Any], "its text"))
    spec = parse_json(metadata.get("env_spec") or "{}", _EnvSpec, f"{path}: env_spec")
    return spec.get("id"), space, {name: value for name, value in said.items() if value is not None}
