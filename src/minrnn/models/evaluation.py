"""Temporary evaluation mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _Held:
    """The modes of a model's modules before it was put in eval mode, and how many calls need it there."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.calls = 0


_LOCK = Lock()
_HELD: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that puts `model` in eval mode, and restores the mode of each of its modules.

    Where several threads are in it with one model, the last to leave restores the modes.
    """
    with _LOCK:
        held = _HELD.get(model)
        if held is None:
            held = _HELD[model] = _Held(model)
            model.eval()
        held.calls += 1
    try:
        yield
    finally:
        with _LOCK:
            held.calls -= 1
            if held.calls == 0:
                del _HELD[model]
                for module, training in held.modes:
                    module.training = training


def _is_held(model: nn.Module) -> bool:
    with _LOCK:
        return model in _HELD


def call_in_evaluation(model: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Call a model in evaluation mode.

    A model that is already in evaluation mode is called unchanged: modules that were put in training mode
    stay in it, such as dropouts for samples of a Bayesian posterior (Gal and Ghahramani, arXiv 1506.02142).
    """
    if not model.training and (torch.compiler.is_compiling() or not _is_held(model)):
        return model(*arguments, **options)
    with evaluation_mode(model):
        return model(*arguments, **options)
