"""Layers that compute on this rank's part of their parameters.

Under tensor parallelism a parameter is a DTensor, which checkpoints, FSDP and the optimizer understand; the arithmetic
runs on its local part. What is replicated over the ranks gets from each its share of the gradient, because every rank
sees its own tokens or its own heads alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from conf.plan import Model
from real.collectives import Line, gather, scatter
from real.fp8 import product

# Matrices cut by outputs, whose inputs every tensor-parallel rank has, and matrices cut by inputs, whose outputs are summed.
COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj")


def own(parameter: Tensor) -> Tensor:
    """This rank's part, with the gradient going back to where it belongs."""
    if not isinstance(parameter, DTensor):
        return parameter
    shares = [Partial() if isinstance(p, Replicate) else p for p in parameter.placements]
    return parameter.to_local(grad_placements=shares)


class Linear(nn.Linear):
    """A matrix; `bias_share` is this rank's share of the bias where outputs are summed over ranks."""

    bias_share = 1.0
    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        out = product(x, own(self.weight)) if self.fp8 else F.linear(x, own(self.weight))
        if self.bias is None:
            return out
        bias = own(self.bias)
        return out + (bias if self.bias_share == 1.0 else bias * self.bias_share)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, own(self.weight), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, own(self.weight), own(self.bias), self.eps)


class Embedding(nn.Embedding):
    """Rows by token; with tensor parallelism each rank holds a range of the vocabulary and keeps a range of the tokens."""

    tp: Line | None = None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        weight = own(self.weight)
        if self.tp is None:
            return F.embedding(tokens_BT, weight)
        index = tokens_BT - self.tp.rank * weight.shape[0]
        mine = (index >= 0) & (index < weight.shape[0])
        rows = F.embedding(index.where(mine, torch.zeros_like(index)), weight) * mine.unsqueeze(-1)
        return scatter(rows, self.tp)


class Head(Linear):
    """Logits; with tensor parallelism those of this rank's range of the vocabulary, for every token."""

    tp: Line | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        return super().forward(gather(x_BTD, self.tp))


class FeedForward(nn.Module):
    """SwiGLU, or GELU without a gate."""

    def __init__(self, model: Model, width: int) -> None:
        super().__init__()
        self.tp: Line | None = None
        self.gate_proj = Linear(model.hidden, width, bias=model.layer_norm) if model.gated else None
        self.up_proj = Linear(model.hidden, width, bias=model.layer_norm)
        self.down_proj = Linear(width, model.hidden, bias=model.layer_norm)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = gather(x_BTD, self.tp)
        up = self.up_proj(x_BTD)
        inner = F.gelu(up, approximate="tanh") if self.gate_proj is None else F.silu(self.gate_proj(x_BTD)) * up
        return scatter(self.down_proj(inner), self.tp)


def norm(model: Model) -> nn.Module:
    return LayerNorm(model.hidden, model.norm_epsilon) if model.layer_norm else RMSNorm(model.hidden, model.norm_epsilon)
