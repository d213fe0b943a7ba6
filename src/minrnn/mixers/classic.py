"""torch.nn's own RNN, GRU and LSTM as mixers: the baselines, trained by backpropagation through time."""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_flag, read_number
from minrnn.mixers.graphs import may_vary, refuse_export
from minrnn.mixers.mixer import Mixer, PartForm, State
from minrnn.ops.torch_private import computes_on_onednn
from minrnn.ops.transforms import in_autocast, without_autocast


class ClassicMixer(Mixer):
    """One layer of a torch.nn recurrent network as a mixer.

    torch.nn's layers have no reset: the time axis is split at each step where any row resets, and the state
    of that row is zeroed there.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output and of the state.
        bias: whether the layer has biases.
    """

    layer: ClassVar[type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]]

    def __init__(self, d_model: int, d_hidden: int, *, bias: bool = True) -> None:
        super().__init__(d_model, d_hidden)
        self.rnn = self.layer(
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
            f"{type(self).__name__}: reset must be None in an exported program, as its values split time"
        )
        starts = reset.any(dim=0).nonzero().flatten().tolist()
        cuts = sorted({0, x.shape[1], *starts})
        outputs = []
        for start, stop in pairwise(cuts):
            y, state = self._run(x[:, start:stop], _forget(state, reset[:, start]))
            outputs.append(y)
        assert state is not None  # there is at least one part
        return torch.cat(outputs, dim=1), state

    def _run(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Run the layer; torch.nn's states have an axis of layers before the batch, a mixer's have none."""
        layered = None if state is None else tuple(part.unsqueeze(0) for part in state)
        y, last = self.rnn(x, self._unwrap(layered))
        return y, tuple(part.squeeze(0) for part in self._wrap(last))

    def _unwrap(self, state: State | None) -> Tensor | State | None:
        """Convert the state to the layer's form: a tuple of one tensor is that tensor."""
        return state[0] if state is not None and len(self.state_names) == 1 else state

    def _wrap(self, state: Tensor | State) -> State:
        return (state,) if isinstance(state, Tensor) else state


class RNNMixer(ClassicMixer):
    """torch.nn.RNN with tanh as a mixer; the state is h `(B, d_hidden)`."""

    state_names = ("h",)
    layer = nn.RNN


class GatedClassicMixer(ClassicMixer):
    """A torch.nn network whose second block of rows is the gate that keeps the state: GRU's z, LSTM's f.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output and of the state.
        bias: whether the layer has biases.
        forget_bias: added to that gate's bias at initialization, so that the layer forgets slowly at first
            (Jozefowicz et al., 2015); 0 is torch's initialization.

    Raises:
        ValueError: a forget_bias is given without bias.
    """

    def __init__(self, d_model: int, d_hidden: int, *, bias: bool = True, forget_bias: float = 0.0) -> None:
        super().__init__(d_model, d_hidden, bias=bias)
        added = read_number(type(self).__name__, "forget_bias", forget_bias)
        if added and not bias:
            raise ValueError(
                f"{type(self).__name__}: forget_bias={added} needs a bias; drop it or set bias=True"
            )
        if added:
            with torch.no_grad():
                self.rnn.get_parameter("bias_ih_l0")[self.d_hidden : 2 * self.d_hidden] += added


class GRUMixer(GatedClassicMixer):
    """torch.nn.GRU as a mixer; the state is h `(B, d_hidden)`."""

    state_names = ("h",)
    layer = nn.GRU


class LSTMMixer(GatedClassicMixer):
    """torch.nn.LSTM as a mixer; the state is h and c, each `(B, d_hidden)`."""

    state_names = ("h", "c")
    layer = nn.LSTM

    def _run(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Run the layer; outside of autocast where the processor has no LSTM in autocast's dtype.

        torch.autocast hands an LSTM on the CPU to oneDNN, which raises without AVX-512 or AMX (torch 2.13).
        """
        if _runs_under_autocast(x):
            return super()._run(x, state)
        dtype = self.rnn.get_parameter("weight_ih_l0").dtype
        state = None if state is None else tuple(part.to(dtype) for part in state)
        with without_autocast(x):
            return super()._run(x.to(dtype), state)


def _forget(state: State | None, rows: Tensor) -> State | None:
    """Zero the state of the marked rows `(B,)`."""
    if state is None:
        return None
    return tuple(part.masked_fill(rows.unsqueeze(1), 0) for part in state)


def _runs_under_autocast(x: Tensor) -> bool:
    """Whether torch's LSTM of x runs in autocast's dtype, where autocast is on."""
    if x.device.type != "cpu" or not in_autocast(x) or not torch.backends.mkldnn.is_available():
        return True
    return computes_on_onednn(torch.get_autocast_dtype("cpu"))
