"""Replicas that restart alone: each is a job of its own, and torchft joins those that are up in every step.

Every replica of mesh.dp_replicate runs the same command with its number in REPLICA_GROUP_ID and the address of one
`torchft_lighthouse` in TORCHFT_LIGHTHOUSE (torchft's own names). Those that are up share a step's samples, so that the batch and
the order of the data stay what the plan says; one that comes back is sent the state by another.
"""

import logging
import os
import socket
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.plan import Plan
from real import checkpoint
from real.cluster import rank
from real.model import Decoder
from real.optim import Optimizer, local


class Replicas:
    """One rank's link to the same rank of the other replicas."""

    def __init__(self, plan: Plan, number: int, parts: Sequence[Decoder], optimizer: Optimizer) -> None:
        os.environ.setdefault("RUST_LOG", "warn")  # torchft tells of every step
        logging.getLogger("torchft").setLevel(logging.CRITICAL)  # and of every fall of another with a traceback
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # of a state that was sent, which is only read
        from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL

        self.parts, self.optimizer = parts, optimizer
        if not any(True for _ in optimizer.state()):
            checkpoint.restore(parts, optimizer, 0, lambda _: None)  # another may ask for moments before the first step
        self.unit = plan.dp * plan.train.micro_batch  # sequences that a replica takes at once
        limit = timedelta(seconds=0.5 * plan.failures.timeout.mean)  # before whoever watches takes this rank for one that hangs
        self.group = (ProcessGroupNCCL if plan.gpu.kind == "cuda" else ProcessGroupGloo)(timeout=limit)
        host = os.environ["MASTER_ADDR"]
        self.manager = Manager(
            pg=self.group, load_state_dict=self._take, state_dict=self._give, min_replica_size=1, use_async_quorum=False,
            timeout=limit, quorum_timeout=timedelta(seconds=plan.failures.start_timeout), rank=rank(), world_size=plan.ranks,
            store_addr=socket.gethostname() if host == "localhost" else host, store_port=int(os.environ["MASTER_PORT"]),
            replica_id=f"replica_{number}",
        )  # fmt: skip

    def begin(self, step: int) -> tuple[int, bool]:
        """Who is up for the next step; returns the steps done, which are more than `step` where another replica has sent its state,
        and whether others are up than before."""
        self.manager.load_state_dict({"step": step, "batches_committed": step})
        before = (self.manager.participating_rank(), self.up)
        self.manager.start_quorum()
        return int(self.manager.current_step()), before != (self.manager.participating_rank(), self.up)

    @property
    def up(self) -> int:
        """Replicas that take part."""
        return int(self.manager.num_participants())

    @property
    def leads(self) -> bool:
        """Whether this replica saves and evaluates for all."""
        return self.manager.participating_rank() == 0

    def share(self, batch: int) -> range:
        """Which of a step's sequences are this replica's: whole micro-batches, dealt out evenly to those that are up."""
        mine, count, units = self.manager.participating_rank() or 0, self.up, batch // self.unit
        return range(mine * units // count * self.unit, (mine + 1) * units // count * self.unit)

    def agree(self, loss: Tensor) -> bool:
        """Sum gradients and loss over the replicas; whether all have them. Where not, the step is to be done again."""
        grads = [local(p.grad) for _, p in self.optimizer.named if p.grad is not None]
        flat = torch.cat([*(grad.reshape(-1).float() for grad in grads), loss.reshape(1).float()])
        self.manager.allreduce(flat, reduce_op=dist.ReduceOp.SUM).wait()
        if not self.manager.should_commit():
            return False
        loss.copy_(flat[-1])
        for grad, summed in zip(grads, flat[:-1].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
        return True

    def close(self) -> None:
        self.manager.shutdown(wait=False)

    def _give(self) -> dict[str, Tensor]:
        return {name: local(tensor).detach() for name, tensor in checkpoint.state(self.parts, self.optimizer).items()}

    def _take(self, sent: dict[str, Any]) -> None:
        def reading(wanted: dict[str, Tensor]) -> None:
            for name, tensor in wanted.items():
                local(tensor).copy_(sent[name])

        checkpoint.restore(self.parts, self.optimizer, int(self.manager.current_step()), reading)
