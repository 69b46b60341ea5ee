"""Matrix products in fp8 with one scale a tensor (Micikevicius et al. 2022, arXiv 2209.05433).

Operands are scaled to the range of their format and rounded: weights and activations to e4m3, gradients to e5m2. Sums
are kept in higher precision by the hardware, and results leave in the precision that came in.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed; every extent, that of the rows too, a multiple of 16."""
    return _Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def fits(inputs: int, outputs: int) -> bool:
    """Whether the hardware's kernels take a matrix of this shape."""
    return inputs % 16 == 0 and outputs % 16 == 0


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        x, x_scale = _round(x_MK, E4M3)
        weight, w_scale = _round(weight_NK, E4M3)
        ctx.save_for_backward(x, x_scale, weight, w_scale)
        return _scaled(x, weight.T, x_scale, w_scale, x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, weight, w_scale = ctx.saved_tensors
        grad, scale = _round(grad_MN, E5M2)
        # The kernels want the second operand column by column.
        to_x = _scaled(grad, weight.T.contiguous().T, scale, w_scale, grad_MN.dtype)
        to_weight = _scaled(grad.T.contiguous(), x.T.contiguous().T, scale, x_scale, grad_MN.dtype)
        return to_x, to_weight


def _scaled(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two matrices in fp8. A CPU has no kernel for it: some take a reference of torch's, a thousand times as slow."""
    if a.is_cpu:
        return (a.float() @ b.float() * (a_scale * b_scale)).to(dtype)
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype)


def _round(tensor: Tensor, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor in fp8, row by row in memory, and the factor that gives its values back."""
    largest = torch.finfo(to).max
    scale = tensor.abs().amax().float().clamp(min=1e-12) / largest
    return (tensor.float() / scale).clamp(-largest, largest).to(to).contiguous(), scale
