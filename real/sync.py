"""New weights on their way from the trainers to the generators, and the proof that they arrived.

Every way moves the same numbers: whole tensors in buckets, one by one, or unit by unit as sharding gathers them; adapters alone; or only
the elements that changed. A generator's checksum after each must be the trainers'.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from conf.alignment import Align
from conf.errors import Refused
from real.checkpoint import ADAPTER
from real.model import Decoder

PIECE = 1 << 24  # elements of a checksum that are in memory as 64 bits at a time
WHOLE = -1  # in the place of a count of changes: the tensor follows whole


class Moved(NamedTuple):
    """What one synchronisation came to."""

    bytes: int
    seconds: float
    checksum: int


class Bridge:
    """One trainer and all generators, in a group of their own beside those of their roles; the trainer is the first."""

    def __init__(self, store: dist.Store, index: int, size: int, cuda: bool, patience: timedelta) -> None:
        table = dist.PrefixStore("bridge", store)
        made: Any = dist.ProcessGroupNCCL(table, index, size) if cuda else dist.ProcessGroupGloo(table, index, size, patience)
        self.group, self.sent = made, 0

    def broadcast(self, tensor: Tensor) -> Tensor:
        """From the first to the others, in place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.group.broadcast([tensor], options).wait()
        self.sent += tensor.numel() * tensor.element_size()
        return tensor


class Part(NamedTuple):
    """A parameter on its way; the last of what was gathered together ends a unit."""

    name: str
    tensor: Tensor
    ends: bool


def travelling(model: Decoder, align: Align) -> tuple[list[str], list[str]]:
    """Names of the parameters that go, in their order, and which of them end a unit."""
    units = [names for _, names in _units(model, align)]
    return [name for names in units for name in names], [names[-1] for names in units]


def whole(model: Decoder, align: Align) -> Iterator[Part]:
    """Every travelling parameter, gathered from all trainers, which must all iterate: unit by unit as for a forward pass, so that all
    of a unit come in one collective; of adapters each alone, because their units hold the frozen base too."""
    for unit, names in _units(model, align):
        if unit is not None:
            unit.unshard()
        named = dict(model.named_parameters())
        yield from (Part(name, _full(named[name]), name == names[-1]) for name in names)
        if unit is not None:
            unit.reshard()


def _units(model: Decoder, align: Align) -> list[tuple[FSDPModule | None, list[str]]]:
    """What is gathered together, with the names of its parameters; a model that is not sharded is one unit."""
    left = [name for name, _ in model.named_parameters()]
    if align.sync == "adapters":
        return [(None, [name for name in left if name.endswith(ADAPTER)])]
    told = list[tuple[FSDPModule | None, list[str]]]()
    for prefix, unit in reversed([(name, unit) for name, unit in model.named_modules() if isinstance(unit, FSDPModule)]):
        names = [name for name in left if name.startswith(prefix)]  # the innermost first
        left = [name for name in left if not name.startswith(prefix)]
        told += [(unit, names)] if names else []
    return told or [(None, left)]


def _full(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@dataclass
class Sync:
    """Weights from the trainers' model to generators: over a bridge, or into the generator of this very rank.

    `lead` is the trainer that sends; the others help to gather. `bucket` is in bytes.
    """

    align: Align
    dtype: torch.dtype
    bridge: Bridge | None = None
    lead: bool = True

    def __post_init__(self) -> None:
        self.last = dict[str, Tensor]()  # what was sent, where only changes go

    # -- of the trainers

    def send(self, model: Decoder, into: Decoder | None = None) -> Moved:
        """From all trainers, into the generator of this rank where there is no bridge."""
        began, sent, sums = time.perf_counter(), self.bridge.sent if self.bridge else 0, dict[str, int]()
        held, full, size = dict(into.named_parameters()) if into is not None else {}, list[Tensor](), 0
        for name, tensor, ends in whole(model, self.align):
            tensor = tensor.to(self.dtype)
            sums[name] = bits_of(tensor)
            if into is not None:
                if bits_of(held[name].data.copy_(tensor)) != sums[name]:
                    raise Refused(
                        f"{name} is not in the generator what it is in the trainer: memory that changes by itself; leave this device out"
                    )
                sent -= tensor.numel() * tensor.element_size()
            elif self.bridge is not None and self.lead:
                full.append(tensor.clone())  # what was gathered goes when its unit does
                size += tensor.numel() * tensor.element_size()
                if self._goes(size, ends):
                    self._ship(name, full)
                    full, size = [], 0
        if full:
            self._ship("", full)
        moved = (self.bridge.sent if self.bridge else 0) - sent
        return Moved(moved, time.perf_counter() - began, checksum(sums))

    def _goes(self, size: int, ends: bool) -> bool:
        """Whether what has been gathered is sent now."""
        return {"full": size >= self.align.bucket, "sharded": ends}.get(self.align.sync, True)

    def _ship(self, name: str, tensors: list[Tensor]) -> None:
        assert self.bridge is not None
        if self.align.sync != "delta":
            self.bridge.broadcast(torch.cat([tensor.flatten() for tensor in tensors]) if len(tensors) > 1 else tensors[0].contiguous())
            return
        (tensor,), before = tensors, self.last.get(name)
        changed = None if before is None else (_bits(tensor) != _bits(before)).nonzero().squeeze(1)
        index = torch.int32 if tensor.numel() < 2**31 else torch.int64
        wide = changed is None or len(changed) * (index.itemsize + tensor.element_size()) >= tensor.numel() * tensor.element_size()
        self.bridge.broadcast(torch.tensor([WHOLE if wide or changed is None else len(changed)], device=tensor.device))
        if wide or changed is None:
            self.bridge.broadcast(tensor.contiguous())
        elif len(changed):
            self.bridge.broadcast(changed.to(index))
            self.bridge.broadcast(tensor.flatten()[changed])
        self.last[name] = tensor.clone()

    # -- of a generator

    def receive(self, model: Decoder, names: Sequence[str], ends: Collection[str]) -> Moved:
        """Into this generator's model, the parameters of these names; `ends` are those that end a unit."""
        assert self.bridge is not None
        began, before = time.perf_counter(), self.bridge.sent
        named, bucket, size = dict(model.named_parameters()), list[Tensor](), 0
        for name in names:
            held = named[name].data
            bucket.append(held)
            size += held.numel() * held.element_size()
            if self._goes(size, name in ends):
                self._unship(bucket)
                bucket, size = [], 0
        if bucket:
            self._unship(bucket)
        sums = {name: bits_of(named[name].data) for name in names}
        return Moved(self.bridge.sent - before, time.perf_counter() - began, checksum(sums))

    def _unship(self, tensors: list[Tensor]) -> None:
        assert self.bridge is not None
        if self.align.sync != "delta":
            flat = self.bridge.broadcast(torch.empty(sum(t.numel() for t in tensors), dtype=self.dtype, device=tensors[0].device))
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
            return
        (tensor,) = tensors
        count = int(self.bridge.broadcast(torch.zeros(1, dtype=torch.int64, device=tensor.device)))
        if count == WHOLE:
            tensor.copy_(self.bridge.broadcast(torch.empty_like(tensor)))
        elif count:
            index = torch.int32 if tensor.numel() < 2**31 else torch.int64
            where = self.bridge.broadcast(torch.empty(count, dtype=index, device=tensor.device))
            tensor.view(-1)[where.long()] = self.bridge.broadcast(torch.empty(count, dtype=tensor.dtype, device=tensor.device))


def bits_of(tensor: Tensor) -> int:
    """A number of a tensor's bits and of their places, modulo 2^64."""
    bits = _bits(tensor)
    told = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), PIECE):
        piece = bits[start : start + PIECE]
        told += (piece.long() * torch.arange(start + 1, start + len(piece) + 1, device=bits.device)).sum()
    return int(told)


def _bits(tensor: Tensor) -> Tensor:
    """As whole numbers: zeros of both signs are two."""
    return tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16).flatten()


def checksum(sums: dict[str, int]) -> int:
    """One number of all tensors, whatever the order in which they came."""
    told = 0
    for name in sorted(sums):
        told = (told * 1_000_003 + sums[name]) % 2**64
    return told
