"""Optimizers, parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.models.shards import divided_like, gathered, is_sharded
from minrnn.training.config import TrainConfig

MUON_MOMENTUM = 0.95
"""Momentum of Muon, its author's default."""


class ShardedMuon(torch.optim.Muon):
    """Muon for matrices whose rows are divided over ranks.

    Momentum and weights stay divided. What is to be made orthogonal is gathered, one matrix after the other;
    every rank computes the whole turn as Muon does, and takes its rows of it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        whole = gathered(gradient.lerp(mean, group["momentum"]))
        turn = nn.Parameter(torch.zeros_like(whole))
        turn.grad = whole
        names = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        settings = {name: group[name] for name in names}
        torch.optim.Muon([turn], momentum=0.0, nesterov=False, weight_decay=0.0, **settings).step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(divided_like(turn.detach(), parameter))


MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
    ShardedMuon: ("momentum_buffer",),
}
"""State tensors of each optimizer with the shape and dtype of a parameter; AdamW also has `step`."""


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model; each updates a part of the parameters.

    `adamw` is fused AdamW with two groups: parameters with weight decay, and all others. `muon` is Muon, with
    weight decay, for the matrices of `orthogonalized_parameters`, and AdamW for the rest:

        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g
        W = (1 - rate * decay) * W - rate * 0.2 * sqrt(max(rows, columns)) * orthogonal(u)

    where orthogonal(u) has the singular vectors of u and singular values near 1, by five Newton-Schulz steps.
    The factor makes updates about as large as AdamW's, so that both use the same learning rate.

    Args:
        model: the model, already on its device, and already divided over ranks if it is to be.
        config: optimizer, learning rate, betas and weight decay.

    Returns:
        The optimizers; each group has its parameters in the model's order.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); Jordan et al., "Muon: an
    optimizer for hidden layers in neural networks" (2024); the factor: Liu et al., "Muon is scalable for LLM
    training" (arXiv 2502.16982).
    """
    decayed, turned = decayed_parameters(model), set[str]()
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        turned = orthogonalized_parameters(model)
        turns = [parameter for name, parameter in model.named_parameters() if name in turned]
        optimizers.append(
            (ShardedMuon if any(map(is_sharded, turns)) else torch.optim.Muon)(
                turns,
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
    """Return the names of the parameters that Muon updates: the matrices in the blocks.

    These are the weights of linear layers and the projections of recurrences. Embeddings and the head are
    left to AdamW, as Muon's author recommends, and so are all other parameters (biases, norms, filters, the
    rates of state spaces).

    Args:
        model: a model with `blocks`.

    Returns:
        Names as in `model.named_parameters()`.

    Raises:
        ValueError: the model has no such matrix.
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
    """Return the names of the parameters with weight decay: the weight matrices of linear layers.

    All others have none: biases and norms; embeddings (and a head tied to them), whose rare rows would decay
    between their updates; the filters of convolutions; and the projections of recurrences, as decay would
    pull gates toward half open. The paper's authors exclude the gates' projections too (main.py of their
    code).

    Args:
        model: any module.

    Returns:
        Names as in `model.named_parameters()`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embeddings
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to the floor.

        rate(s) = peak * (s + 1) / warmup                                              s < warmup
        rate(s) = floor + (peak - floor) * (1 + cos(pi * (s - warmup) / rest)) / 2     afterwards

    Args:
        step: index of the step, from 0.
        config: `learning_rate` (the peak), `min_learning_rate_ratio` (floor / peak), `warmup_steps`, `steps`.

    Returns:
        The learning rate.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = config.learning_rate * config.min_learning_rate_ratio
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return floor + (config.learning_rate - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def clip_gradients(model: nn.Module, longest: float) -> torch.Tensor:
    """Clip the norm of the gradient, and return the norm before (a scalar, without synchronization).

    Args:
        model: the module whose parameters' gradients are scaled in place.
        longest: maximum norm over all parameters; 0 for no clipping.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return gathered(norm)
