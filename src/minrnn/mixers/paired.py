"""MinLSTM with the pair of states that torch.nn.LSTM has."""

from dataclasses import dataclass, field

from torch import Tensor

from minrnn.mixers.cell import MinRNNCellBase
from minrnn.mixers.layer import Input, MinRNNBase

Pair = tuple[Tensor, Tensor]
"""torch.nn.LSTM's state, (h, c)."""


@dataclass(eq=False, repr=False)
class PairedMinLSTM(MinRNNBase):
    """A `MinLSTM` that takes and returns `torch.nn.LSTM`'s pair of states, (h, c).

    What nn.LSTM carries along is c[t] = f[t] c[t-1] + i[t] g[t]. A minLSTM has the same recurrence and drops
    the output gate behind it, so its h is its c:

    - it returns h_n twice, as (h_n, c_n);
    - of (h_0, c_0) it starts from c_0. h_0 must fit but is not read: in nn.LSTM nothing but `weight_hh`
      reads it, which a minLSTM does not have.

    A pair that it returned, passed to it again, continues where it stopped.
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
            ValueError: h_0 has not the shape of c_0, or as `MinLSTM.forward`.
        """
        c_0 = _carried(type(self).__name__, hx)
        output, h_n = self._run(input, c_0, reset, cu_seqlens)
        return output, (h_n, h_n.clone())  # two tensors: the caller may change one in place


@dataclass(eq=False, repr=False)
class PairedMinLSTMCell(MinRNNCellBase):
    """A `MinLSTMCell` that takes and returns `torch.nn.LSTMCell`'s pair (h, c); see `PairedMinLSTM`."""

    gate = "minlstm"
    normalize: bool = field(default=True, kw_only=True)

    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        """Run `MinLSTMCell.forward`, with hx = (h, c), and return (h', c').

        Raises:
            TypeError: hx is not a pair of tensors.
            ValueError: h has not the shape of c, or as `MinLSTMCell.forward`.
        """
        h = self._advance(input, _carried(type(self).__name__, hx))
        return h, h.clone()


def _carried(name: str, hx: Pair | None) -> Tensor | None:
    """Return what a minLSTM starts from, of nn.LSTM's pair."""
    if hx is None:
        return None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(x, Tensor) for x in hx):
        raise TypeError(f"{name}: hx must be the pair (h, c) of tensors, got {type(hx).__name__}")
    h, c = hx
    if h.shape != c.shape:
        raise ValueError(f"{name}: h and c must be of one shape, got {tuple(h.shape)} and {tuple(c.shape)}")
    return c
