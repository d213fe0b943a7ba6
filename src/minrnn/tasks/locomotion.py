"""Data sets by name: D4RL's locomotion data, Minari's, and local ones; D4RL's normalized scores.

Sources: Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning" (arXiv 2004.07219) and its
list of reference returns; Minari's documentation. D4RL, Minari and local data come from different policies
and versions of the environments, so their scores are not comparable.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minrnn.files import nearest
from minrnn.tasks.downloads import cache_folder, check_digest, download, folder_from, supplied_file
from minrnn.tasks.episodes import Episodes
from minrnn.tasks.recordings import read_episodes

D4RL_URL = "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
LOCAL_FOLDER = "local/"  # prefix of the names of local data


class Reference(NamedTuple):
    """D4RL's reference returns of an environment, and the corresponding gymnasium environment."""

    random: float
    """Mean return of random actions: a score of 0."""
    expert: float
    """Mean return of D4RL's expert: a score of 100."""
    observation_size: int
    action_size: int
    environment: str
    """Version 4, with the observations and rewards of D4RL's version 2; some rewards of version 5 differ."""


REFERENCES = {
    "hopper": Reference(-20.272305, 3234.3, 11, 3, "Hopper-v4"),
    "halfcheetah": Reference(-280.178953, 12135.0, 17, 6, "HalfCheetah-v4"),
    "walker2d": Reference(1.629008, 4592.3, 17, 6, "Walker2d-v4"),
}

# D4RL publishes no checksums. These are from TensorFlow Datasets (d4rl_mujoco_*/checksums.tsv), which
# downloads the same files from the same host.
D4RL_SHA256 = {
    "hopper-expert-v2": "01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b",
    "hopper-full-replay-v2": "56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e",
    "hopper-medium-v2": "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0",
    "hopper-medium-expert-v2": "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
    "hopper-medium-replay-v2": "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    "hopper-random-v2": "63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054",
    "halfcheetah-expert-v2": "d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f",
    "halfcheetah-full-replay-v2": "27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0",
    "halfcheetah-medium-v2": "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0",
    "halfcheetah-medium-expert-v2": "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06",
    "halfcheetah-medium-replay-v2": "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683",
    "halfcheetah-random-v2": "25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba",
    "walker2d-expert-v2": "2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a",
    "walker2d-full-replay-v2": "f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a",
    "walker2d-medium-v2": "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda",
    "walker2d-medium-expert-v2": "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04",
    "walker2d-medium-replay-v2": "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    "walker2d-random-v2": "4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa",
}
D4RL_NAMES = tuple(D4RL_SHA256)


def normalized_score(environment: str, mean_return: float) -> float | None:
    """Return D4RL's normalized score of a mean return, or None for environments without references.

        score = 100 (return - random) / (expert - random)

    As in D4RL, the references of version 2 of the environments are used for all versions.

    Args:
        environment: gymnasium's id or D4RL's name: Hopper-v5, hopper-medium-v2.
        mean_return: the mean undiscounted return of some episodes.
    """
    name = environment.rpartition(":")[2]  # an id may begin with the module that registers it
    reference = REFERENCES.get(name.split("-")[0].lower())
    if reference is None:
        return None
    return 100 * (mean_return - reference.random) / (reference.expert - reference.random)


def find_episodes(source: str, environment: str | None = None) -> Episodes:
    """Return the episodes that `source` names.

    Args:
        source: the path of a file or of a Minari data set's folder; the name of local data written by `minrnn
            make-data`, such as local/Hopper-v5-medium; the name of one of D4RL's locomotion data sets, such
            as hopper-medium-v2, which is downloaded on first use; or the id of a Minari data set on this
            machine, such as mujoco/hopper/medium-v0.
        environment: gymnasium's id; by default the one in the data.

    Raises:
        ValueError: there is no such source, or its content is invalid: see `read_episodes`.
        OSError: it cannot be downloaded.
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
    hint = f"{nearest(source, D4RL_NAMES)}; Minari's data sets are looked for in {minari_folder('')}"
    raise ValueError(
        f"find_episodes: source must be an existing file or folder, a name of local data, one of D4RL's data "
        f"sets or the id of one of Minari's that is on this machine, got {source!r}{hint}"
    )


def fetch_d4rl(name: str, url: str | None = None) -> Path:
    """Return the path of one of D4RL's locomotion files (version 2), downloaded once.

    The file has D4RL's name (hopper_medium-v2.hdf5) in the folder MINRNN_DATA or in the cache folder;
    otherwise it is downloaded to the cache folder. Its SHA-256 is verified in each case.

    Args:
        name: the data set, such as hopper-medium-v2.
        url: the folder to download from; by default MINRNN_D4RL_URL if set, else the original.

    Raises:
        ValueError: there is no such data set, or the SHA-256 of the file differs; a download is not kept.
        OSError: the download failed; the message says where to put the file by hand.
    """
    if name not in D4RL_SHA256:
        hint = nearest(name, D4RL_NAMES) or f"; their names are like {D4RL_NAMES[0]}"
        raise ValueError(f"fetch_d4rl: name must be one of D4RL's locomotion data sets, got {name!r}{hint}")
    file_name, sha256 = _file_name(name), D4RL_SHA256[name]
    if supplied := supplied_file(file_name):
        check_digest("fetch_d4rl", supplied, sha256, f"D4RL's {name}")
        return supplied
    url = url or os.environ.get("MINRNN_D4RL_URL") or D4RL_URL
    return download("fetch_d4rl", f"{url}/{file_name}", file_name, sha256=sha256)


def local_name(environment: str, quality: str, seed: int = 0) -> str:
    """Return the name of local data: local/Hopper-v5-medium, with a suffix such as -seed1 for seeds above 0.

    Args:
        environment: gymnasium's id.
        quality: random, medium, medium-replay or medium-expert.
        seed: seed of training and recording.
    """
    which = f"-seed{seed}" if seed else ""
    # An id may include a module and a namespace: rooms.grid:grids/Small-v0.
    safe = re.sub(r"[^\w.-]", "-", environment)
    return f"{LOCAL_FOLDER}{safe}-{quality}{which}"


def local_path(name: str) -> Path:
    """Return the path of local data: a file in the cache folder."""
    return cache_folder() / f"{name}.hdf5"


def minari_folder(name: str) -> Path:
    """Return Minari's folder of a data set, below MINARI_DATASETS_PATH or ~/.minari/datasets."""
    return (folder_from("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets") / name


def _find_local(name: str) -> Path:
    """Return the file of local data, from the folder MINRNN_DATA or from the cache folder."""
    path = supplied_file(f"{name}.hdf5") or local_path(name)
    if not path.is_file():
        raise ValueError(
            f"find_episodes: {name} does not exist, got no {path}; create it with `minrnn make-data`"
        )
    return path


def _file_name(name: str) -> str:
    """Return D4RL's file name: halfcheetah_medium_replay-v2.hdf5 for halfcheetah-medium-replay-v2."""
    stem, _, version = name.rpartition("-")
    return f"{stem.replace('-', '_')}-{version}.hdf5"


def _reference(name: str) -> Reference:
    return REFERENCES[name.split("-")[0]]
