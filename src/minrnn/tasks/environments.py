"""Gymnasium environments by name, with errors that name what is missing or misspelled."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

from minrnn.files import nearest
from minrnn.tasks.spaces import ActionSpace

if TYPE_CHECKING:
    import gymnasium

    Environment: TypeAlias = gymnasium.Env[Any, Any]

INSTALL = "install it with pip install 'minrnn[rl]'"


def make_environment(name: str, **options: Any) -> Environment:
    """Return gymnasium's environment `name`.

    Args:
        name: gymnasium's id, such as Hopper-v5, rooms/Grid-v0, or package.module:Grid-v0, which imports the
            module.
        options: further arguments of gymnasium.make, such as render_mode.

    Raises:
        ValueError: there is no environment of that name or version; the message suggests the nearest.
        ImportError: gymnasium or a dependency of the environment is not installed; the message names the
            extra to install.
    """
    try:
        import gymnasium
        from gymnasium import error
    except ImportError as missing:
        raise ImportError(
            f"make_environment: {name} needs gymnasium, which is not installed; {INSTALL}"
        ) from missing
    module, _, registered = name.rpartition(":")
    try:
        if registered in gymnasium.registry or not module:
            _redirect_mujoco_warnings(registered)
        with warnings.catch_warnings():  # the version was requested explicitly
            warnings.filterwarnings("ignore", message=".*out of date.*", category=DeprecationWarning)
            return gymnasium.make(name, **options)
    except (error.DependencyNotInstalled, ImportError) as missing:
        hint = "for a module in this folder, set PYTHONPATH=." if module else f"for MuJoCo's, {INSTALL}"
        raise ImportError(
            f"make_environment: {name} needs a package that is not installed ({missing}); {hint}"
        ) from missing
    except (error.Error, ValueError, TypeError) as unknown:
        # An unknown name or version, an invalid name, or an error of the environment's constructor.
        if registered in gymnasium.registry:
            raise ValueError(f"make_environment: {name} cannot be made: {unknown}") from unknown
        hint = nearest(registered, gymnasium.registry) or "; gymnasium.pprint_registry() lists all"
        raise ValueError(
            f"make_environment: name must be an id registered in gymnasium, got {name!r}{hint}"
        ) from unknown


def known_actions(name: str, *, by_user: bool) -> ActionSpace | None:
    """Return the action space of an environment, or None if the environment cannot be made.

    Args:
        name: gymnasium's id.
        by_user: whether the user gave the name. A name from a data file is not trusted: no module is imported
            for it, and the environment need not exist here.

    Raises:
        ValueError: policies do not support the action space; or the user's name is unknown.
    """
    module = name.rpartition(":")[0]
    if not by_user and module and module not in sys.modules:
        return None
    try:
        environment = make_environment(name)
    except ImportError:
        return None
    except (ValueError, RuntimeError, OSError):
        if by_user:
            raise
        return None
    try:
        return ActionSpace.from_gymnasium(environment.action_space)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    finally:
        environment.close()


def _redirect_mujoco_warnings(name: str) -> None:
    """Turn MuJoCo's warnings, which it writes to a file in the working folder, into Python warnings.

    The one about a deprecated spelling in gymnasium's models of older robots is dropped.
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
