"""The optimiser and its schedule: AdamW, which weights decay, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from minrnn.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build fused AdamW over two groups: weights that decay, and all other parameters.

    Args:
        model: the model, already on its device.
        config: learning rate, betas and weight decay.

    Returns:
        The optimiser; each group holds its parameters in the model's order.
    """
    decayed = decayed_parameters(model)
    weights = [parameter for name, parameter in model.named_parameters() if name in decayed]
    others = [parameter for name, parameter in model.named_parameters() if name not in decayed]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def decayed_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that weight decay pulls towards zero: the weight matrices of linear layers.

    Everything else is left alone: biases and norms, whose size says nothing about complexity; embeddings (and
    the head, where it is tied to them), whose rare rows would fade between their updates; the convolution's
    filters; and the recurrences' own projections, because a gate pulled towards zero is pulled towards half
    open. The paper's authors leave the gates' projections out too (main.py of their code).

    Args:
        model: any module.

    Returns:
        Names as in `model.named_parameters()`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embeddings
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to the floor.

        rate(s) = peak * (s + 1) / warmup                                              s < warmup
        rate(s) = floor + (peak - floor) * (1 + cos(pi * (s - warmup) / rest)) / 2     afterwards

    Args:
        step: 0 for the first step.
        config: `learning_rate` (the peak), `min_learning_rate_ratio` (floor / peak), `warmup_steps`, `steps`.

    Returns:
        The rate; the last step's is within one step of the floor.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = config.learning_rate * config.min_learning_rate_ratio
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return floor + (config.learning_rate - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of the optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, longest: float) -> torch.Tensor:
    """Shorten the gradient to the given norm, and return the norm that it had (a scalar, not synchronised).

    Args:
        model: the module whose parameters' gradients are scaled in place.
        longest: the largest norm over all parameters; 0 leaves the gradient as it is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return norm
