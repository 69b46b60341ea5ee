"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameter names and layouts are those of Hugging Face's Llama, so that checkpoints can be exchanged. Shapes in names:
B sequences, T tokens, D hidden, H query heads, K key-value heads, E head width, V vocabulary.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from conf.plan import Model


def rotary(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle, [T, E] each (Su et al. 2021, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of a head by its position's angle."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-right, left), dim=-1) * sin_TE


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        kv = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(model.hidden, model.hidden, bias=False)
        self.k_proj = nn.Linear(model.hidden, kv, bias=False)
        self.v_proj = nn.Linear(model.hidden, kv, bias=False)
        self.o_proj = nn.Linear(model.hidden, model.hidden, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (
            projection(x_BTD).view(B, T, heads, self.head_dim).transpose(1, 2)
            for projection, heads in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden, model.ffn, bias=False)
        self.up_proj = nn.Linear(model.hidden, model.ffn, bias=False)
        self.down_proj = nn.Linear(model.ffn, model.hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(model.hidden, model.norm_epsilon)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = nn.RMSNorm(model.hidden, model.norm_epsilon)
        self.mlp = FeedForward(model)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, model: Model, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.recompute = model, recompute
        self.embed_tokens = nn.Embedding(model.vocab, model.hidden)
        self.layers = nn.ModuleDict({str(i): Block(model) for i in range(model.layers)})
        self.norm = nn.RMSNorm(model.hidden, model.norm_epsilon)
        self.lm_head = nn.Linear(model.hidden, model.vocab, bias=False)
        self._angles: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.tie()

    def tie(self) -> None:
        """Share the embedding with the head; again after `to_empty`, which parts them."""
        if self.shape.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        cos, sin = self._positions(tokens_BT.shape[1], x_BTD)
        for block in self.layers.values():
            if self.recompute and self.training:
                x_BTD = checkpoint(block, x_BTD, cos, sin, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cos, sin)
        return self.lm_head(self.norm(x_BTD))

    def _positions(self, seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (seq_len, like.device, like.dtype)
        if key not in self._angles:
            cos, sin = rotary(seq_len, self.shape.head_dim, self.shape.rope_theta, like.device)
            self._angles[key] = (cos.to(like.dtype), sin.to(like.dtype))
        return self._angles[key]


def loss_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, in fp32 nats."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Fill every parameter from a generator seeded by its name: the same weights whatever the mesh.

    Matrices are normal with 1/sqrt(fan-in), those into the residual stream divided by sqrt(2 layers) as in GPT-2, the
    embedding with 0.02; norms are ones.
    """
    deep = 1 / math.sqrt(2 * model.shape.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            full = torch.ones(parameter.shape)
        else:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            std = 0.02 if name.startswith(("embed", "lm_head")) else parameter.shape[1] ** -0.5
            std *= deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            full = torch.normal(0.0, std, parameter.shape, generator=generator)
        full = full.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            local = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(local.to_local())
        else:
            parameter.copy_(full)
