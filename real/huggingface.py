"""Exchange with Hugging Face's layout: config.json and safetensors, for the families whose arithmetic the decoder has.

A link says which tensors of ours and of theirs hold the same numbers, and how to turn one into the other; export and
import read the same table.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from conf.errors import Refused
from conf.files import write
from conf.plan import Model
from real import checkpoint
from real.initial import canonical
from real.model import Decoder

FILE_BYTES = 5_000_000_000  # of one safetensors file
Turn = Callable[[list[Tensor]], list[Tensor]]


def _same(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


@dataclass(frozen=True)
class Link:
    ours: list[str]
    theirs: list[str]
    out: Turn = _same  # ours to theirs
    back: Turn = _same


# -- the families


def family(model: Model) -> str:
    """The architecture of Hugging Face's that computes what this model does.

    Raises Refused when there is none.
    """
    moe, cure = model.moe, "train it here, or change the model's shape to that of a family"
    if model.layer_norm or not model.gated or model.positions == "learned":
        if model.layer_norm and not model.gated and model.positions == "learned" and model.kv_heads == model.heads and model.tied:
            return "gpt2"
        raise Refused(f"model={model.name} is no GPT-2: that has LayerNorm, no gate, learned positions, all heads, a tied head; {cure}")
    if model.mla.kv_rank:
        if moe.experts and moe.score == "sigmoid" and model.rope_scaling.kind == "none":
            return "deepseek_v3"
        raise Refused(f"model={model.name}: latent attention is exchanged as DeepSeek-V3, which routes by sigmoid; {cure}")
    if not moe.experts:
        return "qwen3" if model.qk_norm else "llama"
    if moe.score == "softmax" and moe.normalise and moe.scale == 1.0 and not moe.shared and moe.groups == 1:
        if model.qk_norm:
            return "qwen3_moe"
        if not moe.dense_layers:
            return "mixtral"
    raise Refused(f"model={model.name}: no family routes so; Qwen3-MoE and Mixtral normalise a softmax, sharing none; {cure}")


CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt2": "GPT2LMHeadModel",
           "mixtral": "MixtralForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}  # fmt: skip


def config(model: Model, seq_len: int) -> dict[str, Any]:
    """config.json of a model."""
    kind, moe, mla = family(model), model.moe, model.mla
    told: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "torch_dtype": "float32", "vocab_size": model.vocab,
                            "tie_word_embeddings": model.tied, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}  # fmt: skip
    if kind == "gpt2":
        return told | {"n_embd": model.hidden, "n_layer": model.layers, "n_head": model.heads, "n_inner": model.ffn,
                       "n_positions": model.position_rows, "layer_norm_epsilon": model.norm_epsilon, "activation_function": "gelu_new",
                       "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
    told |= {
        "hidden_size": model.hidden, "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim, "intermediate_size": model.ffn, "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon, "max_position_embeddings": seq_len, "attention_bias": False, "rope_theta": model.rope_theta,
    }  # fmt: skip
    scaling = model.rope_scaling
    if scaling.kind != "none":
        told["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor, "low_freq_factor": scaling.low,
                                "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original}  # fmt: skip
    experts = {"num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.ffn, "norm_topk_prob": moe.normalise}
    if kind == "qwen3_moe":
        told |= experts | {"num_experts": moe.experts, "decoder_sparse_step": 1, "mlp_only_layers": list(range(moe.dense_layers))}
    if kind == "mixtral":
        told |= {"num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k, "intermediate_size": moe.ffn, "sliding_window": None}
    if kind == "deepseek_v3":
        told |= experts | {
            "n_routed_experts": moe.experts, "n_shared_experts": moe.shared, "first_k_dense_replace": moe.dense_layers,
            "routed_scaling_factor": moe.scale, "n_group": moe.groups, "topk_group": moe.node_limit or moe.groups,
            "kv_lora_rank": mla.kv_rank, "q_lora_rank": mla.q_rank or None, "qk_rope_head_dim": mla.rope,
            "qk_nope_head_dim": model.head_dim, "v_head_dim": model.head_dim, "head_dim": mla.rope, "rope_interleave": False,
        }  # fmt: skip
    return told


def links(model: Model, names: Sequence[str], interleaved: bool = False) -> Iterator[Link]:
    """The table for these parameters of ours; `interleaved` is the order of DeepSeek's rotary pairs in their file."""
    kind = family(model)
    if kind == "gpt2":
        yield from _gpt2(model)
        return
    for name in names:
        if ".experts." in name:
            yield _experts(model, name, kind)
            continue
        theirs = name if name == "lm_head.weight" else f"model.{name}"
        theirs = theirs.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else theirs
        turned = interleaved and ("q_proj" in name or "q_b_proj" in name or "kv_a_proj" in name)
        yield Link([name], [theirs], back=_halves(model, "kv_a" in name)) if turned else Link([name], [theirs])


def _experts(model: Model, name: str, kind: str) -> Link:
    """Our stacked matrices, their one an expert."""
    stem, what = name.rsplit(".", 1)
    if kind == "mixtral":
        stem, what = stem.replace(".mlp.", ".block_sparse_moe."), {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[what]
    theirs = [f"model.{stem}.{e}.{what}.weight" for e in range(model.moe.experts)]
    return Link([name], theirs, lambda ours: list(ours[0].unbind()), lambda found: [torch.stack(found)])


def _halves(model: Model, key: bool) -> Turn:
    """From rotary pairs side by side to ours, whose second halves follow the first."""
    rope, plain = model.mla.rope, model.mla.kv_rank if key else model.head_dim
    order = torch.cat((torch.arange(plain), plain + torch.arange(0, rope, 2), plain + torch.arange(1, rope, 2)))
    return lambda found: [found[0].unflatten(0, (-1, plain + rope))[:, order].flatten(0, 1)]


def _gpt2(model: Model) -> Iterator[Link]:
    """GPT-2 keeps its matrices transposed, and queries, keys and values in one."""
    yield Link(["embed_tokens.weight"], ["transformer.wte.weight"])
    yield Link(["embed_positions.weight"], ["transformer.wpe.weight"])
    pairs = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc",
             "mlp.down_proj": "mlp.c_proj"}  # fmt: skip
    for i in range(model.layers):
        for kind in ("weight", "bias"):
            for ours, theirs in pairs.items():
                turn: Turn = (lambda t: [t[0].T.contiguous()]) if kind == "weight" and "_proj" in ours else _same
                yield Link([f"layers.{i}.{ours}.{kind}"], [f"transformer.h.{i}.{theirs}.{kind}"], turn, turn)
            three = [f"layers.{i}.self_attn.{x}_proj.{kind}" for x in "qkv"]
            out: Turn = lambda t: [torch.cat(t).T.contiguous() if t[0].dim() == 2 else torch.cat(t)]  # noqa: E731
            back: Turn = lambda t: list((t[0].T.contiguous() if t[0].dim() == 2 else t[0]).chunk(3))  # noqa: E731
            yield Link(three, [f"transformer.h.{i}.attn.c_attn.{kind}"], out, back)
    for kind in ("weight", "bias"):
        yield Link([f"norm.{kind}"], [f"transformer.ln_f.{kind}"])


# -- export


def export(path: Path, model: Model, seq_len: int, target: Path, tokenizer: Path | None) -> int:
    """Write the model of a checkpoint as Hugging Face's folder, file by file; returns the bytes.

    Raises Refused when the model fits no family or the folder exists.
    """
    there = checkpoint.shapes(path)

    def reading(names: Sequence[str]) -> list[Tensor]:
        ours = {f"model.{name}": torch.empty(there[f"model.{name}"]) for name in names}
        checkpoint.read(ours, path)
        return list(ours.values())

    return write_model(
        reading, [name.removeprefix("model.") for name in there if name.startswith("model.")], model, seq_len, target, tokenizer
    )


def write_model(reading: Callable[[Sequence[str]], list[Tensor]], names: Sequence[str], model: Model, seq_len: int, target: Path,
                tokenizer: Path | None) -> int:  # fmt: skip
    """The same of tensors that `reading` gives by our names."""
    told = config(model, seq_len)
    if target.exists() and any(target.iterdir()):
        raise Refused(f"export={target} exists and is not empty; name a new folder, or delete it")
    files: list[dict[str, Tensor]] = [{}]
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    index: dict[str, str] = {}
    size = total = 0
    for link in links(model, names):
        for name, tensor in zip(link.theirs, link.out(reading(link.ours)), strict=True):
            nbytes = tensor.numel() * tensor.element_size()
            if size and size + nbytes > FILE_BYTES:
                _put(aside, files[-1], len(files), index)
                files.append({})
                size = 0
            files[-1][name] = tensor.contiguous()
            size, total = size + nbytes, total + nbytes
    _put(aside, files[-1], len(files), index)
    _name(aside, len(files), index, total)
    write(aside / "config.json", json.dumps(told, indent=2))
    if tokenizer is not None and tokenizer.is_file():
        shutil.copy(tokenizer, aside / "tokenizer.json")
        write(aside / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}))
    if target.exists():
        target.rmdir()
    aside.rename(target)
    return total


def _put(folder: Path, tensors: dict[str, Tensor], number: int, index: dict[str, str]) -> None:
    name = f"model-{number:05}.safetensors"
    save_file(tensors, folder / name, {"format": "pt"})
    index |= dict.fromkeys(tensors, name)
    tensors.clear()


def _name(folder: Path, count: int, index: dict[str, str], total: int) -> None:
    """Names as Hugging Face gives them: how many there are is known at the end."""
    if count == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    final = {f"model-{i:05}.safetensors": f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)}
    for old, new in final.items():
        (folder / old).rename(folder / new)
    told = {"metadata": {"total_size": total}, "weight_map": {name: final[file] for name, file in index.items()}}
    write(folder / "model.safetensors.index.json", json.dumps(told, indent=1))


# -- import


def refuse_other(folder: Path, model: Model) -> None:
    """Whether a folder holds weights for this model.

    Raises Refused with every value of config.json that differs.
    """
    try:
        found = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise Refused(f"{folder / 'config.json'} is no JSON ({error}); copy it again") from error
    keys = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
            "moe_intermediate_size", "kv_lora_rank", "n_embd", "n_layer", "n_head")  # fmt: skip
    wanted = config(model, 1)
    wrong = [f"{key} is {found.get(key)} in config.json, {wanted[key]} in the plan" for key in keys if wanted.get(key) != found.get(key)
             and key in wanted and key in found]  # fmt: skip
    if found.get("model_type") != wanted["model_type"] or wrong:
        raise Refused(f"start={folder} is of another model than model={model.name}; choose its preset, or set these values", *wrong)


def load(folder: Path, model: Model, parts: Sequence[Decoder]) -> None:
    """Fill the parameters of these parts; each rank reads what its parts need.

    Raises Refused when a tensor is missing or has another shape.
    """
    named = {canonical(part, name): p for part in parts for name, p in part.named_parameters() if not name.endswith(checkpoint.TUNED)}
    named |= {name: b for part in parts for name, b in part.named_buffers() if name.endswith("correction_bias")}
    told = json.loads((folder / "config.json").read_text())
    interleaved = bool(told.get("rope_interleave", True)) and told["model_type"] == "deepseek_v3"
    with ExitStack() as stack, torch.no_grad():
        files = _Files(folder, stack)
        for link in links(model, list(named), interleaved):
            if not any(name in named for name in link.ours):
                continue
            for name, whole in zip(link.ours, link.back([files.tensor(name) for name in link.theirs]), strict=True):
                if name in named:
                    _fill(named[name], whole, name)


def whole(folder: Path, model: Model, name: str, shape: tuple[int, int]) -> Tensor:
    """One matrix of ours."""
    told = json.loads((folder / "config.json").read_text())
    interleaved = bool(told.get("rope_interleave", True)) and told["model_type"] == "deepseek_v3"
    with ExitStack() as stack:
        files = _Files(folder, stack)
        link = next(link for link in links(model, [name], interleaved) if name in link.ours)
        found = link.back([files.tensor(theirs) for theirs in link.theirs])[link.ours.index(name)]
    if found.shape != shape:
        raise Refused(f"{name} is {tuple(found.shape)} in the files, {shape} in the plan; choose the model's preset")
    return found


class _Files:
    """Tensors by name, from one file or from those that an index names."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        index = folder / "model.safetensors.index.json"
        self.where: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
        self.open: dict[str, Any] = {}

    def tensor(self, name: str) -> Tensor:
        file = self.where.get(name, "model.safetensors")
        try:
            if file not in self.open:
                self.open[file] = self.stack.enter_context(safe_open(self.folder / Path(file).name, "pt"))
            out: Tensor = self.open[file].get_tensor(name)
            return out
        except (OSError, SafetensorError) as error:
            raise Refused(f"{self.folder / file} does not give {name} ({error}); copy the folder again") from error


def _fill(parameter: Tensor, whole: Tensor, name: str) -> None:
    if whole.shape != parameter.shape:
        raise Refused(f"{name} is {tuple(whole.shape)} in the files, {tuple(parameter.shape)} in the plan; choose the model's preset")
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        whole = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        parameter = parameter.to_local()
    parameter.copy_(whole)
