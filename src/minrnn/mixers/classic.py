"""torch.nn's own RNN, GRU and LSTM as mixers: the baselines, trained by backpropagation through time."""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_flag
from minrnn.mixers.graphs import may_vary, refuse_export
from minrnn.mixers.mixer import Mixer, PartForm, State


class ClassicMixer(Mixer):
    """One layer of a torch.nn recurrent network under the mixers' contract.

    torch.nn's cells know no reset: time is cut at each step where any row resets, and that row's state is
    zeroed there.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output and of the state.
        bias: whether the cell has biases.
    """

    cell: ClassVar[type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]]

    def __init__(self, d_model: int, d_hidden: int, *, bias: bool = True) -> None:
        super().__init__(d_model, d_hidden)
        self.rnn = self.cell(
            self.d_model, self.d_hidden, bias=read_flag(type(self).__name__, "bias", bias), batch_first=True
        )

    def state_form(self, dtype: torch.dtype) -> tuple[PartForm, ...]:
        return (((self.d_hidden,), dtype),) * len(self.state_names)

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        if may_vary(x.shape[1]):
            refuse_export(
                f"{type(self).__name__}: T must be fixed in an exported program, as torch unrolls its RNNs"
            )
        if reset is None:
            return self._run(x, state)
        refuse_export(
            f"{type(self).__name__}: reset must be None in an exported program, as time is cut by its values"
        )
        starts = reset.any(dim=0).nonzero().flatten().tolist()
        cuts = sorted({0, x.shape[1], *starts})
        outputs = []
        for start, stop in pairwise(cuts):
            y, state = self._run(x[:, start:stop], _forget(state, reset[:, start]))
            outputs.append(y)
        assert state is not None  # there is at least one span
        return torch.cat(outputs, dim=1), state

    def _run(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Run the cell; torch.nn puts a layer axis before the batch, and the contract has none."""
        layered = None if state is None else tuple(part.unsqueeze(0) for part in state)
        y, last = self.rnn(x, self._unwrap(layered))
        return y, tuple(part.squeeze(0) for part in self._wrap(last))

    def _unwrap(self, state: State | None) -> Tensor | State | None:
        """Give the state the form that the cell takes: a tuple of one tensor is that tensor."""
        return state[0] if state is not None and len(self.state_names) == 1 else state

    def _wrap(self, state: Tensor | State) -> State:
        return (state,) if isinstance(state, Tensor) else state


class RNNMixer(ClassicMixer):
    """torch.nn.RNN with tanh under the mixers' contract: state h `(B, d_hidden)`."""

    state_names = ("h",)
    cell = nn.RNN


class GRUMixer(ClassicMixer):
    """torch.nn.GRU under the mixers' contract: state h `(B, d_hidden)`."""

    state_names = ("h",)
    cell = nn.GRU


class LSTMMixer(ClassicMixer):
    """torch.nn.LSTM under the mixers' contract: state h and c, each `(B, d_hidden)`."""

    state_names = ("h", "c")
    cell = nn.LSTM


def _forget(state: State | None, rows: Tensor) -> State | None:
    """Zero the state of the rows `(B,)` that are marked."""
    if state is None:
        return None
    return tuple(part.masked_fill(rows.unsqueeze(1), 0) for part in state)
