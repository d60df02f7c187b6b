"""Optimizers: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, nn

from tools.train.model import Model

# The odd polynomial a x + b x^3 + c x^5 which, applied again and again, takes singular values into 0.7..1.2 (Jordan et
# al. 2024). Four times are enough for those above a hundredth of the norm.
_STEPS = ((3.4445, -4.7750, 2.0315),) * 4


def orthogonalize(matrices: Tensor, half: bool = False) -> Tensor:
    """The nearly orthogonal factor of each matrix: ``[n, rows, columns]`` -> the same shape, singular values near 1.

    ``half``: with products of bfloat16, which the iteration forgives.
    """
    flip = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if flip else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if half else x
    if x.is_cuda:
        for a, b, c in _STEPS:
            gram = x @ x.transpose(1, 2)
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        # One matrix at a time: it stays in cache, and a plain product is twice as quick as a batched one.
        x = x.contiguous()
        for matrix in x:
            y = matrix
            for a, b, c in _STEPS:
                gram = y @ y.t()
                y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
            matrix.copy_(y)
    factor: Tensor = (x.transpose(1, 2) if flip else x).to(matrices.dtype)
    return factor


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Muon; Jordan et al. 2024), for matrices and stacks of matrices.

    ``lr`` is the spectral norm of an update of a square matrix. A parameter ``[E, n * H, H]`` of experts, with ``n``
    matrices on top of each other, is taken apart first. The matrices are shared out to the workers of ``pool``.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        pool: Executor,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        half: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool, self.half = pool, half

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        tasks = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                rows, columns = parameter.shape[-2:]
                if parameter.ndim == 3 and rows % columns == 0:
                    rows = columns
                flat = (x.view(-1, rows, columns) for x in (parameter, parameter.grad, state["momentum"]))
                # A worker's share of a stack; a GPU takes it whole.
                size = 8 if parameter.device.type == "cpu" else 1 << 30
                tasks += [(group, *parts) for parts in zip(*(x.split(size) for x in flat), strict=True)]
        list(self.pool.map(self._update, tasks))

    @torch.no_grad()
    def _update(self, task: tuple[dict[str, Any], Tensor, Tensor, Tensor]) -> None:
        group, parameter, grad, average = task
        average.lerp_(grad, 1 - group["momentum"])
        update = orthogonalize(grad.lerp(average, group["momentum"]), self.half)
        rows, columns = parameter.shape[1:]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def make_optimizers(
    model: Model, muon_lr: float, adam_lr: float, weight_decay: float, pool: Executor, half: bool
) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts; AdamW for embeddings, routers and norms (a router's rows are no rotation)."""
    matrices, embeddings, routers, norms = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("embed_tokens"):
            embeddings.append(parameter)
        elif name.endswith("gate.weight"):
            routers.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            norms.append(parameter)
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": adam_lr},
            {"params": routers, "lr": adam_lr * 0.5},
            {"params": norms, "lr": adam_lr},
        ],
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, muon_lr, pool, weight_decay=weight_decay, half=half),
        adam,
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
