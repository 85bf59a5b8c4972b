"""BertAdam, the optimiser VLP was published with: Adam without bias correction, weight decay apart from the gradient.

github.com/LuoweiZhou/VLP, pytorch_pretrained_bert/optimization.py; decoupled decay as Loshchilov and Hutter, 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn


class BertAdam(torch.optim.Optimizer):
    """Each tensor's gradient is clipped to `clip_norm` by itself, as the release does; 0 clips nothing."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        clip_norm: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_norm": clip_norm}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
        if group["clip_norm"] > 0:
            nn.utils.clip_grad_norm_([weight], group["clip_norm"])
        gradient = weight.grad
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        update = state["mean"] / state["square"].sqrt().add_(group["eps"])
        if group["weight_decay"] > 0:
            update.add_(weight, alpha=group["weight_decay"])
        weight.sub_(update, alpha=group["lr"])


def group_parameters(module: nn.Module, weight_decay: float, **settings: Any) -> list[dict[str, Any]]:
    """A module's parameters in two groups: with weight decay, and biases and normalisations, all vectors, without."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": weight_decay, **settings},
        {"params": [weight for weight in trained if weight.dim() <= 1], "weight_decay": 0.0, **settings},
    ]


def linear_rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` of `steps`: up over the first `warmup` share, then down to 0."""
    progress = step / steps
    return progress / warmup if progress < warmup else max(0.0, (1.0 - progress) / (1.0 - warmup))
