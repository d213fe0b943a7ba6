"""Gymnasium's environments, made by name: an error says what is missing or misspelt."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gymnasium

INSTALL = "install it with pip install 'minrnn[rl]'"


def make_environment(name: str, **options: Any) -> gymnasium.Env[Any, Any]:
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
