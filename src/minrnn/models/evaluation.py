"""Temporary evaluation mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that puts `model` in eval mode, and restores the mode of each of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call_in_evaluation(model: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Call a model in evaluation mode.

    A model that is already in evaluation mode is called unchanged: modules that were put in training mode
    stay in it, such as dropouts for samples of a Bayesian posterior (Gal and Ghahramani, arXiv 1506.02142).
    """
    if not model.training:
        return model(*arguments, **options)
    with evaluation_mode(model):
        return model(*arguments, **options)
