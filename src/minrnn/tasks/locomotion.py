"""D4RL's locomotion data by name, Minari's by id, and D4RL's normalised scores.

Sources: Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning" (arXiv 2004.07219) and its
list of reference returns; Minari's documentation. The two have different policies and different versions of
the environments: their figures do not belong in one column, and neither do those of locally made data.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minrnn.tasks.downloads import cache_folder, download, supplied_file
from minrnn.tasks.episodes import Episodes
from minrnn.tasks.recordings import read_episodes

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
LOCAL_FOLDER = "local/"  # begins the names of local data
D4RL_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")


class Reference(NamedTuple):
    """What D4RL says of an environment, and which of gymnasium's is nearest to it."""

    random: float
    """Mean return of random actions: a score of 0."""
    expert: float
    """Mean return of D4RL's expert: a score of 100."""
    observation_size: int
    action_size: int
    environment: str
    """Version 4, which shows and pays what D4RL's own version 2 does; version 5 pays some steps otherwise."""


REFERENCES = {
    "hopper": Reference(-20.272305, 3234.3, 11, 3, "Hopper-v4"),
    "halfcheetah": Reference(-280.178953, 12135.0, 17, 6, "HalfCheetah-v4"),
    "walker2d": Reference(1.629008, 4592.3, 17, 6, "Walker2d-v4"),
}

D4RL_NAMES = tuple(f"{environment}-{quality}-v2" for environment in REFERENCES for quality in D4RL_QUALITIES)


def normalised_score(environment: str, mean_return: float) -> float | None:
    """Return D4RL's score of a mean return, or None for environments that D4RL gives no references for.

        score = 100 (return - random) / (expert - random)

    D4RL's references are those of version 2 of the environments, and serve all versions, as they do for D4RL.

    Args:
        environment: gymnasium's id or D4RL's name: Hopper-v5, hopper-medium-v2.
        mean_return: the mean undiscounted return of some episodes.
    """
    reference = REFERENCES.get(environment.split("-")[0].lower())
    if reference is None:
        return None
    return 100 * (mean_return - reference.random) / (reference.expert - reference.random)


def find_episodes(source: str, environment: str | None = None) -> Episodes:
    """Return the episodes that `source` names.

    Args:
        source: the path of a file or of a Minari data set's folder; a name of local data as `minrnn
            make-data` writes them, such as local/Hopper-v5-medium; the name of one of D4RL's locomotion data
            sets, such as hopper-medium-v2, which is downloaded on first use; or the id of a Minari data set
            on this machine, such as mujoco/hopper/medium-v0.
        environment: gymnasium's id; by default what the data say.

    Raises:
        ValueError: there is no such source, or it does not hold what it should: see `read_episodes`.
        OSError: it must be downloaded and cannot be.
        ImportError: h5py is not installed.
    """
    if Path(source).expanduser().exists():
        return read_episodes(source, environment)
    if source.startswith(LOCAL_FOLDER):
        episodes = read_episodes(_find_local(source), environment)
        return replace(episodes, about={**episodes.about, "name": source})
    if source in D4RL_NAMES:
        episodes = read_episodes(fetch_d4rl(source), environment or _reference(source).environment)
        return replace(episodes, about={**episodes.about, "source": "d4rl", "name": source})
    if (folder := minari_folder(source)).is_dir():
        return read_episodes(folder, environment)
    near = difflib.get_close_matches(source, D4RL_NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"Minari's data sets are looked for in {minari_folder('')}"
    raise ValueError(
        f"find_episodes: source must be an existing file or folder, a name of local data, one of D4RL's data "
        f"sets or the id of one of Minari's that is on this machine, got {source!r}; {hint}"
    )


def fetch_d4rl(name: str, url: str | None = None) -> Path:
    """Return the path of one of D4RL's locomotion files (version 2), downloaded once.

    Looked for under D4RL's own file name (hopper_medium-v2.hdf5) in the folder that MINRNN_DATA names, then
    in the cache folder; downloaded into the latter otherwise. D4RL publishes no checksums: a download is
    kept if it is as long as the server says and is an HDF5 file with the right fields, sizes and numbers.

    Args:
        name: such as hopper-medium-v2.
        url: the folder to download from; by default MINRNN_D4RL_URL where that is set, else the original.

    Raises:
        ValueError: there is no such data set, or the file is not what it should be; a download is not kept.
        OSError: the download failed; the message says where to put the file by hand.
        ImportError: h5py is not installed.
    """
    if name not in D4RL_NAMES:
        near = difflib.get_close_matches(name, D4RL_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are called {D4RL_NAMES[0]} and so on"
        raise ValueError(
            f"fetch_d4rl: name must be that of one of D4RL's locomotion data sets, got {name!r}; {hint}"
        )
    file_name = _file_name(name)
    if supplied := supplied_file(file_name):
        return supplied
    url = url or os.environ.get("MINRNN_D4RL_URL") or D4RL_URL
    return download("fetch_d4rl", f"{url}/{file_name}", file_name, check=lambda path: _check_d4rl(path, name))


def local_name(environment: str, quality: str, seed: int = 0) -> str:
    """Return what locally made data are called: local/Hopper-v5-medium; other seeds than 0 add -seed1.

    Args:
        environment: gymnasium's id.
        quality: random, medium, medium-replay or medium-expert.
        seed: of what was trained and recorded.
    """
    which = f"-seed{seed}" if seed else ""
    return f"{LOCAL_FOLDER}{environment.replace('/', '-')}-{quality}{which}"


def local_path(name: str) -> Path:
    """Return where data of that local name are made: a file in the cache folder."""
    return cache_folder() / f"{name}.hdf5"


def minari_folder(name: str) -> Path:
    """Return where Minari keeps a data set: below MINARI_DATASETS_PATH, or .minari/datasets at home."""
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    return Path(root, name)


def _find_local(name: str) -> Path:
    """Return the file of a local name: below the folder that MINRNN_DATA names, or in the cache folder."""
    path = supplied_file(f"{name}.hdf5") or local_path(name)
    if not path.is_file():
        raise ValueError(
            f"find_episodes: {name} must have been made, got no {path}; `minrnn make-data` makes such data"
        )
    return path


def _file_name(name: str) -> str:
    """Return what D4RL calls the file: halfcheetah-medium-replay-v2 is halfcheetah_medium_replay-v2.hdf5."""
    stem, _, version = name.rpartition("-")
    return f"{stem.replace('-', '_')}-{version}.hdf5"


def _reference(name: str) -> Reference:
    return REFERENCES[name.split("-")[0]]


def _check_d4rl(path: Path, name: str) -> None:
    """Raise ValueError unless the file holds episodes of the environment in the name."""
    episodes, reference = read_episodes(path), _reference(name)
    sizes = episodes.observations.shape[1:] + episodes.actions.shape[1:]
    if sizes != (reference.observation_size, reference.action_size):
        raise ValueError(
            f"fetch_d4rl: {name} must have observations of {reference.observation_size} and actions of "
            f"{reference.action_size} numbers, got a file with {sizes}"
        )
