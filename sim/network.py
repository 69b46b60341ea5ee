"""Time of a collective: a ring of n ranks passes n − 1 times a share of the bytes over the slowest link it crosses.

seconds = (n − 1) latency + bytes (n − 1)/n / bandwidth       all-reduce: twice that (Thakur et al. 2005)
"""

from collections.abc import Sequence

import numpy as np

from conf.plan import Plan
from sim.kernels import COLLECTIVES, Array, Device

AXES = ("tp", "cp", "dp_shard", "dp_replicate", "pp")  # innermost first: neighbours in an axis before this one are close


class Network:
    """Links of many plans as arrays."""

    def __init__(self, plans: Sequence[Plan], device: Device) -> None:
        self.device = device
        self.degree = {axis: np.array([float(p.axes[axis]) for p in plans]) for axis in AXES}
        self.per_node = np.array([float(p.cluster.gpus_per_node) for p in plans])
        self.nic = np.array([p.cluster.nic_bandwidth / 8 for p in plans])
        self.nic_latency = np.array([p.cluster.nic_latency for p in plans])

    def reach(self, axis: str) -> Array:
        """Ranks from the first to the last of a group of this axis, those between included."""
        span = np.ones_like(self.per_node)
        for name in AXES[: AXES.index(axis) + 1]:
            span = span * self.degree[name]
        return span

    def collective(self, kind: str, axis: str, size: Array) -> Array:
        """Seconds of a collective over an axis; `size` is the whole tensor's bytes."""
        assert kind in COLLECTIVES, kind
        n = self.degree[axis]
        crosses = self.reach(axis) > self.per_node
        bandwidth = np.where(crosses, self.nic, self.device[f"link.{kind}"])
        latency = np.where(crosses, self.nic_latency, self.device[f"latency.{kind}"])
        times = 2.0 if kind == "all_reduce" else 1.0
        return np.where(n > 1, times * ((n - 1) * latency + size * (n - 1) / n / bandwidth), 0.0)

    def send(self, axis: str, size: Array) -> Array:
        """Seconds of one message to the neighbour in an axis."""
        crosses = self.reach(axis) > self.per_node
        bandwidth = np.where(crosses, self.nic, self.device["link.all_gather"])
        latency = np.where(crosses, self.nic_latency, self.device["latency.all_gather"])
        return np.where(self.degree[axis] > 1, latency + size / bandwidth, 0.0)
