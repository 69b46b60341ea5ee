"""The decoder, or the consecutive layers of it that one pipeline stage holds.

Parameter names and layouts are those of Hugging Face's Llama and DeepSeek, so that checkpoints can be exchanged (routed
experts are stacked). Shapes in names: B sequences, T tokens, D hidden, H query heads, G key-value heads, E head width,
V vocabulary.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conf.arithmetic import recomputes
from conf.plan import Model, RopeScaling
from real.attention import Attend
from real.collectives import gather, scatter
from real.layers import Embedding, FeedForward, Head, Linear, RMSNorm, norm, own
from real.moe import Mixture

Angles = tuple[Tensor, Tensor] | None  # cosine and sine [T, E], or none with learned positions


def rotary(positions_T: Tensor, width: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle, [T, width] each (Su et al. 2021, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, width, 2, device=positions_T.device, dtype=torch.float32) / width)
    angle = torch.outer(positions_T.float(), stretch(frequency, scaling) if scaling else frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def stretch(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies for a longer context. llama3: those that turn less than `low` times over the original context are
    divided by `factor`, those above `high` kept, and between them it goes linearly."""
    if scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original * frequency / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of a head by its position's angle."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-right, left), dim=-1) * sin_TE


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.head_dim, self.tp = model.head_dim, None
        self.attend = Attend()
        self.q_proj = Linear(model.hidden, model.heads * model.head_dim, bias=model.layer_norm)
        self.k_proj = Linear(model.hidden, model.kv_heads * model.head_dim, bias=model.layer_norm)
        self.v_proj = Linear(model.hidden, model.kv_heads * model.head_dim, bias=model.layer_norm)
        self.o_proj = Linear(model.heads * model.head_dim, model.hidden, bias=model.layer_norm)
        self.q_norm = RMSNorm(model.head_dim, model.norm_epsilon) if model.qk_norm else None
        self.k_norm = RMSNorm(model.head_dim, model.norm_epsilon) if model.qk_norm else None

    def forward(self, x_BTD: Tensor, angles: Angles, documents: Tensor | None) -> Tensor:
        x_BTD = gather(x_BTD, self.tp)
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        out = self.attend(q, k, v, documents)
        return scatter(self.o_proj(out.transpose(1, 2).flatten(2)), self.tp)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one narrow vector a
    token, and one rotary key that all heads share."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        mla, hidden = model.mla, model.hidden
        self.head_dim, self.rope, self.kv_rank, self.tp = model.head_dim, mla.rope, mla.kv_rank, None
        self.attend = Attend()
        wide = model.heads * (model.head_dim + mla.rope)
        self.q_proj = None if mla.q_rank else Linear(hidden, wide, bias=False)
        self.q_a_proj = Linear(hidden, mla.q_rank, bias=False) if mla.q_rank else None
        self.q_a_layernorm = RMSNorm(mla.q_rank, model.norm_epsilon) if mla.q_rank else None
        self.q_b_proj = Linear(mla.q_rank, wide, bias=False) if mla.q_rank else None
        self.kv_a_proj_with_mqa = Linear(hidden, mla.kv_rank + mla.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(mla.kv_rank, model.norm_epsilon)
        self.kv_b_proj = Linear(mla.kv_rank, model.heads * 2 * model.head_dim, bias=False)
        self.o_proj = Linear(model.heads * model.head_dim, hidden, bias=False)

    def forward(self, x_BTD: Tensor, angles: Angles, documents: Tensor | None) -> Tensor:
        x_BTD = gather(x_BTD, self.tp)
        q = self._queries(x_BTD).unflatten(-1, (-1, self.head_dim + self.rope)).transpose(1, 2)
        narrow, turned = self.kv_a_proj_with_mqa(x_BTD).split((self.kv_rank, self.rope), -1)
        wide = self.kv_b_proj(self.kv_a_layernorm(narrow)).unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2)
        k, v = wide.chunk(2, -1)
        turned = turned.unsqueeze(1)
        if self.rope and angles is not None:
            plain, q_turned = q.split((self.head_dim, self.rope), -1)
            q, turned = torch.cat((plain, rotate(q_turned, *angles)), -1), rotate(turned, *angles)
        k = torch.cat((k, turned.expand(-1, k.shape[1], -1, -1)), -1)
        out = self.attend(q, k, v, documents)
        return scatter(self.o_proj(out.transpose(1, 2).flatten(2)), self.tp)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if self.q_a_proj is None or self.q_a_layernorm is None or self.q_b_proj is None:
            assert self.q_proj is not None
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))


class Block(nn.Module):
    """One layer; its activations are computed again in the backward pass as `recompute` says: none, selective or full."""

    def __init__(self, model: Model, index: int, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        mixed = model.moe.experts > 0 and index >= model.moe.dense_layers
        self.input_layernorm = norm(model)
        self.self_attn = LatentAttention(model) if model.mla.kv_rank else Attention(model)
        self.post_attention_layernorm = norm(model)
        self.mlp = Mixture(model) if mixed else FeedForward(model, model.ffn)

    def forward(self, x_BTD: Tensor, angles: Angles, documents: Tensor | None) -> Tensor:
        if self.recompute == "none" or not self.training:
            return self._feed(self._attend(x_BTD, angles, documents))
        # Inside the module, so that sharding gathers once for both passes and a compiler sees the two together.
        if self.recompute == "full":
            return self._again(lambda x: self._feed(self._attend(x, angles, documents)), x_BTD)
        x_BTD = self._again(lambda x: self._attend(x, angles, documents), x_BTD)
        # A mixture gathers its experts inside, and where they lie is no part of what can be computed again piece by piece.
        return self._feed(x_BTD) if isinstance(self.mlp, Mixture) else self._again(self._feed, x_BTD)

    def _attend(self, x_BTD: Tensor, angles: Angles, documents: Tensor | None) -> Tensor:
        return x_BTD + self.self_attn(self.input_layernorm(x_BTD), angles, documents)

    def _feed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def _again(self, work: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        options = {"context_fn": partial(create_selective_checkpoint_contexts, _keep)} if self.recompute == "selective" else {}
        return checkpoint(work, x_BTD, use_reentrant=False, **options)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Tokens [B, T] to logits [B, T, V]; a pipeline stage begins or ends with [B, T, D] instead.

    `layers` are the indices of its blocks, `first` and `last` whether it holds the embedding and the head, `share` that of the blocks
    which recompute.
    """

    def __init__(self, model: Model, recompute: str = "none", layers: Collection[int] | None = None, first: bool = True,
                 last: bool = True, share: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        self.shape, self.tp = model, None
        self.spread: Callable[[int], Tensor] = torch.arange  # positions of this rank's tokens
        self.embed_tokens = Embedding(model.vocab, model.hidden) if first else None
        self.embed_positions = nn.Embedding(model.position_rows, model.hidden) if first and model.position_rows else None
        here = range(model.layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Block(model, i, recompute if recomputes(share, i) else "none") for i in here})
        self.norm = norm(model) if last else None
        self.lm_head = Head(model.hidden, model.vocab, bias=False) if last else None
        self.score: Head | None = None  # a number a token in the place of logits, of critics and reward models
        self._angles: dict[Any, Angles] = {}
        self.tie()

    def tie(self) -> None:
        """Share the embedding with the head; again after `to_empty`, which parts them."""
        if self.shape.tied and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        tokens = x.shape[1] if self.embed_tokens is not None else x.shape[1] * (self.tp.size if self.tp else 1)
        if self.embed_tokens is not None:
            x = self._embed(x)
        angles = self._turns(tokens, x)
        for block in self.layers.values():
            x = block(x, angles, documents)
        head = self.lm_head if self.score is None else self.score
        if self.norm is None or head is None:
            return x
        return head(self.norm(x))

    def judge(self) -> None:
        """Give a number a token instead of logits."""
        self.lm_head, self.score = None, Head(self.shape.hidden, 1, bias=False)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        assert self.embed_tokens is not None
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embed_positions is None:
            return x_BTD
        positions = self.spread(tokens_BT.shape[1]).to(x_BTD.device)
        if self.tp:
            positions = positions.chunk(self.tp.size)[self.tp.rank]
        return x_BTD + own(self.embed_positions.weight)[positions]

    def _turns(self, tokens: int, like: Tensor) -> Angles:
        if self.shape.positions != "rope":
            return None
        key = (tokens, like.device, like.dtype)
        if key not in self._angles:
            width = self.shape.mla.rope if self.shape.mla.kv_rank else self.shape.head_dim
            cos, sin = rotary(self.spread(tokens).to(like.device), width, self.shape.rope_theta, self.shape.rope_scaling)
            self._angles[key] = (cos.to(like.dtype), sin.to(like.dtype))
        return self._angles[key]


# Results worth their memory: products, attention, and what came over the network.
KEPT = {
    *(getattr(torch.ops.aten, name).default for name in (
        "mm", "addmm", "bmm", "_grouped_mm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")),
    *(getattr(torch.ops._c10d_functional, name).default for name in (
        "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")),
}  # fmt: skip


def _keep(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
