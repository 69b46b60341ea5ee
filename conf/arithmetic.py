"""Arithmetic of a model that both worlds share: parameters, FLOPs, bytes.

Every function takes a plan's model, or arrays of models' values under the same names, and returns the same kind.
"""

from collections.abc import Collection
from typing import Any

FP32 = 4


def query_width(model: Any) -> Any:
    """Width of all query heads; with latent attention a head has a rotary part besides (DeepSeek-V2, section 2.1.3)."""
    return model.heads * (model.head_dim + model.mla.rope)


def value_width(model: Any) -> Any:
    return model.heads * model.head_dim


def attention_matrices(model: Any) -> list[tuple[Any, Any, Any]]:
    """The projections of one block as (outputs, inputs, 1 where the model has this one else 0).

    Ordinary: queries, keys, values, output. Latent (DeepSeek-V2, equations 37 to 47): queries through a narrow waist or
    direct, keys and values through another, output.
    """
    h, wide, value, mla = model.hidden, query_width(model), value_width(model), model.mla
    kv, latent, waist = model.kv_heads * model.head_dim, mla.kv_rank > 0, mla.q_rank > 0
    return [
        (wide, h, 1 - 1 * waist),
        (mla.q_rank, h, 1 * waist),
        (wide, mla.q_rank, 1 * waist),
        (kv, h, 2 - 2 * latent),
        (mla.kv_rank + mla.rope, h, 1 * latent),
        (2 * value, mla.kv_rank, 1 * latent),
        (h, value, 1),
    ]


def attention_parameters(model: Any) -> Any:
    return sum(n * k * there for n, k, there in attention_matrices(model))


def mlp_parameters(model: Any) -> Any:
    """The dense feed-forward: up and down, and a gate: 3 h f, or 2 h f without one."""
    return (2 + 1 * model.gated) * model.hidden * model.ffn


def expert_parameters(model: Any) -> Any:
    """One expert."""
    return (2 + 1 * model.gated) * model.hidden * model.moe.ffn


def expert_layers(model: Any) -> Any:
    """Blocks whose feed-forward is a mixture of experts."""
    return (model.layers - model.moe.dense_layers) * (model.moe.experts > 0)


def common_mlp_parameters(model: Any) -> Any:
    """Feed-forwards of all blocks without their routed experts: dense ones, routers and shared experts."""
    moe = model.moe
    mixed = expert_layers(model)
    return (model.layers - mixed) * mlp_parameters(model) + mixed * (model.hidden * moe.experts + moe.shared * expert_parameters(model))


def routed_parameters(model: Any) -> Any:
    """Routed experts of all blocks."""
    return expert_layers(model) * model.moe.experts * expert_parameters(model)


def vector_parameters(model: Any) -> Any:
    """Norms and biases of one block."""
    h, mla, bias = model.hidden, model.mla, 1 * model.layer_norm
    norms = (1 + bias) * 2 * h + 2 * model.head_dim * model.qk_norm + mla.q_rank + mla.kv_rank
    biases = value_width(model) + 2 * model.kv_heads * model.head_dim + h + (1 + 1 * model.gated) * model.ffn + h
    return norms + bias * biases


def block_parameters(model: Any) -> Any:
    """One decoder block, the mean over dense and mixed ones."""
    return (layers_parameters(model) + routed_parameters(model)) / model.layers


def layers_parameters(model: Any) -> Any:
    """All decoder blocks without their routed experts."""
    return model.layers * (attention_parameters(model) + vector_parameters(model)) + common_mlp_parameters(model)


def embedding_parameters(model: Any) -> Any:
    return model.vocab * model.hidden


def table_parameters(model: Any) -> Any:
    """Embedding, learned positions, and the head unless it is tied."""
    return (2 - 1 * model.tied) * embedding_parameters(model) + model.position_rows * model.hidden


def extra_parameters(model: Any) -> Any:
    """Blocks that predict one more token each: their norms, the projection of [h, 2 h] and a block (DeepSeek-V3, equations 21 to 23);
    embedding and head are the model's own."""
    return model.mtp * (block_parameters(model) + 2 * model.hidden**2 + 3 * model.hidden)


def parameters(model: Any) -> Any:
    """All parameters: blocks, last norm, embedding, learned positions, and the head unless it is tied.

    >>> from conf.program import load
    >>> parameters(load(["model=llama3_8b"]).model) / 1e9
    8.030261248
    """
    rest = table_parameters(model) + extra_parameters(model)
    return layers_parameters(model) + routed_parameters(model) + (1 + 1 * model.layer_norm) * model.hidden + rest


def active_parameters(model: Any) -> Any:
    """Parameters that a token visits."""
    idle = (expert_layers(model) + model.mtp * (model.moe.experts > 0)) * (model.moe.experts - model.moe.top_k) * expert_parameters(model)
    return parameters(model) - idle


def matmul_parameters(model: Any) -> Any:
    """Parameters that take part in a matrix product for every token: blocks without norms, visited experts, and the head."""
    visited = expert_layers(model) * model.moe.top_k * expert_parameters(model)
    blocks = model.layers * attention_parameters(model) + common_mlp_parameters(model) + visited
    extra = model.mtp * (blocks / model.layers + 2 * model.hidden**2 + embedding_parameters(model))
    return blocks + extra + embedding_parameters(model)


def flops_per_token(model: Any, seq_len: Any) -> Any:
    """Model FLOPs of training on one token, forward and backward, nothing recomputed.

    6 P + 6 L s (query width + value width), that is 12 L h s for ordinary heads: the PaLM convention (Chowdhery et al.
    2022, appendix B), in which attention counts the full s × s matrix although a causal kernel computes half of it. MFU
    everywhere in foretold is in this convention.
    """
    return 6 * matmul_parameters(model) + 6 * (model.layers + model.mtp) * seq_len * (query_width(model) + value_width(model))


def adapted(model: Any, targets: Collection[str]) -> list[tuple[str, float, float, float]]:
    """The matrices of these names: name, inputs, outputs, and how many blocks have it; routed experts have none."""
    h, latent, mixed = model.hidden, model.mla, expert_layers(model)
    if latent.kv_rank:
        wide = model.heads * (model.head_dim + latent.rope)
        found = [("q_a_proj", h, latent.q_rank), ("q_b_proj", latent.q_rank, wide)] if latent.q_rank else [("q_proj", h, wide)]
        found += [("kv_a_proj_with_mqa", h, latent.kv_rank + latent.rope), ("kv_b_proj", latent.kv_rank, 2 * model.heads * model.head_dim)]
    else:
        found = [("q_proj", h, query_width(model)), *((name, h, model.kv_heads * model.head_dim) for name in ("k_proj", "v_proj"))]
    each = [(*one, model.layers) for one in (*found, ("o_proj", value_width(model), h))]
    for width, count in ((model.ffn, model.layers - mixed), (model.moe.shared * model.moe.ffn, mixed)):
        ways = [("up_proj", h, width), ("down_proj", width, h), *([("gate_proj", h, width)] if model.gated else [])]
        each += [(*one, count) for one in ways if width * count]
    return [one for one in each if one[0] in targets]


def adapter_parameters(model: Any, targets: Collection[str], rank: float) -> Any:
    """r (inputs + outputs) of every adapted matrix (Hu et al. 2021, section 4.1).

    >>> from conf.program import load
    >>> adapter_parameters(load(["model=llama3_8b"]).model, ["q_proj", "v_proj"], 16)
    6815744
    """
    return sum(rank * (inputs + outputs) * count for _, inputs, outputs, count in adapted(model, targets))


def tuned_flops_per_token(model: Any, seq_len: Any, adapters: Any) -> Any:
    """Model FLOPs of training so many parameters of adapters on a frozen model: 4 P, since frozen matrices have no gradient, attention
    as ever, and 6 a parameter of the adapters."""
    return flops_per_token(model, seq_len) - 2 * matmul_parameters(model) + 6 * adapters


def state_bytes(model: Any) -> Any:
    """Bytes of a checkpoint: fp32 weights and AdamW's two fp32 moments, 12 a parameter."""
    return 3 * FP32 * parameters(model)


def tensors(model: Any) -> Any:
    """Parameter tensors of a dense model: nine a block, the last norm and the tables."""
    return 9 * model.layers + 3 - model.tied


def state_tensors(model: Any) -> Any:
    """Tensors in a checkpoint: each parameter and its two moments."""
    return 3 * tensors(model)


def recomputes(share: float, index: int) -> bool:
    """Whether a block is one of those that recompute: an even spread, so that pipeline stages have the same share.

    >>> [recomputes(0.5, index) for index in range(4)]
    [False, True, False, True]
    """
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


def stage_blocks(layers: int, stages: int, stage: int) -> range:
    """The blocks of a pipeline's (virtual) stage. Where the layers do not divide by the stages, embedding and head count as layers
    if that divides.

    >>> [len(stage_blocks(126, 16, stage)) for stage in (0, 1, 15)]
    [7, 8, 7]
    """
    if layers % stages and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return range(max(0, stage * each - 1), min(layers, (stage + 1) * each - 1))
    return range(layers * stage // stages, layers * (stage + 1) // stages)
