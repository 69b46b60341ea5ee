"""Collectives along one line of the mesh, with their gradients.

Built on torch's functional collectives, which eager code, torch.compile and fake tensors all understand. A line that is
None stands for a rank alone: every function then gives back what it was given.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from real.timeline import Timeline

ops = torch.ops._c10d_functional


class Line:
    """The ranks along one axis, seen from one of them; waiting is booked as communication when there is a timeline."""

    def __init__(self, group: dist.ProcessGroup, timeline: Timeline | None = None) -> None:
        self.group, self.name, self.size, self.rank = group, group.group_name, group.size(), group.rank()
        self.timeline = timeline

    def waiting(self) -> Any:
        return self.timeline.during("communication") if self.timeline else nullcontext()

    def wait(self, tensor: Tensor) -> Tensor:
        out: Tensor = ops.wait_tensor(tensor)
        return out

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's x, joined along dim."""
        with self.waiting():
            out = self.wait(ops.all_gather_into_tensor(x.contiguous(), self.size, self.name))
        return out if dim == 0 else torch.cat(out.chunk(self.size), dim)

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along dim of the sum over ranks."""
        x = x.contiguous() if dim == 0 else torch.cat(x.chunk(self.size, dim))
        with self.waiting():
            return self.wait(ops.reduce_scatter_tensor(x, "sum", self.size, self.name))

    def reduce(self, x: Tensor, how: str = "sum") -> Tensor:
        with self.waiting():
            return self.wait(ops.all_reduce(x.contiguous(), how, self.name))

    def trade(self, x: Tensor, into: Sequence[int], out_of: Sequence[int]) -> Tensor:
        """All-to-all of rows: `out_of[i]` of mine go to rank i, `into[i]` come from it."""
        with self.waiting():
            return self.wait(ops.all_to_all_single(x.contiguous(), list(into), list(out_of), self.name))

    def shift(self, x: Tensor) -> Tensor:
        """Start sending x to the next rank and receiving the previous one's; `wait` for the result before use."""
        rows, (before, after) = x.shape[0], ((self.rank - 1) % self.size, (self.rank + 1) % self.size)
        into = [rows if i == before else 0 for i in range(self.size)]
        out_of = [rows if i == after else 0 for i in range(self.size)]
        out: Tensor = ops.all_to_all_single(x.contiguous(), into, out_of, self.name)
        return out


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line, dim: int) -> Tensor:
        ctx.line, ctx.dim = line, dim
        return line.gather(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.line.scatter(grad, ctx.dim), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line, dim: int) -> Tensor:
        ctx.line, ctx.dim = line, dim
        return line.scatter(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.line.gather(grad, ctx.dim), None, None


class _Trade(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line, into: list[int], out_of: list[int]) -> Tensor:
        ctx.line, ctx.into, ctx.out_of = line, into, out_of
        return line.trade(x, into, out_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.line.trade(grad, ctx.out_of, ctx.into), None, None, None


def gather(x: Tensor, line: Line | None, dim: int = 1) -> Tensor:
    """All-gather whose gradient is reduce-scattered: into a region where every rank sees all tokens."""
    return x if line is None else _Gather.apply(x, line, dim)  # type: ignore[no-any-return]


def scatter(x: Tensor, line: Line | None, dim: int = 1) -> Tensor:
    """Reduce-scatter whose gradient is all-gathered: out of that region."""
    return x if line is None else _Scatter.apply(x, line, dim)  # type: ignore[no-any-return]


def trade(x: Tensor, line: Line | None, into: list[int], out_of: list[int]) -> Tensor:
    """All-to-all of rows with its gradient."""
    return x if line is None else _Trade.apply(x, line, into, out_of)  # type: ignore[no-any-return]
