"""Weights of the package minGRU-pytorch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers.mingru import MinGRU
from minrnn.mixers.minlstm import MinLSTM
from minrnn.ops import GATES

_LAYERS: dict[str, type[MinGRU] | type[MinLSTM]] = {
    "to_hidden_and_gate.weight": MinGRU,
    "to_hidden_and_f_i_gate.weight": MinLSTM,
}
"""Our layer for each name that the weight of theirs has."""

_OUTPUT = "to_out.weight"


def from_mingru_pytorch(
    source: nn.Module | Mapping[str, Tensor],
) -> tuple[MinGRU | MinLSTM, nn.Linear | nn.Identity]:
    """Load a trained layer of the package minGRU-pytorch.

    Its modules are `minGRU(dim, expansion_factor, proj_out)` and `minLSTM` of the same arguments. The rows of
    their weights are [candidate; gates]; ours are [gates; candidate]. They have no biases. With x `(B, T,
    dim)` and `prev_hidden` `(B, 1, int(dim * expansion_factor))` there, here

        layer, to_out = from_mingru_pytorch(module)
        output, h_n = layer(x, prev_hidden.transpose(0, 1))       h_0, h_n: (1, B, hidden_size)
        y = to_out(output)                                        their output

    The results differ by rounding. minLSTM's also differ where T > 1 and `prev_hidden` is given: that package
    then passes `prev_hidden` through the candidate's function, at T = 1 it does not.

    Args:
        source: a minGRU or minLSTM of that package, or its state_dict. Of a larger model, pass the submodule.

    Returns:
        layer: `MinGRU` or `MinLSTM` from dim to int(dim * expansion_factor) channels, with bias=False and
            batch_first=True, of the weights' device and dtype.
        to_out: the projection back to dim, without bias; nn.Identity where theirs has none.

    Raises:
        TypeError: source is neither a module nor a mapping of names to tensors.
        ValueError: its parameters are not those of such a module.
    """
    name, weight, back = _read(source)
    kind = _LAYERS[name]
    candidate, *gates = weight.chunk(GATES[kind.gate].num_pre)
    hidden_size, dim = candidate.shape
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    layer = kind(dim, hidden_size, bias=False, batch_first=True, **factory)
    layer.load_state_dict({"weight_ih_l0": torch.cat([*gates, candidate])})
    if back is None:
        return layer, nn.Identity()
    to_out = nn.Linear(hidden_size, dim, bias=False, **factory)
    to_out.load_state_dict({"weight": back})
    return layer, to_out


def _read(source: nn.Module | Mapping[str, Tensor]) -> tuple[str, Tensor, Tensor | None]:
    """Return the name of the layer's weight, the weight, and the weight of the projection back, if any."""
    parameters = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(parameters, Mapping) or not all(isinstance(x, Tensor) for x in parameters.values()):
        raise TypeError(
            "from_mingru_pytorch: source must be a minGRU or minLSTM of minGRU-pytorch, or its state_dict, "
            f"got {type(source).__name__}"
        )
    names = list(parameters.keys() - {_OUTPUT})
    if len(names) != 1 or names[0] not in _LAYERS:
        raise ValueError(
            f"from_mingru_pytorch: source must have the parameter {' or '.join(_LAYERS)}, and may have "
            f"{_OUTPUT}, got {', '.join(parameters) or 'none'}; of a larger model, pass one layer"
        )
    weight, back = parameters[names[0]], parameters.get(_OUTPUT)
    num_pre = GATES[_LAYERS[names[0]].gate].num_pre
    if weight.dim() != 2 or weight.shape[0] % num_pre:
        form = f"({num_pre} * hidden_size, dim)"
        raise ValueError(f"from_mingru_pytorch: {names[0]} must be {form}, got {tuple(weight.shape)}")
    form_back = (weight.shape[1], weight.shape[0] // num_pre)
    if back is not None and back.shape != form_back:
        raise ValueError(f"from_mingru_pytorch: {_OUTPUT} must be {form_back}, got {tuple(back.shape)}")
    return names[0], weight, back
