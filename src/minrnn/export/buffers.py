"""A step that keeps its state in buffers of the program, for runtimes that have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minrnn.export.models import Interface
from minrnn.export.program import Carried, Port

RESET = "reset"
"""The input, `(B,)` bool, that clears the state of a row before the step."""


def keep_state(interface: Interface) -> Interface:
    """Turn the state's inputs and outputs of an interface into buffers, and add the input RESET.

    The batch must be fixed.
    """
    states = [port.carried for port in interface.inputs if port.carried is not None]
    given = tuple(port for port in interface.inputs if port.carried is None)
    hidden = {state.output for state in states}
    batch = given[0].axes[0]
    assert isinstance(batch, int)
    reset = Port(RESET, torch.zeros(batch, dtype=torch.bool), (batch,))
    return interface._replace(
        module=_Keeping(interface),
        inputs=(*given, reset),
        outputs=tuple(name for name in interface.outputs if name not in hidden),
    )


class _Keeping(nn.Module):
    """(inputs, reset) -> outputs, with the state in buffers that start at its first values."""

    def __init__(self, interface: Interface) -> None:
        super().__init__()
        self.module, self.ports, self.outputs = interface.module, interface.inputs, interface.outputs
        for port in self.ports:
            if port.carried is not None:
                self.register_buffer(port.name, torch.full_like(port.example, port.carried.initial))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *given, reset = inputs
        values = iter(given)
        before = [
            next(values) if port.carried is None else self._before(port.name, port.carried, reset)
            for port in self.ports
        ]
        found = dict(zip(self.outputs, self.module(*before), strict=True))
        for port in self.ports:
            if port.carried is not None:
                self.get_buffer(port.name).copy_(found.pop(port.carried.output))
        return tuple(found.values())

    def _before(self, name: str, carried: Carried, reset: Tensor) -> Tensor:
        """Return a buffer, with the first value in rows that are reset."""
        state = self.get_buffer(name)
        rows = reset.reshape([-1 if axis == carried.batch_axis else 1 for axis in range(state.dim())])
        return torch.where(rows, torch.full_like(state, carried.initial), state)
