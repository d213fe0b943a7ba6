"""Put minGRU and minLSTM where a model has torch.nn's GRU and LSTM."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from minrnn.mixers.layer import Input
from minrnn.mixers.mingru import MinGRU, MinGRUCell
from minrnn.mixers.minlstm import MinLSTM, MinLSTMCell

Pair = tuple[Tensor, Tensor]
"""torch.nn.LSTM's state, (h, c)."""


class PairedMinLSTM(MinLSTM):
    """A `MinLSTM` that takes and returns `torch.nn.LSTM`'s pair of states, (h, c).

    What nn.LSTM carries along is c[t] = f[t] c[t-1] + i[t] g[t]. A minLSTM has the same recurrence and drops
    the output gate behind it, so its h is its c:

    - it returns h_n twice, as (h_n, c_n);
    - of (h_0, c_0) it starts from c_0. h_0 must fit but is not read: in nn.LSTM nothing but `weight_hh`
      reads it, which a minLSTM does not have.

    A pair that it returned, passed to it again, continues where it stopped.
    """

    def forward(  # type: ignore[override]  # a pair, as torch.nn.LSTM's
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
        output, h_n = super().forward(input, c_0, reset=reset, cu_seqlens=cu_seqlens)
        return output, (h_n, h_n.clone())  # two tensors: the caller may change one in place


class PairedMinLSTMCell(MinLSTMCell):
    """A `MinLSTMCell` that takes and returns `torch.nn.LSTMCell`'s pair (h, c); see `PairedMinLSTM`."""

    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:  # type: ignore[override]  # the same
        """Run `MinLSTMCell.forward`, with hx = (h, c), and return (h', c').

        Raises:
            TypeError: hx is not a pair of tensors.
            ValueError: h has not the shape of c, or as `MinLSTMCell.forward`.
        """
        h = super().forward(input, _carried(type(self).__name__, hx))
        return h, h.clone()


def convert_rnns(module: nn.Module, *, candidate: str = "positive", signed: bool = False) -> nn.Module:
    """Replace every GRU and LSTM of torch.nn inside a model by its min counterpart, with fresh weights.

        nn.GRU -> MinGRU     nn.LSTM -> PairedMinLSTM     nn.GRUCell -> MinGRUCell
        nn.LSTMCell -> PairedMinLSTMCell

    Inputs, outputs and states keep their shapes, so the model around them runs as it is. Sizes, layers,
    directions, bias, dropout, training mode, device, dtype, and which parameters require gradients are
    taken over; a module that stands in two places still does. Weights cannot be: they are drawn anew, from
    the global generator. nn.RNN is left alone. Either everything is replaced, or an error is raised first.

    Args:
        module: the model, changed in place; or a GRU or LSTM itself.
        candidate: as in `MinGRU`: unless signed, with "positive" no state falls below zero, with "tanh" they
            lie between -1 and 1 like those of a GRU.
        signed: as in `MinGRU` and `MinLSTM`: lets them track states that a GRU can, such as parity.

    Returns:
        The module; the replacement if the module itself is a GRU or LSTM.

    Raises:
        TypeError: one is of a subclass of torch.nn's, or has hooks: they would be lost.
        ValueError: one has a projection (proj_size), or the candidate is unknown.

    Example:
        >>> model = nn.Sequential(nn.Embedding(50, 10), nn.GRU(10, 20, num_layers=2, batch_first=True))
        >>> convert_rnns(model)
        Sequential(
          (0): Embedding(50, 10)
          (1): MinGRU(10, 20, num_layers=2, batch_first=True)
        )
    """
    found: dict[nn.Module, str] = {
        child: path
        for path, child in module.named_modules()
        if isinstance(child, (nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell))
    }
    for child, path in found.items():
        _check_convertible(child, path)
    replacements = {child: _counterpart(child, candidate, signed) for child in found}
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if path and child in replacements:
            module.set_submodule(path, replacements[child])
    return replacements.get(module, module)


def _counterpart(old: Any, candidate: str, signed: bool) -> nn.Module:
    """Make what replaces a torch.nn recurrent module."""
    new = _COUNTERPARTS[type(old)](old, candidate, signed)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    return new.train(old.training)


def _layer(kind: type[MinGRU] | type[MinLSTM]) -> Callable[[Any, str, bool], nn.Module]:
    return lambda old, candidate, signed: kind(
        old.input_size,
        old.hidden_size,
        num_layers=old.num_layers,
        bias=old.bias,
        batch_first=old.batch_first,
        dropout=old.dropout,
        bidirectional=old.bidirectional,
        candidate=candidate,
        signed=signed,
        device=old.weight_ih_l0.device,
        dtype=old.weight_ih_l0.dtype,
    )


def _cell(kind: type[MinGRUCell] | type[MinLSTMCell]) -> Callable[[Any, str, bool], nn.Module]:
    return lambda old, candidate, signed: kind(
        old.input_size,
        old.hidden_size,
        bias=old.bias,
        candidate=candidate,
        signed=signed,
        device=old.weight_ih.device,
        dtype=old.weight_ih.dtype,
    )


_COUNTERPARTS: dict[type[nn.Module], Callable[[Any, str, bool], nn.Module]] = {
    nn.GRU: _layer(MinGRU),
    nn.LSTM: _layer(PairedMinLSTM),
    nn.GRUCell: _cell(MinGRUCell),
    nn.LSTMCell: _cell(PairedMinLSTMCell),
}


def _check_convertible(old: Any, path: str) -> None:
    where = f"module {path!r}" if path else "the module"
    if type(old) not in _COUNTERPARTS:
        raise TypeError(
            f"convert_rnns: {where} must be torch.nn's own, got its subclass {type(old).__name__}, whose own "
            "behaviour would be lost; replace it by hand (a parametrized module: remove that first)"
        )
    if getattr(old, "proj_size", 0):
        raise ValueError(
            f"convert_rnns: {where} must have no projection, got proj_size={old.proj_size}; "
            "use an LSTM followed by a linear layer"
        )
    if any((old._forward_pre_hooks, old._forward_hooks, old._backward_pre_hooks, old._backward_hooks)):
        raise TypeError(f"convert_rnns: {where} must have no hooks: they would be lost; remove them first")


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
