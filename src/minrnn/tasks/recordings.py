"""Recorded episodes in HDF5 files, in the layouts of D4RL and Minari, read with h5py alone.

D4RL (Fu et al., arXiv 2004.07219) has one row per step in `observations`, `actions`, `rewards`, `terminals`
and `timeouts`; an episode ends where one of the two flags is set. Minari has groups `episode_0`, `episode_1`
and so on, each with T actions, rewards, terminations and truncations and T + 1 observations, of which the
last is not used here; `metadata.json` next to the file names the environment.

Files are not trusted: links and data sets that refer to another file are rejected, and so is a data set that
declares more than a file of this size can hold, before memory is allocated for it.
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

COMPARED_STEPS = 1 << 16  # rows compared at once, which limits the memory for temporary arrays
COMPRESSED_STEPS = 4096  # rows per HDF5 chunk, 176 KiB of Hopper's observations

EXPANSION = 1100
"""Maximum compression ratio of a field; deflate, the best of HDF5's filters, reaches 1032."""

LONGEST = 200
"""Characters of an h5py message that are quoted."""

FREE_BYTES = 1 << 24
"""Bytes that a field may have without any storage: fields that were never written are all zeros."""


def read_episodes(path: str | Path, environment: str | None = None) -> Episodes:
    """Read recorded episodes into memory.

    In D4RL's layout, an episode ends where `terminals` or `timeouts` is set, and is terminated where
    `terminals` is. The last episode may have neither flag and counts as truncated. If the file has
    `next_observations`, an episode is also truncated where the next row does not match them: the file was
    concatenated from several. Other fields are ignored.

    Actions are converted to the form of `Episodes`: continuous actions of any shape to vectors, discrete ones
    to integers from 0. Their kind is taken from the file (Minari's metadata, or the attribute `about`), else
    from the environment if it can be made; otherwise one integer per step is a discrete action.

    Args:
        path: an HDF5 file in D4RL's or Minari's layout, or the folder of a Minari data set.
        environment: gymnasium's id; by default the one in the file, which D4RL's own files do not have.

    Raises:
        FileNotFoundError: the file does not exist.
        BlockingIOError: another process is writing it.
        ValueError: the file is not HDF5 or is truncated; a field is missing, refers to another file or
            declares more than the file can hold; lengths are inconsistent, numbers are not finite,
            observations are not vectors, or policies do not support this kind of actions.
        ImportError: h5py is not installed.
    """
    h5py = _import_h5py("read_episodes")
    file_path = _find_file(Path(path).expanduser())
    # Overflow to float32 is not a warning but an error of Episodes, which names the step.
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
    """Convert the errors of h5py to one-line errors that name the file."""
    try:
        yield
    except BlockingIOError as error:
        raise BlockingIOError(
            f"read_episodes: {path} is locked by a process that writes it; wait until it is done"
        ) from error
    except PermissionError:
        raise
    except MemoryError as error:
        raise ValueError(f"read_episodes: {path} does not fit into memory") from error
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # raised by h5py for damaged files
        said = " ".join(str(error).split())[:LONGEST]
        if "already open for write" in said:
            raise ValueError(
                f"read_episodes: {path} is being written, or was not closed by its writer ({said})"
            ) from error
        raise ValueError(
            f"read_episodes: {path} must be a whole HDF5 file, got none or a damaged one ({said})"
        ) from error
    except ValueError as error:
        raise ValueError(f"read_episodes: {path}: {error}") from error


def _action_space(read: _Read, named: str | None) -> ActionSpace | None:
    """Return the action space of the data, or else of the environment; None if neither is known.

    Raises:
        ValueError: the action space of the environment `named` by the user differs from that of the data or
            is not supported.
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
    """Write episodes to a compressed file in D4RL's layout, atomically.

    In addition to D4RL's fields, the file has the attributes `environment` and `about` (JSON), which
    `read_episodes` reads. `timeouts` is set at the last step of every episode that is not terminated.

    Args:
        path: the file; an existing one is replaced.
        episodes: the episodes.
        next_observations: (N, S) float32, the observation after each action.

    Raises:
        ValueError: the shapes of observations and next observations differ.
        OSError: the file cannot be written.
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
        raise ImportError(f"{function}: HDF5 files need h5py, which is not installed; {INSTALL}") from missing
    return h5py


def _find_file(path: Path) -> Path:
    """Return the path itself if it is a file, or the file of the Minari data set in a folder."""
    if path.is_file():
        return path
    for file_path in (path / "data" / MINARI_FILE, path / MINARI_FILE):
        if file_path.is_file():
            return file_path
    wanted = f"a folder with data/{MINARI_FILE}" if path.is_dir() else "an existing file or folder"
    raise FileNotFoundError(f"read_episodes: path must be an HDF5 file or {wanted}, got {path}")


class _Recorded(TypedDict):
    """The attribute `about` of a file in D4RL's layout; further keys are kept."""

    name: NotRequired[str]
    source: NotRequired[str]
    num_actions: NotRequired[int]
    first_action: NotRequired[int]


class _Read(NamedTuple):
    """The content of a file, with actions as they are stored."""

    observations: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    ends: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    environment: str | None
    space: ActionSpace | None
    about: Mapping[str, Any]


class _Fields:
    """The fields of a group, read without following links and within a memory limit.

    Args:
        group: a group of an open file.
        allowance: total number of bytes that may be read from the file; shared by all its groups.
    """

    def __init__(self, group: h5py.Group, allowance: int | list[int]) -> None:
        self.name = group.name
        self._group = group
        self._allowance = allowance if isinstance(allowance, list) else [allowance]

    def __contains__(self, name: str) -> bool:
        return name in self._group.keys()  # noqa: SIM118 - without following a link

    def group(self, name: str) -> _Fields:
        """Return the fields of a subgroup.

        Raises:
            ValueError: it is not a group, or is a link.
        """
        group = self._own(name)
        if not hasattr(group, "keys"):
            raise ValueError(f"{self._place(name)} must be a group, got an array")
        return _Fields(group, self._allowance)

    def all(self, names: tuple[str, ...]) -> list[NDArray[Any]]:
        """Return the arrays of several fields, with the axis of steps first.

        Raises:
            ValueError: a field is missing or invalid; see `one`.
        """
        if not all(name in self for name in names):
            found = ", ".join(self._group) or "nothing"
            raise ValueError(f"{self.name}: the fields {', '.join(names)} must be there, got {found}")
        return [self.one(name) for name in names]

    def one(self, name: str) -> NDArray[Any]:
        """Return the array of a field.

        Raises:
            ValueError: the field is a group, not numeric, a scalar, or in another file; its compression
                filter is not available; or it declares more than the file can hold.
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
        """Return a text attribute, or None if it is missing.

        Raises:
            ValueError: the attribute is not text.
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
        """Return a member of the group; links are rejected."""
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
                    "is not installed; write it with gzip"
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
            f"{place}: observations must be vectors, {shape}, got {observations.shape}; record "
            "images, discrete observations and dicts with gymnasium.wrappers.FlattenObservation"
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
    """Return values of shape (N,) or (N, 1) as (N,)."""
    if values.size != len(values):
        raise ValueError(f"/: {name} must hold one number a step, got {values.shape}")
    return values.reshape(-1)


def _find_joints(
    observations: NDArray[np.float32], following: NDArray[Any], is_last: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return a mask of the steps whose next row differs from their next observation: ends of a recording.

    Such steps are rare. If there are more of them than ends of episodes, `following` has another meaning
    (scaled observations, for example), and the mask is all False.
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
    parts = [part for part in read if len(part[2])]  # without empty episodes
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
    """Return the concatenated arrays of all episodes.

    Raises:
        ValueError: their shapes differ beyond the first axis.
    """
    widths = sorted({part.shape[1:] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"{name} must be of one size in all episodes, got {', '.join(map(str, widths[:8]))}")
    return np.concatenate(parts)


class _Metadata(TypedDict):
    """The keys of Minari's metadata.json that are used; the last two are JSON strings."""

    dataset_id: NotRequired[str | None]
    algorithm_name: NotRequired[str | None]
    env_spec: NotRequired[str | None]
    action_space: NotRequired[str | None]


class _EnvSpec(TypedDict):
    """The keys of gymnasium's description of an environment that are used."""

    id: NotRequired[str]


def _read_metadata(path: Path) -> tuple[str | None, ActionSpace | None, dict[str, Any]]:
    """Return the environment, its action space, and the name and algorithm in metadata.json."""
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
