"""Whether replicas still hold the same weights, to the last bit.

A bit that turned in one of them spoils all through the next sum of gradients, without a sign. So each rank sums the bits of its
own part, each times an odd number of its place, and those that must hold the same compare their sums.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from real.optim import local
from real.parallel import Axes

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: list[Tensor]) -> Tensor:
    """One int64 of the bits of all tensors and of their places; it wraps around.

    >>> one = torch.tensor([1.0, 2.0])
    >>> bool(checksum([one]) == checksum([one.clone()])), bool(checksum([one]) == checksum([one.flip(0)]))
    (True, False)
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for number, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()]).to(torch.int64)
        places = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64).mul_(2).add_(2 * number + 1)
        total += (bits * places).sum()
    return total


def differing(parameters: list[tuple[str, Tensor]], axes: Axes) -> list[int]:
    """Replicas whose weights differ from those of most others, over all ranks; of two that differ, both."""
    group = axes.shards.get_group("dp_replicate")
    mine = checksum([local(parameter) for _, parameter in parameters])
    sums = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sums, mine, group=group)
    values = [int(each) for each in sums]
    usual = max(values, key=values.count)
    tied = values.count(usual) * 2 <= len(values) and len(set(values)) > 1
    wrong = torch.tensor([float(tied or value != usual) for value in values], device=mine.device)
    dist.all_reduce(wrong, dist.ReduceOp.MAX)
    return [number for number, bad in enumerate(wrong.tolist()) if bad]
