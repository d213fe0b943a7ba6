"""Gymnasium's environments, made by name: an error says what is missing or misspelled."""

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
        name: gymnasium's id, such as Hopper-v5, rooms/Grid-v0, or package.module:Grid-v0, for which the
            module is imported.
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
    module, _, registered = name.rpartition(":")
    try:
        if registered in gymnasium.registry or not module:
            _redirect_mujoco_warnings(registered)
        with warnings.catch_warnings():  # that there is a newer version is no news to who names this one
            warnings.filterwarnings("ignore", message=".*out of date.*", category=DeprecationWarning)
            return gymnasium.make(name, **options)
    except (error.DependencyNotInstalled, ImportError) as missing:
        hint = "for one in this folder, set PYTHONPATH=." if module else f"for MuJoCo's, {INSTALL}"
        raise ImportError(
            f"make_environment: {name} needs what is not installed ({missing}); {hint}"
        ) from missing
    except (error.Error, ValueError, TypeError) as unknown:
        # Not registered, no such version, or no name at all; or what its own constructor says.
        if registered in gymnasium.registry:
            raise ValueError(f"make_environment: {name} cannot be made: {unknown}") from unknown
        hint = nearest(registered, gymnasium.registry) or "; gymnasium.pprint_registry() lists all"
        raise ValueError(
            f"make_environment: name must be one that gymnasium knows, got {name!r}{hint}"
        ) from unknown


def known_actions(name: str, *, by_user: bool) -> ActionSpace | None:
    """Return what an environment takes for an action; None where it cannot be made here.

    Args:
        name: gymnasium's id.
        by_user: whether the user named it. Otherwise data did, on whose word no module is imported, and which
            may have been recorded in what is not here.

    Raises:
        ValueError: no policy here acts in such an environment; or the user's name is of none.
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
