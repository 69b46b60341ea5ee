"""Mixture of experts: each token visits a few of many feed-forwards; no token is dropped.

Routing after DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), of which softmax routing without groups is a case. With
expert parallelism tokens travel to the ranks that hold their experts, and back. Shapes in names: N tokens, k visits a
token, E experts, F their width, M rows that arrive.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from conf.plan import Model
from real.collectives import Line, trade
from real.layers import FeedForward, own


class Router(nn.Module):
    """Scores the experts for each token in fp32."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.moe = model.moe
        self.weight = nn.Parameter(torch.empty(model.moe.experts, model.hidden))
        # A buffer stays in fp32 whatever the precision: the step of the bias is small.
        bias = torch.zeros(model.moe.experts) if model.moe.balance == "bias" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load", torch.zeros(model.moe.experts), persistent=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [N, k] and indices [N, k] of the chosen experts, and all scores [N, E]."""
        moe = self.moe
        logits = F.linear(x_ND.float(), own(self.weight).float())
        scores = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
        bias = self.e_score_correction_bias
        chosen = self._choose((scores if bias is None else scores + bias).detach())
        weights = scores.gather(1, chosen)
        if moe.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            # A recomputed block counts twice, but then every expert's visits do, and only their order matters.
            self.load += visits(chosen, moe.experts)
        return weights * moe.scale, chosen, scores

    def _choose(self, scores_NE: Tensor) -> Tensor:
        moe = self.moe
        if moe.node_limit and moe.groups > 1:
            grouped = scores_NE.unflatten(1, (moe.groups, -1))
            best = grouped.topk(2, -1).values.sum(-1) if moe.score == "sigmoid" else grouped.amax(-1)
            kept = torch.zeros_like(best).scatter(1, best.topk(moe.node_limit, -1).indices, 1.0)
            scores_NE = grouped.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).flatten(1)
        return scores_NE.topk(moe.top_k, -1).indices


class Experts(nn.Module):
    """All experts that this rank holds, in three stacked matrices."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        E, F_, D = model.moe.experts, model.moe.ffn, model.hidden
        self.gate_proj = nn.Parameter(torch.empty(E, F_, D))
        self.up_proj = nn.Parameter(torch.empty(E, F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, and how many each has."""
        inner = F.silu(grouped(x_MD, own(self.gate_proj), counts_E)) * grouped(x_MD, own(self.up_proj), counts_E)
        return grouped(inner, own(self.down_proj), counts_E)


def grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its own matrix."""
    if isinstance(x, FakeTensor) and x.dtype != torch.bfloat16:
        return x @ weight.mean(0).T  # the fake kernel knows bf16 alone: the same shapes in and out
    if x.is_cuda and x.dtype != torch.bfloat16:  # the kernel for GPUs knows bf16 alone
        return torch.cat([rows @ w.T for rows, w in zip(x.split(counts.tolist()), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))


class Mixture(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.moe = model.moe
        self.gate = Router(model)
        self.experts = Experts(model)
        self.shared_experts = FeedForward(model, model.moe.shared * model.moe.ffn) if model.moe.shared else None
        self.ep: Line | None = None
        self.sequence: Line | None = None  # the ranks that share a sequence
        self.loss_weight = 0.0  # of the balancing loss of one sequence

    def forward(self, x_BTD: Tensor) -> Tensor:
        flat = x_BTD.flatten(0, 1)
        weights, chosen, scores = self.gate(flat)
        if self.loss_weight and self.training:
            flat = Attach.apply(flat, self._uneven(chosen, scores, len(x_BTD)))
        order = chosen.flatten().argsort(stable=True)
        counts = visits(chosen, self.moe.experts)
        back = self._visit(flat[order // self.moe.top_k], counts)[order.argsort()]
        mixed = (back.unflatten(0, (-1, self.moe.top_k)) * weights.to(back.dtype).unsqueeze(-1)).sum(1)
        out = mixed.view_as(x_BTD)
        return out if self.shared_experts is None else out + self.shared_experts(x_BTD)

    @torch.compiler.disable  # rows travel in numbers that no compiler can foresee
    def _visit(self, sent: Tensor, counts: Tensor) -> Tensor:
        """The experts' outputs for rows sorted by expert."""
        if self.ep is None:
            return self.experts(sent, counts)  # type: ignore[no-any-return]
        away = counts.view(self.ep.size, -1)  # [rank, its experts]
        home = self.ep.trade(away, [1] * self.ep.size, [1] * self.ep.size)  # [rank, my experts]
        into, out_of = _rows(home, sent), _rows(away, sent)
        got = trade(sent, self.ep, into, out_of)
        owner = torch.arange(home.shape[1], device=home.device).repeat(self.ep.size)
        order = _repeat(owner, home.flatten(), len(got)).argsort(stable=True)  # from rank by rank to expert by expert
        done = self.experts(got[order], home.sum(0))[order.argsort()]
        return trade(done, self.ep, out_of, into)

    def _uneven(self, chosen: Tensor, scores: Tensor, sequences: int) -> Tensor:
        """This rank's part of the balancing loss of its sequences (DeepSeek-V3, equations 17 to 20).

        A sequence's visits are counted over all ranks that share it, so the loss does not depend on the mesh.
        """
        moe = self.moe
        share = (scores / scores.sum(-1, keepdim=True)).unflatten(0, (sequences, -1))
        tokens = share.shape[1] * (self.sequence.size if self.sequence else 1)
        chose = torch.zeros_like(scores).scatter(1, chosen, 1.0).unflatten(0, (sequences, -1)).sum(1)
        chose = self.sequence.reduce(chose) if self.sequence else chose
        return self.loss_weight * (chose * moe.experts / (moe.top_k * tokens) * share.sum(1) / tokens).sum()


def visits(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen."""
    flat = chosen.flatten()
    return torch.zeros(experts, dtype=flat.dtype, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _rows(counts: Tensor, like: Tensor) -> list[int]:
    """Rows for each rank. Fake tensors hold no numbers: an even spread is assumed."""
    if isinstance(counts, FakeTensor):
        return [len(like) // len(counts)] * len(counts)
    out: list[int] = counts.sum(1).tolist()
    return out


def _repeat(values: Tensor, times: Tensor, total: int) -> Tensor:
    return values.repeat_interleave(times, output_size=total)


def weigh(model: nn.Module, sequences: int) -> None:
    """Let the balancing loss be the mean over the sequences of a step."""
    for mixture in (m for m in model.modules() if isinstance(m, Mixture)):
        if mixture.moe.balance == "loss":
            mixture.loss_weight = mixture.moe.balance_rate / sequences


class Attach(Function):
    """Adds a term to the loss wherever it arises, whatever becomes of the output: pipeline stages have no other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        ctx.save_for_backward(term)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (term,) = ctx.saved_tensors
        return grad, torch.ones_like(term)


@torch.no_grad()
def balance(model: nn.Module, line: Line | None, counts: bool = True) -> None:
    """After a step: a step up for the bias of experts visited less than the mean, down for the others (DeepSeek-V3, 2.1.2).

    `line` joins the ranks that saw the step's other tokens. A step that does not count only forgets its visits.
    """
    routers = [m for m in model.modules() if isinstance(m, Router) and m.moe.balance == "bias"]
    if not routers:
        return
    loads = torch.stack([router.load for router in routers])
    loads = line.reduce(loads) if line else loads
    for router, load in zip(routers, loads, strict=True):
        if counts:
            router.e_score_correction_bias += router.moe.balance_rate * torch.sign(load.mean() - load)
        router.load.zero_()
