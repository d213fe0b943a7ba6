"""MinLSTM with torch.nn.LSTM's pair of states."""

from dataclasses import dataclass, field

from torch import Tensor

from minrnn.mixers.cell import MinRNNCellBase
from minrnn.mixers.layer import Input, MinRNNBase

Pair = tuple[Tensor, Tensor]
"""torch.nn.LSTM's state, (h, c)."""


@dataclass(eq=False, repr=False)
class PairedMinLSTM(MinRNNBase):
    """A `MinLSTM` with `torch.nn.LSTM`'s pair of states, (h, c).

    nn.LSTM's recurrence is c[t] = f[t] c[t-1] + i[t] g[t]. A minLSTM has the same one without the output gate
    after it, so its h is its c:

    - it returns h_n twice, as (h_n, c_n);
    - of (h_0, c_0) it starts from c_0. h_0 must have the right shape but is not read: in nn.LSTM it is only
      multiplied by `weight_hh`, which a minLSTM does not have.

    A returned pair, passed in again, continues the sequence. The constructor's arguments are `MinLSTM`'s.
    """

    gate = "minlstm"
    normalize: bool = field(default=True, kw_only=True)

    def forward(
        self,
        input: Input,
        hx: Pair | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Input, Pair]:
        """Run `MinLSTM.forward`, with hx = (h_0, c_0), and return output, (h_n, c_n).

        Raises:
            TypeError: hx is not a pair of tensors, or as `MinLSTM.forward`.
            ValueError: h_0 and c_0 have different shapes, or as `MinLSTM.forward`.
        """
        c_0 = _read_pair(type(self).__name__, hx)
        output, h_n = self._run(input, c_0, reset, cu_seqlens)
        return output, (h_n, h_n.clone())  # two tensors: the caller may change one in place


@dataclass(eq=False, repr=False)
class PairedMinLSTMCell(MinRNNCellBase):
    """A `MinLSTMCell` with `torch.nn.LSTMCell`'s pair of states, (h, c); see `PairedMinLSTM`."""

    gate = "minlstm"
    normalize: bool = field(default=True, kw_only=True)

    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        """Run `MinLSTMCell.forward`, with hx = (h, c), and return (h', c').

        Raises:
            TypeError: hx is not a pair of tensors.
            ValueError: h and c have different shapes, or as `MinLSTMCell.forward`.
        """
        h = self._advance(input, _read_pair(type(self).__name__, hx))
        return h, h.clone()


def _read_pair(name: str, hx: Pair | None) -> Tensor | None:
    """Return the state that a minLSTM starts from: c of nn.LSTM's pair."""
    if hx is None:
        return None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(x, Tensor) for x in hx):
        raise TypeError(f"{name}: hx must be the pair (h, c) of tensors, got {type(hx).__name__}")
    h, c = hx
    if h.shape != c.shape:
        raise ValueError(f"{name}: h and c must be of one shape, got {tuple(h.shape)} and {tuple(c.shape)}")
    return c
