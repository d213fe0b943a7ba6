"""Checks that a model can be rebuilt from its config, and the tensors to save for that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers.sharded import class_of
from minrnn.models.shards import class_before, own_part, runs_for

SHOWN = 4
"""Most names that an error lists for each fault."""


def unwrap(model: nn.Module) -> nn.Module:
    """Remove wrappers around a whole model: modules whose only content is the model.

    torch.compile, DataParallel, DistributedDataParallel and other libraries use such wrappers.
    """
    while list(model._modules) in (["_orig_mod"], ["module"]) and not model._parameters:
        (inner,) = model._modules.values()
        assert inner is not None
        model = inner
    return model


def tensors_to_keep(model: nn.Module, rebuilt: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model, by their names in a model that is rebuilt from its config.

    Args:
        model: the model.
        rebuilt: the model that its config builds, on the meta device.

    Returns:
        Parameters and buffers.

    Raises:
        ValueError: the model differs from what its config builds, or a tensor cannot be saved in a file.
    """
    ours, theirs = dict(_parts(model, "")), dict(_parts(rebuilt, ""))
    found, expected = _tensors(ours), _tensors(theirs)
    shared = sorted(ours.keys() & theirs.keys())
    alike = [name for name in shared if _class_of(ours[name]) is type(theirs[name])]
    faults = {
        **misfits(expected, found),
        "of another class": [
            f"{name or 'the whole'} ({type(ours[name]).__name__} for {type(theirs[name]).__name__})"
            for name in shared
            if name not in alike
        ],
        "of other settings": [
            f"{name}.{setting}"
            for name in alike
            for setting, value in _settings(theirs[name])
            if getattr(ours[name], setting, None) != value
        ],
        "methods replaced": [
            f"{name or 'the whole'}.{method}" for name in alike for method in _methods_replaced(ours[name])
        ],
        "no plain numbers": [name for name, x in found.items() if not _is_plain(x)],
        "one memory": _in_one_memory(found),
        "added or left out": _parts_alone(ours, theirs, found) + _parts_alone(theirs, ours, expected),
    }
    if text := describe(faults):
        raise ValueError(
            f"save_checkpoint: the model is not what its config builds, and could not be loaded; {text}; "
            "undo the changes (merge adapters, remove parametrizations, pruning and patches), "
            "or save its state_dict with torch.save"
        )
    return found


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Compare the names and shapes of two sets of tensors."""
    return {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} ({tuple(expected[name].shape)} expected, got {tuple(found[name].shape)})"
            for name in sorted(expected.keys() & found.keys())
            if expected[name].shape != found[name].shape
        ],
    }


def describe(faults: Mapping[str, Collection[str]]) -> str:
    """Describe the faults in one line; empty if there are none."""
    return "; ".join(f"{what}: {_some(list(names))}" for what, names in faults.items() if names)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module and its name, without torch's wrappers."""
    while "_orig_mod" in module._modules or isinstance(
        module, (nn.DataParallel, nn.parallel.DistributedDataParallel)
    ):
        (inner,) = module._modules.values()
        assert inner is not None
        module = inner
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _parts(child, f"{name}.{child_name}" if name else child_name)


def _tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{place}.{name}" if place else name: x
        for place, part in parts.items()
        for name, x in (*part._parameters.items(), *part._buffers.items())
        if x is not None
    }


def _parts_alone(
    ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Return the names of modules that only `ours` has, except those whose tensors already show it."""
    names = sorted(ours.keys() - theirs.keys())
    return [name for name in names if not any(tensor.startswith(f"{name}.") for tensor in tensors)]


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's settings: its attributes that are numbers, strings or bools, except its mode."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str)):
            yield name, value


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class before its sequences, or its weights, were divided over ranks."""
    whole = class_of(module)
    return class_before(module) if whole is type(module) else whole


def _methods_replaced(module: nn.Module) -> list[str]:
    """Return the names of methods that are overridden on the instance."""
    return [
        name
        for name in vars(module)
        if callable(getattr(type(module), name, None)) and not runs_for(module, name)
    ]


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor can be saved in a file and restored by an assignment."""
    x = own_part(x)
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not x.is_meta
        and x.is_floating_point()
    )


def _in_one_memory(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return pairs of names that share one tensor, which loading would make two."""
    names: dict[tuple[Any, ...], str] = {}
    pairs = []
    for name, x in tensors.items():
        if _is_plain(x) and own_part(x).numel():
            first = names.setdefault((x.device, own_part(x).data_ptr()), name)
            pairs += [f"{first} and {name}"] if first != name else []
    return pairs
