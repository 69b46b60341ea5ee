"""Collectives in closed form: ring, tree, switch, and layers of which only a share leaves the domain; the rings of a DGX-1."""

import numpy as np
import pandas as pd
import pytest

from analysis.alone import collectives_of
from analysis.published import read
from conf.program import load
from sim.kernels import Device, rates
from sim.network import Network
from tests.conftest import SHARED

GIB = float(2**30)
TABLE = SHARED / "validation" / "collectives.csv"


def network(*words: str) -> tuple[Network, object]:
    plan = load(["train.precision=fp16", "train.global_batch=5120", "train.micro_batch=1", *words])
    return Network([plan], Device([rates(plan)])), plan


def link(plan) -> float:
    return plan.gpu.link_efficiency * plan.gpu.link_bandwidth / 8


def at(n: float) -> np.ndarray:
    return np.array([float(n)])


def test_a_ring_hands_every_share_around():
    net, plan = network("gpu=a100_80", "cluster=dgx_a100")
    gpu = plan.gpu
    gathered = gpu.link_start + 3 * gpu.link_latency + GIB * 3 / 4 / link(plan)
    assert net.around("all_gather", at(4), at(1), GIB)[0] == pytest.approx(gathered, rel=1e-12)
    summed = gpu.link_start + 2 * (3 * gpu.link_latency + GIB * 3 / 4 / link(plan))
    assert net.around("all_reduce", at(4), at(1), GIB)[0] == pytest.approx(summed, rel=1e-12)
    assert net.ring("all_reduce", at(4), at(1), GIB)[0] == pytest.approx(summed, rel=1e-12)  # the best for many bytes, without NVLS


def test_a_tree_is_two_log_n_deep():
    net, plan = network("gpu=a100_80", "cluster=dgx_a100")
    for n, hops in ((2, 2), (4, 4), (5, 6), (8, 6)):
        assert net.tree(at(n), at(1), 0.0)[0] == pytest.approx(plan.gpu.link_start + hops * plan.gpu.link_latency, rel=1e-12)
    assert net.tree(at(8), at(1), GIB)[0] - net.tree(at(8), at(1), 0.0)[0] == pytest.approx(2 * GIB / link(plan), rel=1e-12)
    assert net.ring("all_reduce", at(8), at(1), 4.0)[0] == net.tree(at(8), at(1), 4.0)[0] < net.around("all_reduce", at(8), at(1), 4.0)[0]


def test_switches_reduce_once():
    """NVLS: every device sends and receives the bytes once, in two hops; published for eight H100 as 480 GB/s of bus bandwidth."""
    net, plan = network("gpu=h100_sxm", "cluster=dgx_h100")
    seconds = net.ring("all_reduce", at(8), at(1), 16 * GIB)[0]
    assert seconds == net.switch(at(8), at(1), 16 * GIB)[0]
    assert seconds == pytest.approx(plan.gpu.link_start + 2 * plan.gpu.link_latency + 16 * GIB / (plan.gpu.nvls * 450e9), rel=1e-12)
    assert 2 * 7 / 8 * 16 * GIB / seconds == pytest.approx(480e9, rel=0.06)
    before, _ = network("gpu=a100_80", "cluster=dgx_a100")
    assert np.isinf(before.switch(at(8), at(1), GIB)[0]) and np.isinf(net.switch(at(16), at(1), GIB)[0])


def test_only_a_share_leaves_the_domain():
    """Of k servers (k − 1)/k of the bytes cross, twice, over all NICs of a server; a ring sends (n − 1)/n."""
    net, plan = network("gpu=a100_80", "cluster=dgx_a100", "cluster.nodes=4")
    nics = 8 * plan.gpu.nic_efficiency * plan.cluster.nic_bandwidth / 8
    base = net.layered(at(32), at(1), 0.0)[0]
    assert base == pytest.approx(plan.gpu.link_start + 14 * plan.gpu.link_latency + 4 * plan.cluster.nic_latency, rel=1e-12)
    assert net.layered(at(32), at(1), 16 * GIB)[0] - base == pytest.approx(2 * 16 * GIB * 3 / 4 / nics, rel=1e-12)
    around = net.around("all_reduce", at(32), at(1), 16 * GIB)[0]
    assert net.ring("all_reduce", at(32), at(1), 16 * GIB)[0] == net.layered(at(32), at(1), 16 * GIB)[0] < around
    one = net.layered(at(4), at(8), 16 * GIB)[0]  # one device a server, eight groups beside each other: nothing to add up inside
    assert one == pytest.approx(plan.gpu.link_start + 4 * plan.cluster.nic_latency + 2 * 16 * GIB * 3 / 4 / (nics / 8), rel=1e-12)


def test_a_cube_of_links_closes_as_many_rings_as_it_can():
    net, plan = network("gpu=v100_sxm", "cluster=dgx_v100")
    share = [net.inside("all_reduce", at(n))[0] / link(plan) for n in range(2, 9)]
    assert share == pytest.approx([1 / 6, 2 / 6, 4 / 6, 2 / 6, 2 / 6, 4 / 6, 1])
    switched, _ = network("gpu=v100_sxm", "cluster=dgx2_v100")
    assert switched.inside("all_reduce", at(2))[0] == link(plan)


def test_rings_are_the_cycles_of_a_dgx_1():
    """Twice the cycles without a common link through the first n devices, one ring for each direction; two devices have one link."""
    links = {(0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2, (2, 6): 1, (3, 7): 1, (4, 5): 1,
             (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2}  # fmt: skip

    def most(n: int, left: dict[tuple[int, int], int]) -> int:
        best = 0
        for path in walks([0], n, left):
            rest = dict(left)
            for a, b in zip(path, [*path[1:], 0], strict=True):
                rest[min(a, b), max(a, b)] -= 1
            best = max(best, 1 + most(n, rest))
            if best == min(sum(count for pair, count in left.items() if d in pair and max(pair) < n) // 2 for d in range(n)):
                return best
        return best

    def walks(path: list[int], n: int, left: dict[tuple[int, int], int]):
        if len(path) == n:
            if left.get((0, path[-1]), 0) > 0 and path[1] < path[-1]:
                yield path
            return
        for step in range(1, n):
            if step not in path and left.get((min(path[-1], step), max(path[-1], step)), 0) > 0:
                yield from walks([*path, step], n, left)

    found = {n: 2 * most(n, links) for n in (3, 4, 6, 7, 8)}
    rings = network("gpu=v100_sxm", "cluster=dgx_v100")[1].cluster.rings
    assert found == {n: rings[n - 2] for n in found}


def test_a_measured_machine_keeps_its_rings():
    net, _ = network("train.precision=fp32")
    assert net.ring("all_reduce", at(4), at(1), 4.0)[0] == net.around("all_reduce", at(4), at(1), 4.0)[0]


def test_collectives_that_nobody_measured_are_told(tmp_path, foretold):
    rows = [{"op": op, "gpu": "A100", "ranks": 8, "nodes": 1, "bytes": 1e9, "time_us": 7000.0} for op in ("all_reduce", "all_gather")]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    assert list(collectives_of(read(tmp_path / "t.csv")).rows["kind"]) == ["all_reduce", "all_gather (not validated)"]
    text = foretold("analysis", "published", f"table={tmp_path / 't.csv'}")[1]
    assert "all_gather (not validated)" in text and "validated: all_reduce" in text


@pytest.mark.skipif(not TABLE.exists(), reason="the tables of published measurements are not here")
def test_all_reduces_of_three_machines():
    """Asked: a median of 12%."""
    rows = collectives_of(read(TABLE)).rows
    error = (rows["predicted"] / pd.read_csv(TABLE)["time_us"] - 1).abs()
    assert len(rows) == 192 and error.median() < 0.12
