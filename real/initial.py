"""Initial weights, the same on every mesh: each parameter from a generator of its own, seeded by its name."""

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from real.model import Decoder

BLOCK = 1 << 24  # elements drawn at a time: a large matrix is never whole in memory


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Fill parameters and buffers.

    Matrices are normal with 1/sqrt(fan-in), those into the residual stream divided by sqrt(2 layers) as in GPT-2,
    embedding and head with 0.02; norms are ones; biases, and what begins with no effect (scores, adapters), zeros.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith(".packed"):
            draw(parameter, canonical(model, name), seed, model.shape.layers)
    for buffer in model.buffers():
        buffer.zero_()


def canonical(model: Decoder, name: str) -> str:
    """The name under which a parameter is drawn and saved: a tied head, alone on its stage, is the embedding."""
    return "embed_tokens.weight" if model.shape.tied and name == "lm_head.weight" else name


def drawn(name: str, shape: tuple[int, int], seed: int, layers: int) -> Tensor:
    """A whole matrix with its initial numbers."""
    found = torch.empty(shape)
    draw(found, name, seed, layers)
    return found


def draw(parameter: Tensor, name: str, seed: int, layers: int) -> None:
    shape, offset, local = parameter.shape, (0,) * parameter.dim(), parameter
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
    if name.endswith(("lora_B", "score.weight")):
        local.zero_()
        return
    if parameter.dim() == 1:
        local.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    std = 0.02 if name.startswith(("embed", "lm_head")) else shape[-1] ** -0.5
    std *= 1 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")) else 1.0
    rows = max(1, BLOCK // math.prod(shape[1:]))
    for number, start in enumerate(range(0, shape[0], rows)):
        stop = min(start + rows, shape[0])
        first, last = max(start, offset[0]), min(stop, offset[0] + len(local))
        if first >= last:
            continue
        block = torch.normal(0.0, std, (stop - start, *shape[1:]), generator=_generator(f"{seed}/{name}", number))
        rest = tuple(slice(o, o + n) for o, n in zip(offset[1:], local.shape[1:], strict=True))
        local[first - offset[0] : last - offset[0]] = block[first - start : last - start][:, *rest].to(local.dtype)


def _generator(name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b((f"{name}/{block}" if block else name).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
