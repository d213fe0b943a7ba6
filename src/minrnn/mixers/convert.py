"""Conversion of models: torch.nn's GRUs and LSTMs are replaced by minGRU and minLSTM."""

import functools
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from minrnn.mixers.arguments import read_choice, read_flag
from minrnn.mixers.cell import MinRNNCellBase
from minrnn.mixers.layer import MinRNNBase
from minrnn.mixers.mingru import MinGRU, MinGRUCell
from minrnn.mixers.paired import PairedMinLSTM, PairedMinLSTMCell
from minrnn.ops import CANDIDATES

_Place = tuple[nn.Module, str]
"""A module, and the name of a parameter in it."""


def convert_rnns(module: nn.Module, *, candidate: str = "positive", signed: bool = False) -> nn.Module:
    """Replace every torch.nn GRU and LSTM in a model by its counterpart, with new weights.

        nn.GRU -> MinGRU     nn.LSTM -> PairedMinLSTM     nn.GRUCell -> MinGRUCell
        nn.LSTMCell -> PairedMinLSTMCell

    Inputs, outputs and states keep their shapes, so the rest of the model need not change. Sizes, layers,
    directions, bias, dropout, training mode, device, dtype, requires_grad, and attributes that were set on a
    module or a parameter are copied. A module that is used in several places still is, and parameters that
    are shared between replaced modules stay shared. Weights cannot be copied: they are drawn anew from the
    global generator; create optimizers afterwards. nn.RNN is not replaced. An error is raised before anything
    is changed. A warning names what was skipped: scripted, traced and quantized modules, and references that
    are not registered submodules, such as modules in a Python list.

    In training, their outputs must not be modified in place, for example by nn.Dropout(inplace=True), as
    torch.nn's own may be on the CPU; see `MinGRU`.

    Args:
        module: the model, changed in place; or a GRU or LSTM itself.
        candidate: as in `MinGRU`. Unless signed, states are not negative with "positive", and in (-1, 1) with
            "tanh", as those of a GRU.
        signed: as in `MinGRU` and `MinLSTM`; with it they can track states that a GRU can, such as parity.

    Returns:
        The module; the replacement if the module itself is a GRU or LSTM.

    Raises:
        TypeError: an argument has the wrong type; or one of the modules is of a subclass of torch.nn's, is
            compiled, or has hooks, its own forward, additional parameters, buffers or submodules, or sharded
            parameters, all of which would be lost.
        ValueError: one has a projection (proj_size) or parameters on several devices or in several dtypes,
            shares a parameter with a module that is not replaced, or the candidate is unknown.

    Example:
        >>> model = nn.Sequential(nn.Embedding(50, 10), nn.GRU(10, 20, num_layers=2, batch_first=True))
        >>> convert_rnns(model)
        Sequential(
          (0): Embedding(50, 10)
          (1): MinGRU(10, 20, num_layers=2, batch_first=True)
        )
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_rnns: module must be a torch.nn.Module, got {type(module).__name__}")
    candidate = read_choice("convert_rnns", "candidate", candidate, CANDIDATES)
    signed = read_flag("convert_rnns", "signed", signed)
    found: dict[nn.Module, str] = {
        child: path
        for path, child in module.named_modules()
        if isinstance(child, (nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell))
    }
    for child, path in found.items():
        _check_convertible(child, path)
    ties = _find_ties(module, found)
    passed_over = [*_find_foreign(module), *_find_unregistered(module, found)]
    replacements = {child: _counterpart(child, candidate, signed) for child in found}
    _replace(module, replacements, ties)
    if passed_over:
        warnings.warn(f"convert_rnns: left as it was: {'; '.join(passed_over)}", stacklevel=2)
    return replacements.get(module, module)


def _replace(module: nn.Module, replacements: dict[nn.Module, nn.Module], ties: list[list[_Place]]) -> None:
    """Put the replacements in the model, wherever a module is used, with the parameters that they share."""
    for (first, name), *others in ties:
        for child, other in others:
            setattr(replacements[child], other, getattr(replacements[first], name))
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if path and child in replacements:
            module.set_submodule(path, replacements[child])


def _counterpart(old: Any, candidate: str, signed: bool) -> nn.Module:
    """Make the replacement of a torch.nn recurrent module."""
    new = _COUNTERPARTS[type(old)](old, candidate, signed)
    for name, parameter in new.named_parameters():
        theirs = getattr(old, name)
        parameter.requires_grad_(theirs.requires_grad)
        vars(parameter).update(vars(theirs))
    for name in _own_attributes(old):
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def _own_attributes(old: Any) -> list[str]:
    """Return the names of the attributes of a torch.nn recurrent module that its constructor did not set."""
    usual = vars(type(old)(1, 1, device="meta"))
    return [name for name in vars(old) if name not in usual]


def _layer(kind: type[MinRNNBase]) -> Callable[[Any, str, bool], nn.Module]:
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


def _cell(kind: type[MinRNNCellBase]) -> Callable[[Any, str, bool], nn.Module]:
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
    where = _where(path)
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
    parameters = dict(old.named_parameters())
    hooked = [old, *parameters.values()]
    if any(
        getattr(x, name, None) for x in hooked for name in {*vars(old), *_HOOKS} if name.endswith("_hooks")
    ):
        raise TypeError(f"convert_rnns: {where} must have no hooks: they would be lost; remove them first")
    lost = [name for name in parameters if not name.startswith(("weight_", "bias_"))]
    lost += [*old._buffers, *old._modules, *(name for name in ("forward",) if name in vars(old))]
    if lost:
        raise TypeError(
            f"convert_rnns: {where} must have nothing of its own, got {', '.join(lost)}: it would be lost; "
            "replace the module by hand"
        )
    if path.rpartition(".")[2] == "_orig_mod" or old._compiled_call_impl is not None:
        raise TypeError(f"convert_rnns: {where} must not be compiled; convert first, then compile")
    kinds = {type(parameter) for parameter in parameters.values()} - {nn.Parameter}
    if kinds:
        raise TypeError(
            f"convert_rnns: {where} must have plain parameters, got {kinds.pop().__name__}; convert first, "
            "then shard or wrap"
        )
    if len(places := {(str(p.device), str(p.dtype)) for p in parameters.values()}) > 1:
        raise ValueError(
            f"convert_rnns: {where} must have its parameters on one device and in one dtype, got "
            f"{' and '.join(sorted(' '.join(place) for place in places))}"
        )


_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""The attributes in which a parameter keeps its hooks."""


def _find_ties(module: nn.Module, found: dict[nn.Module, str]) -> list[list[_Place]]:
    """Find the parameters that are shared between replaced modules and stay shared."""
    holders: defaultdict[int, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            holders[id(parameter)].append((owner, path, name))
    ties = []
    for places in holders.values():
        inside = [place for place in places if place[0] in found]
        if len(places) == 1 or not inside:
            continue
        _, path, name = inside[0]
        for owner, other_path, other in places:
            if owner not in found or _is_lstm(owner) != _is_lstm(inside[0][0]):
                raise ValueError(
                    f"convert_rnns: {name} of {_where(path)} must not be shared with what is replaced by "
                    f"another kind, or not at all, got {other} of {_where(other_path)}; untie them first"
                )
        ties.append(
            [(owner, name) for owner, _, name in inside if not name.startswith(("weight_hh", "bias_hh"))]
        )
    return [tie for tie in ties if len(tie) > 1]


def _is_lstm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LSTM, nn.LSTMCell))


def _find_foreign(module: nn.Module) -> Iterator[str]:
    """Describe torch's scripted, traced and quantized recurrent modules."""
    names = {kind.__name__ for kind in _COUNTERPARTS}
    for path, child in module.named_modules():
        kind = type(child)
        name = child.original_name if isinstance(child, torch.jit.ScriptModule) else kind.__name__
        if name in names and kind.__module__.startswith("torch.") and kind not in _COUNTERPARTS:
            what = (
                "scripted or traced" if isinstance(child, torch.jit.ScriptModule) else f"of {kind.__module__}"
            )
            yield f"{_where(path)}, {name} {what}"


def _find_unregistered(module: nn.Module, found: dict[nn.Module, str]) -> Iterator[str]:
    """Describe references to recurrent modules that are in no module's table of submodules."""
    registered = set(module.modules())
    for path, owner in module.named_modules():
        for attribute, value in vars(owner).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            for held in _modules_in(value, set()):
                inside = [held] if held in registered else list(held.modules())
                for child in inside:
                    if isinstance(child, tuple(_COUNTERPARTS)):
                        kind = f"an unregistered {type(child).__name__}"
                        what = f"module {found[child]!r}" if child in found else kind
                        yield f"{what} as held by attribute {attribute!r} of {_where(path)}"


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules that containers, bound methods and partial functions hold."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inner = [value.__self__]
    for part in inner:
        yield from _modules_in(part, seen)


def _where(path: str) -> str:
    return f"module {path!r}" if path else "the module"
