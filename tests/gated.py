"""The gated recurrences that tests of layers, cells and mixers sweep: every gate, in every form."""

from inspect import signature
from typing import Any

from minrnn.mixers import GATED_RNNS
from minrnn.ops import GATES

LAYERS: dict[str, Any] = {name: modules.layer for name, modules in GATED_RNNS.items()}
CELLS: dict[str, Any] = {name: modules.cell for name, modules in GATED_RNNS.items()}

RECURRENCES: dict[str, tuple[str, dict[str, bool]]] = {
    **{name: (name, {}) for name in GATED_RNNS},
    **{f"{name}, signed": (name, {"signed": True}) for name in GATED_RNNS if GATES[name].can_be_signed},
    **{
        f"{name}, unnormalized": (name, {"normalize": False})
        for name, layer in LAYERS.items()
        if "normalize" in signature(layer).parameters
    },
}
"""A gate and the options of its modules, for each recurrence that they can be."""
