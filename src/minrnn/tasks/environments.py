"""Gymnasium's environments, made by name: an error says what is missing or misspelt."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import gymnasium

    Environment: TypeAlias = gymnasium.Env[Any, Any]

INSTALL = "install it with pip install 'minrnn[rl]'"


def make_environment(name: str, **options: Any) -> Environment:
    """Return gymnasium's environment `name`.

    Args:
        name: gymnasium's id, such as Hopper-v5.
        options: passed on to gymnasium.make, such as render_mode.

    Raises:
        ValueError: there is no environment of that name or version; the nearest is named.
        ImportError: gymnasium, or what the environment needs, is not installed; the extra is named.
    """
    try:
        import gymnasium
        from gymnasium import error
    except ImportError as missing:
        raise ImportError(
            f"make_environment: {name} needs gymnasium, which is not here; {INSTALL}"
        ) from missing
    try:
        _hear_mujoco(name)
        with warnings.catch_warnings():  # that there is a newer version is no news to who names this one
            warnings.filterwarnings("ignore", message=".*out of date.*", category=DeprecationWarning)
            return gymnasium.make(name, **options)
    except (error.DependencyNotInstalled, ImportError) as missing:
        raise ImportError(
            f"make_environment: {name} needs what is not installed ({missing}); for MuJoCo's, {INSTALL}"
        ) from missing
    except error.Error as unknown:  # not registered, no such version, or no name at all
        near = difflib.get_close_matches(name, gymnasium.registry, n=1)
        hint = f"did you mean {near[0]}?" if near else "gymnasium.pprint_registry() lists all"
        raise ValueError(
            f"make_environment: name must be one that gymnasium knows, got {name!r}; {hint}"
        ) from (unknown)


def _hear_mujoco(name: str) -> None:
    """Turn MuJoCo's warnings, which it would write into a file in the working folder, into Python's.

    But for one on a spelling in gymnasium's own description of older robots, which is nobody's concern here.
    """
    import gymnasium

    if not str(gymnasium.spec(name).entry_point).startswith("gymnasium.envs.mujoco"):
        return
    import mujoco

    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_warn)


def _warn(text: str) -> None:
    if "settotalmass" not in text:
        warnings.warn(f"MuJoCo: {text}", RuntimeWarning, stacklevel=2)
