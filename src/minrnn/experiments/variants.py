"""The compared models: every mixer, and named variants of some."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from minrnn.files import nearest
from minrnn.mixers import MIXERS
from minrnn.models import ModelConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "minlstm-unnormalised": {"mixer": "minlstm", "normalize": False},
    "mingru-signed": {"mixer": "mingru", "signed": True},
    "minlstm-signed": {"mixer": "minlstm", "signed": True},
    "transformer": {"mixer": "attention", "conv_width": 0, "mlp_ratio": 4.0},
}
"""Model settings of each variant; a mixer's own name selects its default settings."""

ROUNDED = (
    "While training, the factors of matrix products are rounded to bfloat16 (not those of attention, "
    "which that slows down on a CPU)."
)
"""A note on the precision of the cpu scales."""

_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)}


def settings_of(name: str) -> dict[str, Any]:
    """Return the settings of a name, as fields of ModelConfig."""
    return dict(VARIANTS[name]) if name in VARIANTS else {"mixer": name}


def model_of(name: str, **settings: Any) -> ModelConfig:
    """Return a model's configuration, in which a name's own settings override the given ones."""
    return ModelConfig(**settings | settings_of(name))


def every_mixer(*variants: str) -> list[str]:
    """Return all mixers, and those of the named variants whose settings exist in ModelConfig."""
    return [*MIXERS, *(name for name in variants if VARIANTS[name].keys() <= _FIELDS)]


def choose(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the selected names, or all if none are selected.

    Raises:
        ValueError: a name is unknown; the message suggests the nearest one.
    """
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"reproduce: mixers must be among {', '.join(names)}, got {name!r}{nearest(name, names)}"
            )
    return [name for name in names if not wanted or name in wanted]
