"""Pipeline stages: which layers each rank holds, and the schedule that runs micro-batches through them.

The schedules are torch's. A rank's time outside its own stages' work is booked as bubble: it waits for its neighbours,
or talks to them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.microbatch import TensorChunkSpec

from conf.arithmetic import stage_blocks
from conf.plan import Plan
from real.collectives import Line
from real.model import Decoder
from real.parallel import V_SHAPED
from real.timeline import Timeline

NAMES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble",
         "dualpipev": "DualPipeV"}  # fmt: skip


def stages_of(plan: Plan, pp_rank: int) -> list[int]:
    """The stages that a pipeline rank holds."""
    pp = plan.mesh.pp
    if plan.mesh.pipeline in V_SHAPED:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + turn * pp for turn in range(plan.mesh.vpp)]


def layers_of(plan: Plan, stage: int) -> range:
    """The blocks of a stage."""
    return stage_blocks(plan.model.layers, plan.mesh.pp * plan.mesh.vpp, stage)


class Stage(PipelineStage):
    """A stage that books its work as compute."""

    timeline: Timeline

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.during("compute"):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.during("compute"):
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.timeline.during("compute"):
            return super().backward_weight_one_chunk(*args, **kwargs)


class Pipeline:
    """The stages of one rank, and what runs them."""

    def __init__(self, parts: Sequence[Decoder], plan: Plan, line: Line, device: torch.device, timeline: Timeline,
                 loss: Callable[[Tensor, Tensor], Tensor]) -> None:  # fmt: skip
        self.plan, self.parts, self.line, self.device, self.timeline, self.loss = plan, list(parts), line, device, timeline, loss
        self.numbers = stages_of(plan, line.rank)
        self.count = plan.mesh.pp * plan.mesh.vpp
        self.holds_last = self.count - 1 in self.numbers
        self.schedules: dict[int, Any] = {}

    def _schedule(self, micro_batches: int) -> Any:
        """The schedule for so many micro-batches; warming up the batch size takes several."""
        if micro_batches not in self.schedules:
            made = [self._stage(part, number) for part, number in zip(self.parts, self.numbers, strict=True)]
            kind = torch_schedules.get_schedule_class(NAMES[self.plan.mesh.pipeline])
            single = issubclass(kind, torch_schedules.PipelineScheduleSingle)
            options = {"kwargs_chunk_spec": {"documents": TensorChunkSpec(0)}} if self.plan.train.document_mask else {}
            schedule = kind(made[0] if single else made, micro_batches, loss_fn=self.loss, scale_grads=False, **options)
            self.schedules[micro_batches] = schedule
        return self.schedules[micro_batches]

    def _stage(self, part: Decoder, number: int) -> Stage:
        tokens = torch.empty(self.plan.train.micro_batch, self.plan.train.seq_len // self.plan.mesh.cp, dtype=torch.int64, device="meta")
        inside = self._activation("meta", self.plan.train.micro_batch, tokens.shape[1]).requires_grad_()
        logits = inside.new_empty(*tokens.shape, self.plan.model.vocab // self.plan.mesh.tp, requires_grad=True)
        stage = Stage(part, number, self.count, self.device, input_args=tokens if number == 0 else inside,
                      output_args=logits if number == self.count - 1 else inside, group=self.line.group)  # fmt: skip
        stage.timeline = self.timeline
        return stage

    def _activation(self, device: Any, sequences: int, tokens: int) -> Tensor:
        """What travels between stages, [B, T, D], cut over tp."""
        dtype = torch.bfloat16 if self.plan.train.half else torch.float32
        return torch.empty(sequences, tokens // self.plan.mesh.tp, self.plan.model.hidden, dtype=dtype, device=device)

    def step(self, inputs: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Forward and backward of all micro-batches [M × B, T]; returns the summed loss, zero where there is no last stage."""
        schedule, losses = self._schedule(len(inputs) // self.plan.train.micro_batch), list[Tensor]()
        given = {"target": targets, "losses": losses} if self.holds_last else {}
        more = {} if documents is None else {"documents": documents}
        with self.timeline.during("bubble"):
            schedule.step(*([inputs] if 0 in self.numbers else []), **given, **more, return_outputs=False)  # which would keep all logits
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.device)

    def forward(self, inputs: Tensor, documents: Tensor | None = None) -> Tensor | None:
        """One micro-batch through all stages, one after the other; logits where the last one is, else None."""
        out = inputs
        for number in range(self.count):
            owner, after = self._owner(number), self._owner(number + 1)
            if owner == self.line.rank:
                part = self.parts[self.numbers.index(number)]
                with self.timeline.during("compute"):
                    out = part(out, documents)
                if number + 1 < self.count and after != owner:
                    dist.send(out.contiguous(), group=self.line.group, group_dst=after)
            elif number + 1 < self.count and after == self.line.rank:
                out = self._activation(self.device, *inputs.shape)
                dist.recv(out, group=self.line.group, group_src=owner)
        return out if self.holds_last else None

    def _owner(self, number: int) -> int:
        return next((r for r in range(self.line.size) if number in stages_of(self.plan, r)), -1)


def share_tied(parts: Sequence[Decoder], plan: Plan, line: Line | None) -> None:
    """Sum the gradients of a tied embedding that first and last stage hold a copy of each."""
    if line is None or not plan.model.tied:
        return
    first = next((p.embed_tokens.weight for p in parts if p.embed_tokens is not None), None)
    last = next((p.lm_head.weight for p in parts if p.lm_head is not None), None)
    mine = [_local(p.grad) for p in (first, last) if p is not None and p.grad is not None]
    if len(mine) == 2:
        mine[0] += mine[1]
        mine[1].copy_(mine[0])
    elif mine:
        other = line.size - 1 if first is not None else 0
        theirs = torch.empty_like(mine[0])
        swap = [dist.P2POp(dist.isend, mine[0].contiguous(), group=line.group, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=line.group, group_peer=other)]  # fmt: skip
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        mine[0] += theirs


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]
