"""Arithmetic of a model that both worlds share: parameters, FLOPs, bytes.

Every function takes the plan's groups or arrays of their values under the same names, and returns the same kind.
"""

from typing import Any

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2}


def attention_parameters(model: Any) -> Any:
    """Query, key, value and output projections of one block: h (2h + 2 h kv/heads)."""
    return model.hidden * (2 * model.hidden + 2 * model.hidden * model.kv_heads // model.heads)


def mlp_parameters(model: Any) -> Any:
    """Gate, up and down projections of one SwiGLU: 3 h f."""
    return 3 * model.hidden * model.ffn


def block_parameters(model: Any) -> Any:
    """One decoder block with its two norms."""
    return attention_parameters(model) + mlp_parameters(model) + 2 * model.hidden


def embedding_parameters(model: Any) -> Any:
    return model.vocab * model.hidden


def parameters(model: Any) -> Any:
    """All parameters: blocks, last norm, embedding, and the head unless it is tied.

    >>> from types import SimpleNamespace as S
    >>> parameters(S(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, tied=False)) / 1e9
    8.030261248
    """
    tables = 2 - 1 * model.tied
    return model.layers * block_parameters(model) + model.hidden + tables * embedding_parameters(model)


def matmul_parameters(model: Any) -> Any:
    """Parameters that take part in a matrix product for every token: blocks without norms, and the head."""
    return model.layers * (attention_parameters(model) + mlp_parameters(model)) + embedding_parameters(model)


def flops_per_token(model: Any, seq_len: Any) -> Any:
    """Model FLOPs of training on one token, forward and backward, nothing recomputed.

    6 P + 12 L h s: the PaLM convention (Chowdhery et al. 2022, appendix B), in which attention counts the full s × s
    matrix although a causal kernel computes half of it. MFU everywhere in foretold is in this convention.
    """
    return 6 * matmul_parameters(model) + 12 * model.layers * model.hidden * seq_len


def attention_flops(model: Any, seq_len: Any) -> Any:
    """Forward FLOPs of causal attention in one block for one token, as executed: 2 h s (scores and values, half masked)."""
    return 2 * model.hidden * seq_len


def state_bytes(model: Any) -> Any:
    """Bytes of a checkpoint: fp32 weights and AdamW's two fp32 moments, 12 a parameter."""
    return 3 * FP32 * parameters(model)
