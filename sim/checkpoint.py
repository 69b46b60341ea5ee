"""Checkpoints: what a save costs, and where a fall ends.

A climber hammers in a piton every so often: each piton takes time, each fall costs the rope since the last one. A piton
half in does not hold.
"""

from conf.arithmetic import state_bytes
from conf.plan import Plan
from sim.kernels import Rates


class Checkpoints:
    """The newest step that is safe, and the cost of making one safe."""

    def __init__(self, plan: Plan, rates: Rates) -> None:
        self.every = plan.checkpoint.every
        self.bytes = float(state_bytes(plan.model))
        self.save_time = self.bytes / rates.storage_write
        if plan.checkpoint.asynchronous:  # training waits for the copy alone, which every rank makes of its share
            self.save_time = self.bytes / plan.ranks / plan.gpu.snapshot
        self.load_time = self.bytes / rates.storage_read
        self.step: int | None = None  # None: nothing was saved yet

    @property
    def safe(self) -> int:
        """The step at which a restart begins."""
        return self.step or 0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def next_due(step: int, every: int) -> float:
    """The first step after `step` at which something periodic is due.

    >>> next_due(160, 160), next_due(7, 0)
    (320, inf)
    """
    return (step // every + 1) * every if every else float("inf")
