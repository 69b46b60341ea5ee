"""Muon: momentum whose matrix is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Orthogonalising needs whole matrices, so each update is gathered, worked on by every rank alike, and each keeps its part:
one all-gather a matrix, and the same numbers on every mesh.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For matrices; the update has the root mean square of AdamW's, 0.2 (Liu et al. 2025, arXiv 2502.16982, equation 4)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad, momentum = self.state[parameter], parameter.grad, group["momentum"]
        assert grad is not None
        average = state.setdefault("momentum_buffer", torch.zeros_like(grad))
        average.lerp_(grad, 1 - momentum)
        ahead = grad.lerp(average, momentum)  # Nesterov's momentum
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        rate = 0.2 * max(whole.shape) ** 0.5 * group["lr"]
        local, update = _part(parameter, orthogonal(whole))
        local.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(local.dtype), alpha=-rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end near 1 after five steps of a Newton–Schulz iteration.

    In bf16 on a GPU, where that is fast and enough.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _part(parameter: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a parameter, and of a whole matrix like it."""
    if not isinstance(parameter, DTensor):
        return parameter, whole
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
