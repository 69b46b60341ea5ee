"""What the trainer is held against: a loop tuned by hand, with nothing in it that a plan could change, and transformers' Llama.

Both keep weights and moments in fp32 and compute in bf16 where the plan does, as the trainer does, and do the same arithmetic: the plan's
shape, batch, clipping and AdamW. Shapes: B sequences, T tokens, D hidden, H query heads, G key-value heads, E head width.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.plan import Model, Plan
from real.data import Batch, Order, Tokens, batch_of

KEPT = 2  # steps' batches, given again and again


def batches(plan: Plan, folder: Path) -> list[Batch]:
    """Of a few steps."""
    tokens = Tokens(folder, "train", plan.train.seq_len)
    order, size = Order(len(tokens), plan.seed), plan.train.global_batch
    return [batch_of(tokens, [order[i] for i in range(step * size, (step + 1) * size)], False) for step in range(KEPT)]


class Block(nn.Module):
    """A Llama block with joined projections."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        D, E = model.hidden, model.head_dim
        self.heads = model.heads, model.kv_heads, model.kv_heads
        self.before, self.after = (nn.RMSNorm(D, model.norm_epsilon) for _ in range(2))
        self.qkv = nn.Linear(D, sum(self.heads) * E, bias=False)
        self.out = nn.Linear(model.heads * E, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * model.ffn, bias=False)
        self.down = nn.Linear(model.ffn, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(B, T, sum(self.heads), -1).transpose(1, 2).split(self.heads, 1)
        q, k = (_turned(y, cos, sin) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.after(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, model: Model, seq_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(model.vocab, model.hidden)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.hidden, model.norm_epsilon)
        self.head = nn.Linear(model.hidden, model.vocab, bias=False)
        if model.tied:
            self.head.weight = self.embed.weight
        angle = torch.outer(torch.arange(seq_len), model.rope_theta ** (-torch.arange(0, model.head_dim, 2) / model.head_dim))
        self.cos, self.sin = nn.Buffer(angle.cos()), nn.Buffer(angle.sin())
        for matrix in (module for module in self.modules() if isinstance(module, nn.Linear | nn.Embedding)):
            nn.init.normal_(matrix.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss a token."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def by_hand(plan: Plan, found: Sequence[Batch], device: torch.device) -> Callable[[int], float]:
    with torch.device(device):
        model = Llama(plan.model, plan.train.seq_len)
    if plan.train.compile:
        for block in model.blocks:
            block.compile()
        model.loss = torch.compile(model.loss)  # type: ignore[method-assign]
    return _loop(plan, found, device, model, lambda part: model(part.inputs, part.targets))


def transformers(plan: Plan, found: Sequence[Batch], device: torch.device) -> Callable[[int], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from real import huggingface

    told = huggingface.config(plan.model, plan.train.seq_len) | {"use_cache": False, "attn_implementation": "sdpa"}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**told))
    if plan.train.compile:
        model.compile()
    return _loop(plan, found, device, model, lambda part: model(input_ids=part.inputs, labels=part.inputs).loss)


BASELINES = {"by_hand": by_hand, "transformers": transformers}


def _loop(
    plan: Plan, found: Sequence[Batch], device: torch.device, model: nn.Module, loss: Callable[[Batch], Tensor]
) -> Callable[[int], float]:
    """Forward, backward, clip, step."""
    train = plan.train
    adam = torch.optim.AdamW(
        model.parameters(), train.learning_rate, (train.beta1, train.beta2), train.epsilon, train.weight_decay, fused=True
    )
    turns = cycle(found)

    def step(_: int) -> float:
        told = torch.zeros((), device=device)
        for part in next(turns).split(train.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=train.half):
                mean = loss(part) / plan.accumulation
            mean.backward()
            told += mean.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(told)

    return step
