"""Muon for many small matrices: momentum whose update is orthogonalised, matrices of one shape in one batch.

torch.optim.Muon works matrix by matrix in bfloat16, which takes seconds a step on a CPU; this takes milliseconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Matrices only; learning rates are on AdamW's scale (the update's root mean square is 0.2 * rate)."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                update = orthogonal(torch.stack([self._direction(param, group["momentum"]) for param in params]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for param, part in zip(params, update, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(part, alpha=scale)

    def _direction(self, param: Tensor, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the averaged gradient."""
        grad = param.grad
        assert grad is not None
        state = self.state[param]
        if not state:
            state["mean"] = torch.zeros_like(grad)
        mean: Tensor = state["mean"].lerp_(grad, 1 - momentum)
        return grad.lerp(mean, momentum)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: about the nearest orthogonal matrix to each of [N, A, B]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
