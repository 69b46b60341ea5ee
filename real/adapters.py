"""Low-rank adapters: frozen matrices with a trained product of two narrow ones beside them (LoRA, Hu et al. 2021, arXiv 2106.09685).

y = x Wᵀ + (α / r) (x Aᵀ) Bᵀ, with A [r, in] drawn and B [out, r] zero, so that training starts at the base model. On a mesh A is cut where
W's inputs are, and B where its outputs are; what is not cut gets its gradient from every rank.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.errors import Refused, nearest
from conf.files import write
from conf.plan import Finetune, Plan
from real import checkpoint, huggingface
from real.layers import Linear, own
from real.model import Decoder


class Adapted(Linear):
    """A frozen matrix with its adapter; with `active` off it is the base's."""

    def __init__(self, base: Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.active, self.scale = base.weight, base.bias, True, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device, dtype=base.weight.dtype))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=base.weight.device, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.active:
            return out
        return out + F.linear(F.linear(x, own(self.lora_A)), own(self.lora_B)) * self.scale


def adapt(model: Decoder, tune: Finetune) -> None:
    """Freeze the model and put adapters beside the matrices that `tune.targets` name.

    Raises Refused where a name fits no matrix of the blocks.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linear = {path: module for path, module in model.layers.named_modules() if isinstance(module, Linear)}
    names = sorted({path.split(".")[-1] for path in linear})
    if strange := [target for target in tune.targets if target not in names]:
        raise Refused(f"finetune.targets names {strange[0]}, which is no matrix of a block; {nearest(strange[0], names)}")
    for path, module in linear.items():
        parent, _, name = path.rpartition(".")
        if name in tune.targets:
            setattr(model.layers.get_submodule(parent), name, Adapted(module, tune.rank, tune.alpha))


def save(path: Path, plan: Plan, base: Path, target: Path) -> int:
    """Adapters of a checkpoint in PEFT's format; returns how many parameters they have."""
    held = {name: torch.empty(shape) for name, shape in checkpoint.shapes(path).items() if name.endswith(checkpoint.ADAPTER)}
    held = {name: tensor for name, tensor in held.items() if name.startswith("model.")}
    checkpoint.read(held, path)
    aside, tune = target.with_name(f".{target.name}.partial"), plan.finetune
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    named = {f"base_model.model.model.{name.removeprefix('model.')}.weight": tensor for name, tensor in held.items()}
    save_file(named, aside / "adapter_model.safetensors", {"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": tune.rank, "lora_alpha": tune.alpha,
            "target_modules": list(tune.targets), "lora_dropout": 0.0, "bias": "none", "inference_mode": True}  # fmt: skip
    write(aside / "adapter_config.json", json.dumps(told, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return sum(tensor.numel() for tensor in held.values())


def merge(path: Path, plan: Plan, base: Path, target: Path, tokenizer: Path | None) -> int:
    """The base with a checkpoint's adapters added into its matrices, as Hugging Face's folder; returns the bytes."""
    model = Decoder(plan.model)
    adapt(model, plan.finetune)
    if (base / "config.json").is_file():
        huggingface.load(base, plan.model, [model])
    else:
        checkpoint.load_model(base, [model])
    checkpoint.read({f"model.{name}": p.detach() for name, p in model.named_parameters() if name.endswith(checkpoint.ADAPTER)}, path)
    for module in model.modules():
        if isinstance(module, Adapted):
            module.weight.data += module.scale * module.lora_B.data @ module.lora_A.data
    named = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(checkpoint.ADAPTER)}
    named = {name: tensor for name, tensor in named.items() if not (plan.model.tied and name == "lm_head.weight")}
    return huggingface.write_model(lambda names: [named[name] for name in names], list(named), plan.model, plan.tuned.train.seq_len, target,
                                   tokenizer)  # fmt: skip
