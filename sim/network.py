"""Time of a collective: a ring of n ranks passes n − 1 times a share of the bytes over the slowest link it crosses.

seconds = start + hops latency + bytes (n − 1)/n / bandwidth       all-reduce: twice the last two (Thakur et al. 2005)

Links are a tree: devices in a domain (NVLink), domains in a pod of the fabric, pods over an oversubscribed spine. Ranks
are placed in order, so a group's neighbours are `stride` ranks apart, and as many groups of that kind leave a domain of g
devices side by side as there are ranks within a stride, at most g. They share the g NICs (NCCL runs one ring a NIC):

bandwidth of a group out of a domain = NIC × g / min(stride, g)
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from conf.plan import Plan
from sim.kernels import COLLECTIVES, Array, Device

AXES = ("tp", "cp", "dp_shard", "dp_replicate", "pp")  # innermost first: neighbours in an axis before this one are close


class Network:
    """Links of many plans as arrays."""

    def __init__(self, plans: Sequence[Plan], device: Device) -> None:
        self.device = device
        self.degree = {axis: np.array([float(p.axes[axis]) for p in plans]) for axis in AXES}
        self.domain = np.array([float(p.cluster.domain_ranks) for p in plans])
        self.pod = np.array([float(p.cluster.pod_ranks) for p in plans])
        self.oversubscription = np.array([p.cluster.oversubscription for p in plans])
        self.nic = device["nic"] * np.array([p.cluster.nic_bandwidth / 8 for p in plans])
        self.nic_latency = np.array([p.cluster.nic_latency for p in plans])
        self.node_limit = np.array([float(p.model.moe.node_limit or np.inf) for p in plans])

    def on(self, p: Any) -> "Network":
        """The same links under other meshes, whose degrees are given as arrays that broadcast."""
        other = copy(self)
        other.degree = {axis: getattr(p, axis) for axis in AXES}
        return other

    def stride(self, axis: str) -> Array:
        """Ranks from one member of a group of this axis to the next."""
        span = np.ones_like(self.domain)
        for name in AXES[: AXES.index(axis)]:
            span = span * self.degree[name]
        return span

    def bandwidth(self, kind: str, stride: Array, reach: Array) -> Array:
        """Bytes a second of one group whose members lie `stride` apart and that spans `reach` ranks."""
        inside = self.device[f"link.{kind}"]
        out = np.minimum(inside, self.nic * self.domain / np.minimum(stride, self.domain))
        far = self.nic * self.pod / self.oversubscription / np.minimum(stride, self.pod)
        return np.where(reach <= self.domain, inside, np.where(reach <= self.pod, out, np.minimum(out, far)))

    def latency(self, kind: str, reach: Array) -> Array:
        return np.where(reach > self.domain, self.nic_latency, self.device[f"latency.{kind}"])

    def ring(self, kind: str, n: Array, stride: Array, size: Any) -> Array:
        """Seconds of a collective of n ranks; `size` is the whole tensor's bytes. Large groups use trees: 2 log2 n hops."""
        assert kind in COLLECTIVES, kind
        if np.max(n) <= 1:
            return np.zeros(1)
        hops = np.minimum(n - 1, 2 * np.ceil(np.log2(np.maximum(n, 1))))
        times = 2.0 if kind == "all_reduce" else 1.0
        spent = hops * self.latency(kind, n * stride) + size * (n - 1) / np.maximum(n, 1) / self.bandwidth(kind, stride, n * stride)
        return np.where(n > 1, self.device["start"] + times * spent, 0.0)

    def collective(self, kind: str, axis: str, size: Any) -> Array:
        """Seconds of a collective over an axis."""
        return self.ring(kind, self.degree[axis], self.stride(axis), size)

    def send(self, axis: str, size: Array) -> Array:
        """Seconds of one message to the neighbour in an axis, over the slowest link on the way from its first to its last rank."""
        stride = self.stride(axis)
        reach = stride * self.degree[axis]
        spent = self.latency("all_gather", reach) + size / self.bandwidth("all_gather", stride, reach)
        return np.where(self.degree[axis] > 1, spent, 0.0)

    def all_to_all(self, n: Array, copies: Any, size: Any, stride: Any = 1.0, once: Any = False) -> Array:
        """Seconds in which every one of n ranks, `stride` apart, sends its tokens, `size` bytes, to `copies` of the others' experts.

        A copy goes to every expert, or, `once`, one to every rank and over the fabric one to every server that holds any of them, of
        which a node-limited router allows only some: of d of them k random choices meet d (1 − (1 − 1 / d)^k) (DeepSeek-V3, arXiv
        2412.19437, section 3.2.2).
        """
        inside = np.minimum(n, np.maximum(1.0, self.domain / stride))
        domains = np.maximum(1.0, n / inside)
        reached = np.minimum(domains, self.node_limit)
        servers = np.where(once, _met(reached, copies), copies)
        ranks = np.where(once, servers * _met(inside, copies / np.maximum(servers, 1)), copies)
        near = ranks * (1 - 1 / inside) * size / self.device["link.all_to_all"]
        far = servers * (1 - 1 / domains) * size / self.nic
        return np.where(n > 1, self.latency("all_to_all", n * stride) + np.maximum(near, far), 0.0)


def _met(places: Array, choices: Any) -> Array:
    """How many of some places are met by random choices."""
    return np.asarray(places * (1 - (1 - 1 / places) ** choices))
