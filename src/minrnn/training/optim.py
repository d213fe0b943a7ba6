"""The optimizers and their schedule: who moves which weights, which decay, the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from minrnn.training.config import TrainConfig

MUON_MOMENTUM = 0.95
"""Its author's."""


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Build the optimizers that move a model's parameters together, each its own.

    `adamw` is fused AdamW over two groups: weights that decay, and all other parameters. `muon` gives the
    matrices that `orthogonalized_parameters` names to Muon, all of which decay, and AdamW the rest:

        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g
        W = (1 - rate * decay) * W - rate * 0.2 * sqrt(max(rows, columns)) * orthogonal(u)

    where orthogonal(u) has u's singular vectors and singular values near 1, by five Newton-Schulz steps. The
    factor makes an update about as large as AdamW's, so that one rate serves both.

    Args:
        model: the model, already on its device.
        config: optimizer, learning rate, betas and weight decay.

    Returns:
        The optimizers; each group holds its parameters in the model's order.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); Jordan et al., "Muon: an
    optimizer for hidden layers in neural networks" (2024); the factor: Liu et al., "Muon is scalable for LLM
    training" (arXiv 2502.16982).
    """
    decayed, turned = decayed_parameters(model), set[str]()
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        turned = orthogonalized_parameters(model)
        optimizers.append(
            torch.optim.Muon(
                [parameter for name, parameter in model.named_parameters() if name in turned],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=MUON_MOMENTUM,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    rest = [(name, parameter) for name, parameter in model.named_parameters() if name not in turned]
    optimizers.append(
        torch.optim.AdamW(
            [
                {"params": [p for name, p in rest if name in decayed], "weight_decay": config.weight_decay},
                {"params": [p for name, p in rest if name not in decayed], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
    )
    return optimizers


def orthogonalized_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that Muon moves: the matrices that the blocks multiply channels by.

    They are the weights of the blocks' linear layers and the recurrences' projections. Embeddings and the
    head, whose rows stand for single tokens, are AdamW's, as Muon's author has it; so is all that is no such
    matrix (biases, norms, filters, the rates of state spaces).

    Args:
        model: a model with `blocks`.

    Returns:
        Names as in `model.named_parameters()`.

    Raises:
        ValueError: it has no such matrix.
    """
    linear = decayed_parameters(model)
    names = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("blocks.")
        and (name in linear or name.rpartition(".")[2].startswith(("weight_ih", "weight_hh")))
    }
    if not names:
        raise ValueError("train.optimizer: muon needs a model whose blocks hold matrices; use adamw")
    return names


def decayed_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that weight decay pulls toward zero: the weight matrices of linear layers.

    Everything else is left alone: biases and norms, whose size says nothing about complexity; embeddings (and
    the head, where it is tied to them), whose rare rows would fade between their updates; the convolution's
    filters; and the recurrences' own projections, because a gate pulled toward zero is pulled toward half
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


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group of the optimizers this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def clip_gradients(model: nn.Module, longest: float) -> torch.Tensor:
    """Shorten the gradient to the given norm, and return the norm that it had (a scalar, not synchronized).

    Args:
        model: the module whose parameters' gradients are scaled in place.
        longest: the largest norm over all parameters; 0 leaves the gradient as it is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return norm
