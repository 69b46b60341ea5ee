"""Attention behind one interface, on one rank or with the sequence spread over context-parallel ranks.

`attend(q_BHTE, k_BGTE, v_BGTF, documents_BT)`: causal, each token only within its own document when documents are given.
T is what this rank holds; which positions those are, `spread` says.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from real.collectives import Line, gather, trade


class Attend(nn.Module):
    """The whole sequence on this rank."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        if documents is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        positions = torch.arange(q.shape[2], device=q.device)
        return masked(q, k, v, positions, documents, documents)


def masked(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mine: Tensor | None, all_: Tensor | None) -> Tensor:
    """Attention of queries at these positions to keys at 0, 1, 2, …, with a mask.

    On a GPU each query head gets keys and values of its own: among kernels that take a mask, only the one that writes every score lets
    heads share them.
    """
    mask = _visible(positions, torch.arange(k.shape[2], device=q.device), mine, all_)
    if q.is_cuda:
        k, v = (_heads(x, q.shape[1] // k.shape[1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _visible(rows: Tensor, columns: Tensor, mine: Tensor | None, theirs: Tensor | None) -> Tensor:
    """Which keys each query sees, [1 or B, 1, rows, columns]."""
    mask = (rows[:, None] >= columns)[None, None]
    return mask if mine is None or theirs is None else mask & (mine[:, None, :, None] == theirs[:, None, None, :])


def spread(kind: str, tokens: int, line: Line | None, device: torch.device | None = None) -> Tensor:
    """Positions that a rank holds of a sequence of `tokens`: neighbours for ulysses; else one early and one late piece,
    so that causal attention costs every rank the same (zig-zag, as in Llama 3, section 3.3.2)."""
    positions = torch.arange(tokens, device=device)
    if line is None:
        return positions
    if kind == "ulysses":
        return positions.chunk(line.size)[line.rank]
    pieces = positions.chunk(2 * line.size)
    return torch.cat((pieces[line.rank], pieces[2 * line.size - 1 - line.rank]))


class Gathered(Attend):
    """Every rank gathers all keys and values (Llama 3, section 3.3.2)."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        tokens = q.shape[2] * self.line.size
        order = torch.cat([_zigzag(tokens, self.line.size, rank, q.device) for rank in range(self.line.size)]).argsort()
        k, v = (gather(x, self.line, 2).index_select(2, order) for x in (k, v))
        everyone = None if documents is None else self.line.gather(documents, 1)[:, order]
        return masked(q, k, v, spread("gather", tokens, self.line, q.device), documents, everyone)


def _zigzag(tokens: int, size: int, rank: int, device: torch.device) -> Tensor:
    pieces = torch.arange(tokens, device=device).chunk(2 * size)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]))


class Ulysses(Attend):
    """Ranks trade their share of the sequence for a share of the heads (Jacobs et al. 2023, arXiv 2309.14509)."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        q, k, v = (self._heads(x) for x in (q, k, v))
        everyone = None if documents is None else self.line.gather(documents, 1)
        return self._tokens(super().forward(q, k, v, everyone))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, T/c, E] to [B, H/c, T, E]."""
        B, H, T, E = x.shape
        c = self.line.size
        x = x.view(B, c, H // c, T, E).movedim(1, 0)
        x = trade(x, self.line, [1] * c, [1] * c)
        return x.movedim(0, 2).reshape(B, H // c, c * T, E)

    def _tokens(self, x: Tensor) -> Tensor:
        """[B, H/c, T, E] to [B, H, T/c, E]."""
        B, H, T, E = x.shape
        c = self.line.size
        x = x.view(B, H, c, T // c, E).movedim(2, 0)
        x = trade(x, self.line, [1] * c, [1] * c)
        return x.movedim(0, 1).reshape(B, H * c, T // c, E)


class Ring(Attend):
    """Keys and values travel from rank to rank while each rank works on what it holds (Liu et al. 2023, arXiv 2310.01889)."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    @torch.compiler.disable
    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        width, groups = v.shape[3], q.shape[1] // k.shape[1]
        v = F.pad(v, (0, q.shape[3] - width))  # kernels want keys and values of one width
        out: Tensor = _Ring.apply(q, k, v, documents, self.line, groups)
        return out[..., :width]


class _Ring(Function):
    """Merges the softmax of each travelling part by its log-sum-exp; the backward pass sends parts and their gradients round again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, line: Line, groups: int) -> Tensor:
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
        pair, theirs = torch.stack((k, v)), documents
        for turn in range(line.size):
            coming = line.shift(pair) if turn + 1 < line.size else None
            rows, columns, causal = _part(q.shape[2], line.rank, (line.rank - turn) % line.size)
            mask = _mask(q, documents, theirs, rows, columns, causal)
            part, part_lse = _tile(
                q[:, :, rows], _heads(pair[0][:, :, columns], groups), _heads(pair[1][:, :, columns], groups), causal, mask
            )
            whole = torch.logaddexp(lse[:, :, rows], part_lse)
            old, new = (torch.exp(x - whole).nan_to_num(0.0).unsqueeze(-1) for x in (lse[:, :, rows], part_lse))
            out[:, :, rows] = out[:, :, rows] * old + part.float() * new
            lse[:, :, rows] = whole
            if coming is not None:
                with line.waiting():
                    pair = line.wait(coming)
                    theirs = None if theirs is None else line.wait(line.shift(theirs))
        ctx.save_for_backward(q, k, v, out.to(q.dtype), lse, documents)
        ctx.line, ctx.groups = line, groups
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, documents = ctx.saved_tensors
        line, groups = ctx.line, ctx.groups
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        pair, theirs = torch.stack((k, v)), documents
        grad_pair = torch.zeros(pair.shape, dtype=torch.float32, device=q.device)
        for turn in range(line.size):
            coming = line.shift(pair) if turn + 1 < line.size else None
            rows, columns, causal = _part(q.shape[2], line.rank, (line.rank - turn) % line.size)
            mask = _mask(q, documents, theirs, rows, columns, causal)
            given = [x[:, :, rows] for x in (grad, q)], [x[:, :, rows] for x in (out, lse)]
            keys, values = (_heads(x[:, :, columns], groups) for x in pair)
            dq, dk, dv = _tile_backward(*given[0], keys, values, *given[1], causal, mask)
            grad_q[:, :, rows] += dq
            grad_pair[0][:, :, columns] += _sum_heads(dk, groups)
            grad_pair[1][:, :, columns] += _sum_heads(dv, groups)
            with line.waiting():
                grad_pair = line.wait(line.shift(grad_pair))
                if coming is not None:
                    pair = line.wait(coming)
                    theirs = None if theirs is None else line.wait(line.shift(theirs))
        return grad_q.to(q.dtype), grad_pair[0].to(k.dtype), grad_pair[1].to(v.dtype), None, None, None


def _part(tokens: int, rank: int, owner: int) -> tuple[slice, slice, bool]:
    """Of the queries of `rank` and the keys of `owner`, each an early and a late piece: which take part, and whether causally."""
    half, all_ = tokens // 2, slice(0, tokens)
    if owner == rank:
        return all_, all_, True
    return (all_, slice(0, half), False) if owner < rank else (slice(half, tokens), all_, False)


def _mask(q: Tensor, mine: Tensor | None, theirs: Tensor | None, rows: slice, columns: slice, causal: bool) -> Tensor | None:
    """Which keys each query sees, when documents part them."""
    if mine is None or theirs is None:
        return None
    same = mine[:, None, rows, None] == theirs[:, None, None, columns]
    return same.tril() if causal else same


def _heads(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, 1) if groups > 1 else x.contiguous()


def _sum_heads(x: Tensor, groups: int) -> Tensor:
    return x.float().unflatten(1, (-1, groups)).sum(2)


def _tile(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys: output and the log of the softmax's sum."""
    q = q.contiguous()
    if mask is None and q.is_cuda and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]  # type: ignore[no-any-return]
    if mask is None and not q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)  # type: ignore[no-any-return]
    scores = _scores(q, k, causal, mask)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).to(v.dtype) @ v, lse


def _tile_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                   mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, given the output and log-sum-exp over all keys."""
    grad, q, out, lse = (x.contiguous() for x in (grad, q, out, lse))
    if mask is None and q.is_cuda and q.dtype != torch.float32:
        T, S, state = q.shape[2], k.shape[2], torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, None, None, T, S, 0.0, causal, state, state)  # fmt: skip
    if mask is None and not q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)  # type: ignore[no-any-return]
    share = torch.exp(_scores(q, k, causal, mask) - lse.unsqueeze(-1)).to(q.dtype)
    slope = share * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[3])
    return slope @ k, slope.mT @ q, share.mT @ grad


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    scores = (q @ k.mT).float() / math.sqrt(q.shape[3])
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)
