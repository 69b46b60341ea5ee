"""Time of a collective: the best of the algorithms that a library has for it, each in closed form.

A letter to n readers: handed on in a circle, read down a telephone tree, or pinned to a board that all can see.

    ring     start + (n − 1) latency + S (n − 1)/n / bandwidth         all-reduce: twice the last two (Thakur et al. 2005)
    tree     start + 2 log2 n latency + 2 S / bandwidth                two trees, each with half of the bytes (Sanders et al. 2009)
    switch   start + 2 latency + S / (share of the link)               all-reduce in NVLink switches (NVLS; Klenk et al. 2020)
    layered  start + 2 (g − 1) latency + 2 log2 k nic_latency
             + max(2 S (g − 1)/g / link, 2 S (k − 1)/k / way out)      all-reduce of k domains of g ranks, in pieces

S are the bytes of the whole tensor; all but the all-reduce go around. Only (k − 1)/k of the bytes leave a domain, where a ring
that knows nothing of domains sends (n − 1)/n. An all-reduce takes the least of the four. All-reduces alone were compared
with published measurements (LOG.md, 2026-11-25); other kinds are the same formulas, not validated.

Links are a tree: devices in a domain (NVLink), domains in a pod of the fabric, pods over an oversubscribed spine. Where no
switch joins a domain, a group closes as many rings as the cluster's table says. Ranks are placed in order, so a group's
neighbours are `stride` ranks apart, and as many groups of that kind leave a domain of g devices side by side as there are
ranks within a stride, at most g. They share the g NICs (NCCL runs one ring a NIC):

bandwidth of a group out of a domain = NIC × g / min(stride, g)
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from conf.plan import Plan
from sim.kernels import COLLECTIVES, Array, Device

AXES = ("tp", "cp", "dp_shard", "dp_replicate", "pp")  # innermost first: neighbours in an axis before this one are close
VALIDATED = ("all_reduce",)  # kinds that were compared with measurements


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
        self.rings = _rings(plans)

    def on(self, p: Any) -> "Network":
        """The same links under other meshes, whose degrees are given as arrays that broadcast."""
        other = copy(self)
        other.degree = {axis: getattr(p, axis) for axis in AXES}
        return other

    def under(self, device: Device) -> "Network":
        """The same links at other rates."""
        other = copy(self)
        other.nic, other.device = self.nic / self.device["nic"] * device["nic"], device
        return other

    def stride(self, axis: str) -> Array:
        """Ranks from one member of a group of this axis to the next."""
        span = np.ones_like(self.domain)
        for name in AXES[: AXES.index(axis)]:
            span = span * self.degree[name]
        return span

    def bandwidth(self, kind: str, stride: Array, reach: Array) -> Array:
        """Bytes a second of one group whose members lie `stride` apart and that spans `reach` ranks."""
        inside = self.inside(kind, reach / stride) if self.rings else self.device[f"link.{kind}"]
        return np.where(reach <= self.domain, inside, np.minimum(inside, self.outside(stride, reach)))

    def inside(self, kind: str, n: Array) -> Array:
        """Bytes a second of a group of n in a domain: the link's, or that of the rings which n devices close."""
        share: Any = 1.0
        for count, each in self.rings.items():
            share = np.where(n == count, each, share)
        return np.asarray(self.device[f"link.{kind}"] * share)

    def outside(self, stride: Array, reach: Array) -> Array:
        """Bytes a second of a group on its way out of a domain, and of a pod where it reaches further."""
        out = self.nic * self.domain / np.minimum(stride, self.domain)
        far = self.nic * self.pod / self.oversubscription / np.minimum(stride, self.pod)
        return np.asarray(np.where(reach <= self.pod, out, np.minimum(out, far)))

    def latency(self, kind: str, reach: Array) -> Array:
        return np.where(reach > self.domain, self.nic_latency, self.device[f"latency.{kind}"])

    def ring(self, kind: str, n: Array, stride: Array, size: Any) -> Array:
        """Seconds of a collective of n ranks; `size` is the whole tensor's bytes. The best algorithm there is."""
        assert kind in COLLECTIVES, kind
        if np.max(n) <= 1:
            return np.zeros(1)
        best = self.around(kind, n, stride, size)
        chosen = np.isfinite(self.device["units"])  # measured rates of a machine are those of its rings
        if kind == "all_reduce" and chosen.any():
            others, within = self.tree(n, stride, size), n * stride <= self.domain
            if within.any():
                others = np.minimum(others, self.switch(n, stride, size))
            if not within.all():
                others = np.minimum(others, self.layered(n, stride, size))
            best = np.where(chosen, np.minimum(best, others), best)
        return np.where(n > 1, best, 0.0)

    def around(self, kind: str, n: Array, stride: Array, size: Any) -> Array:
        """Seconds around a ring; large groups pass the first piece down a tree, in 2 log2 n hops."""
        reach, times = n * stride, 2.0 if kind == "all_reduce" else 1.0
        hops = np.minimum(n - 1, _tree_hops(n))
        spent = hops * self.latency(kind, reach) + size * (n - 1) / np.maximum(n, 1) / self.bandwidth(kind, stride, reach)
        return np.asarray(self.device["start"] + times * spent)

    def tree(self, n: Array, stride: Array, size: Any) -> Array:
        """Seconds of an all-reduce up and down two trees."""
        reach = n * stride
        spent = _tree_hops(n) * self.latency("all_reduce", reach) + 2 * size / self.bandwidth("all_reduce", stride, reach)
        return np.asarray(self.device["start"] + spent)

    def switch(self, n: Array, stride: Array, size: Any) -> Array:
        """Seconds of an all-reduce that a domain's switches add up; infinite beyond the domain, and where switches cannot."""
        able = (n * stride <= self.domain) & (self.device["nvls"] > 0)
        spent = 2 * self.device["latency.all_reduce"] + size / np.maximum(self.device["nvls"], 1.0)
        return np.where(able, self.device["start"] + spent, np.inf)

    def layered(self, n: Array, stride: Array, size: Any) -> Array:
        """Seconds of an all-reduce first in every domain and then among them, piece by piece; infinite within one domain."""
        near = np.clip(self.domain / stride, 1.0, n)
        far = n / near
        within = 2 * size * (near - 1) / near / self.inside("all_reduce", near)
        among = 2 * size * (far - 1) / np.maximum(far, 1) / self.outside(stride, n * stride)
        hops = 2 * (near - 1) * self.device["latency.all_reduce"] + _tree_hops(far) * self.nic_latency
        return np.where(n * stride > self.domain, self.device["start"] + hops + np.maximum(within, among), np.inf)

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


def _tree_hops(n: Array) -> Array:
    """Up a binary tree of n and down again."""
    return np.asarray(2 * np.ceil(np.log2(np.maximum(n, 1))))


def _rings(plans: Sequence[Plan]) -> dict[int, Array]:
    """Share of the link's bandwidth that groups of 2, 3, … devices get where no switch joins them; empty where all have switches."""
    tables = [p.cluster.rings or [] for p in plans]
    counts = range(2, 2 + max((len(table) for table in tables), default=0))
    return {n: np.array([table[n - 2] / max(table) if n - 2 < len(table) else 1.0 for table in tables]) for n in counts}
