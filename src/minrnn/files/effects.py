"""Warnings of settings without effect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any, NamedTuple

from minrnn.files.schema import shown

_SHOWN = (str, int, float, tuple)  # other values have no short form


class NoEffect(NamedTuple):
    """A setting that has no effect while another has certain values."""

    setting: str
    """Name of the setting."""
    other: str
    """Name of the other setting."""
    when: Callable[[Mapping[str, Any]], bool]
    """Whether all settings together are such that `setting` has no effect."""


def warn_without_effect(
    owner: Callable[..., Any], settings: Mapping[str, Any], rules: Iterable[NoEffect], *, stacklevel: int = 3
) -> None:
    """Warn of each setting that differs from its default and has no effect: one line, which says with what.

    Args:
        owner: the function, or the class of the configuration, whose signature has the defaults.
        settings: the values by name.
        rules: the pairs of settings to check; a setting is named once.
        stacklevel: as of `warnings.warn`, counted from here: 3 is the caller of a function, and 4 that of a
            dataclass whose `__post_init__` calls this.
    """
    told: set[str] = set()
    for setting, other, when in rules:
        if setting in told or not when(settings):
            continue
        value = settings[setting]
        if value != signature(owner).parameters[setting].default:
            told.add(setting)
            named = f"{setting}={shown(value)}" if isinstance(value, _SHOWN) else setting
            warnings.warn(
                f"{owner.__name__}: {named} has no effect with {other}={shown(settings[other])}",
                stacklevel=stacklevel,
            )
