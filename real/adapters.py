"""Low-rank adapters: frozen matrices with a trained product of two narrow ones beside them (LoRA, Hu et al. 2021, arXiv 2106.09685).

y = x Wᵀ + (α / r) (x Aᵀ) Bᵀ, with A [r, in] drawn and B [out, r] zero, so that training starts at the base model. On a mesh A is cut where
W's inputs are, and B where its outputs are; what is not cut gets its gradient from every rank.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from conf.errors import Refused, nearest
from conf.files import write
from conf.plan import Plan
from real import checkpoint, huggingface, nf4
from real.layers import ROWS, Linear, own
from real.model import Decoder


class Adapted(Linear):
    """A frozen matrix with its adapter; with `active` off it is the base's."""

    def __init__(self, base: Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias, self.active, self.scale = base.bias, True, alpha / rank
        self._hold(base)
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, **like))

    def _hold(self, base: Linear) -> None:
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.active:
            return out
        return out + F.linear(F.linear(x, own(self.lora_A)), own(self.lora_B)) * self.scale

    def merged(self) -> Tensor:
        """The matrix with its adapter in it; of a model that is not cut."""
        return self.whole() + self.scale * self.lora_B.detach() @ self.lora_A.detach()

    def whole(self) -> Tensor:
        return self.weight.detach()


class Quantised(Linear):
    """A frozen matrix in four bits. Its bytes are one parameter in the type that sharding computes in, so that they travel as they are;
    over tp each rank has the bytes of its own part of the matrix."""

    def __init__(self, base: Linear, tp: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self._pack(base, tp, dtype)

    def _pack(self, base: Linear, tp: int, dtype: torch.dtype) -> None:
        self.shares, self.weight = tp, None  # into which tp cuts the matrix
        each = nf4.size(base.weight.numel() // tp) // dtype.itemsize
        self.packed = nn.Parameter(torch.empty(tp * each, device=base.weight.device, dtype=dtype), requires_grad=False)

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = (self.shares if name == side else 1 for side in ("columns", "rows"))
        return self.out_features // rows, self.in_features // columns

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else own(self.bias)
        out = _Product.apply(x, own(self.packed), self._shape(self.side))
        return out if bias is None else out + (bias if self.bias_share == 1.0 else bias * self.bias_share)

    side = "columns"  # which of its sides tp cuts

    def whole(self) -> Tensor:
        return nf4.dequantise(self.packed.detach().view(torch.uint8), (self.out_features, self.in_features), torch.float32)

    def fill(self, weight: Tensor, part: int) -> None:
        """Take the bytes of a matrix, of which this is the tensor-parallel rank `part`."""
        mine = weight.chunk(self.shares, 0 if self.side == "columns" else 1)[part]
        bytes_ = nf4.quantise(mine.to(self.packed.device)).view(self.packed.dtype)
        if not isinstance(self.packed, DTensor):
            self.packed.data.copy_(bytes_)
            return
        mesh, local = self.packed.device_mesh["dp_shard"], self.packed.to_local()
        start = mesh.get_local_rank() * -(-len(bytes_) // mesh.size())
        local.copy_(bytes_[start : start + len(local)])


class QuantisedAdapted(Adapted, Quantised):
    """Both: `forward` of the first asks the second."""

    def __init__(self, base: Linear, tp: int, dtype: torch.dtype, rank: int, alpha: float) -> None:
        self._cut = tp, dtype
        Adapted.__init__(self, base, rank, alpha)

    def _hold(self, base: Linear) -> None:
        self._pack(base, *self._cut)

    def whole(self) -> Tensor:
        return Quantised.whole(self)


class _Product(Function):
    """x Wᵀ with W made of its bytes in either pass, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, nf4.dequantise(packed.view(torch.uint8), shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return grad @ nf4.dequantise(packed.view(torch.uint8), ctx.shape, grad.dtype), None, None


def adapt(model: Decoder, plan: Plan) -> None:
    """Freeze the model, in half precision or four bits where the plan says so, and put adapters beside the matrices that
    `finetune.targets` name.

    Raises Refused where a name fits no matrix of the blocks.
    """
    tune, dtype, tp = plan.finetune, torch.bfloat16 if plan.train.half else torch.float32, plan.mesh.tp
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    model.tie()
    linear = {path: module for path, module in model.layers.named_modules() if isinstance(module, Linear)}
    names = sorted({path.split(".")[-1] for path in linear})
    if strange := [target for target in tune.targets if target not in names]:
        raise Refused(
            f"targets=[{','.join(tune.targets)}] names {strange[0]}, which is no matrix of a block here; {nearest(strange[0], names)}"
        )
    for path, module in linear.items():
        parent, _, name = path.rpartition(".")
        small = tune.method == "qlora" and nf4.fits(module.weight.numel() // tp)
        if name in tune.targets:
            adapter = tune.rank, tune.alpha
            made: Linear = QuantisedAdapted(module, tp, dtype, *adapter) if small else Adapted(module, *adapter)
        elif small:
            made = Quantised(module, tp, dtype)
        else:
            continue
        if isinstance(made, Quantised):
            made.side = "rows" if name in ROWS else "columns"
        setattr(model.layers.get_submodule(parent), name, made)


def fill(model: Decoder, reading: Callable[[str, tuple[int, int]], Tensor], part: int) -> None:
    """Give every matrix in four bits its bytes, of the whole matrix that `reading` gives by its name and shape."""
    for path, module in model.layers.named_modules():
        if isinstance(module, Quantised):
            module.fill(reading(f"layers.{path}.weight", (module.out_features, module.in_features)), part)


def load_base(base: Path, plan: Plan, parts: Sequence[Decoder], part: int) -> None:
    """The weights that are fine-tuned, from a checkpoint or a Hugging Face folder; `part` is the tensor-parallel rank.

    Raises Refused when they are of another model.
    """
    elsewhere = (base / "config.json").is_file()
    if elsewhere:
        huggingface.refuse_other(base, plan.model)
        huggingface.load(base, plan.model, parts)
    else:
        checkpoint.load_model(base, parts)
    for model in parts:
        fill(model, partial(huggingface.whole, base, plan.model) if elsewhere else partial(checkpoint.whole, base), part)


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
    adapt(model, plan.but(**{"mesh.tp": 1}))
    load_base(base, plan, [model], 0)
    checkpoint.read({f"model.{name}": p.detach() for name, p in model.named_parameters() if name.endswith(checkpoint.ADAPTER)}, path)
    named = merged(model)
    return huggingface.write_model(lambda names: [named[name] for name in names], list(named), plan.model, plan.tuned.train.seq_len, target,
                                   tokenizer)  # fmt: skip


def merged(model: Decoder) -> dict[str, Tensor]:
    """The parameters of a whole model by name, adapters added into their matrices."""
    named = {name: p.detach().float() for name, p in model.named_parameters() if not name.endswith(checkpoint.TUNED)}
    named |= {name: b for name, b in model.named_buffers() if name.endswith("correction_bias")}
    for name, module in model.named_modules():
        if isinstance(module, Adapted | Quantised):
            named[f"{name}.weight"] = module.merged() if isinstance(module, Adapted) else module.whole()
    return named
