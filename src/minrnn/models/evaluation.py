"""Models in evaluation mode, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and each of its modules back in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call_in_evaluation(model: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Call a model in evaluation mode.

    One that is in it is called as it is: parts that were put in training mode stay in it, as dropouts do for
    samples of a Bayesian posterior (Gal and Ghahramani, arXiv 1506.02142).
    """
    if not model.training:
        return model(*arguments, **options)
    with evaluation_mode(model):
        return model(*arguments, **options)
