"""A step that keeps its state in buffers of the program, for runtimes that have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minrnn.export.models import Interface
from minrnn.export.program import Port

RESET = "reset"
"""The input, `(B,)` bool, that clears the state of a row before the step."""


def keep_state(interface: Interface) -> Interface:
    """Turn the state's inputs and outputs of an interface into buffers, and add the input RESET.

    The batch must be fixed.
    """
    ports = [port for port in interface.inputs if port.output is not None]
    given = [port for port in interface.inputs if port.output is None]
    visible = [name for name in interface.outputs if name not in {port.output for port in ports}]
    batch = given[0].axes[0]
    assert isinstance(batch, int)
    reset = Port(RESET, torch.zeros(batch, dtype=torch.bool), (batch,))
    return interface._replace(
        module=_Keeping(interface, ports, given), inputs=(*given, reset), outputs=tuple(visible)
    )


class _Keeping(nn.Module):
    """(inputs, reset) -> outputs, with the state in buffers that start at its first values."""

    def __init__(self, interface: Interface, ports: list[Port], given: list[Port]) -> None:
        super().__init__()
        self.module, self.ports, self.outputs = interface.module, ports, interface.outputs
        self.places = [interface.inputs.index(port) for port in (*given, *ports)]
        for port in ports:
            self.register_buffer(port.name, torch.full_like(port.example, port.initial))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *given, reset = inputs
        states = [self._before(port, reset) for port in self.ports]
        in_order: list[Any] = [None] * len(self.places)
        for place, value in zip(self.places, (*given, *states), strict=True):
            in_order[place] = value
        found = dict(zip(self.outputs, self.module(*in_order), strict=True))
        for port in self.ports:
            self.get_buffer(port.name).copy_(found.pop(port.output))
        return tuple(found.values())

    def _before(self, port: Port, reset: Tensor) -> Tensor:
        """Return a buffer, with the first value in rows that are reset."""
        state = self.get_buffer(port.name)
        rows = reset.reshape([-1 if axis == port.batch_axis else 1 for axis in range(state.dim())])
        return torch.where(rows, torch.full_like(state, port.initial), state)
