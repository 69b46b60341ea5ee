"""Initial weights, the same on every mesh: each parameter from a generator of its own, seeded by its name."""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
    named = [(canonical(model, name), p) for name, p in model.named_parameters() if not name.endswith(".packed")]
    _all(work for name, parameter in named for work in _pieces(parameter, name, seed, model.shape.layers))
    for buffer in model.buffers():
        buffer.zero_()


def canonical(model: Decoder, name: str) -> str:
    """The name under which a parameter is drawn and saved: a tied head, alone on its stage, is the embedding."""
    return "embed_tokens.weight" if model.shape.tied and name == "lm_head.weight" else name


def drawn(name: str, shape: tuple[int, int], seed: int, layers: int) -> Tensor:
    """A whole matrix with its initial numbers."""
    found = torch.empty(shape)
    _all(_pieces(found, name, seed, layers))
    return found


def _all(pieces: Iterator[Callable[[], None]]) -> None:
    """Each piece has a generator of its own, so that as many threads draw as torch has."""
    threads = torch.get_num_threads()
    if threads == 1:  # a rank on a CPU
        for piece in pieces:
            piece()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(piece) for piece in pieces]:
            done.result()


def _pieces(parameter: Tensor, name: str, seed: int, layers: int) -> Iterator[Callable[[], None]]:
    """What fills this rank's part of a parameter, block by block."""
    shape, offset, local = parameter.shape, (0,) * parameter.dim(), parameter
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
    if name.endswith(("lora_B", "score.weight")):
        local.detach().zero_()
        return
    if parameter.dim() == 1:
        local.detach().fill_(0.0 if name.endswith("bias") else 1.0)
        return
    std = 0.02 if name.startswith(("embed", "lm_head")) else shape[-1] ** -0.5
    std *= 1 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")) else 1.0
    rows = max(1, BLOCK // math.prod(shape[1:]))
    for number, start in enumerate(range(0, shape[0], rows)):
        stop = min(start + rows, shape[0])
        first, last = max(start, offset[0]), min(stop, offset[0] + len(local))
        if first >= last:
            continue
        rest = tuple(slice(o, o + n) for o, n in zip(offset[1:], local.shape[1:], strict=True))
        place, part = local.detach()[first - offset[0] : last - offset[0]], (slice(first - start, last - start), *rest)
        yield partial(_draw, place, part, std, (stop - start, *shape[1:]), f"{seed}/{name}", number)


def _draw(place: Tensor, part: tuple[slice, ...], std: float, shape: tuple[int, ...], name: str, number: int) -> None:
    """Draw a block of this shape and put a part of it in its place."""
    place.copy_(torch.normal(0.0, std, shape, generator=_generator(name, number))[part])


def _generator(name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b((f"{name}/{block}" if block else name).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
