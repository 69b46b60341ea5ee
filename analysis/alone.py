"""Operations and collectives that were measured one by one, as rows of tables, and their predictions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.rows import Replayed, Unplayable, base_of, count, device_of, each, part_of, tabled
from conf.plan import Plan
from sim.kernels import Array, Device, Product, Work, attention, beyond
from sim.network import VALIDATED, Network

KERNELS = ("gpu", "op", "peak_tflops", "m", "n", "k", "seq", "heads", "qk_head_dim", "v_head_dim", "efficiency")
COLLECTIVES = ("op", "gpu", "ranks", "nodes", "bytes", "time_us")
COLLECTIVE = ("all_reduce", "all_gather", "reduce_scatter")
MOMENT = 100e-6  # s: a hundred products of 100 µs in a row are half over when a power limit acts (SimuMax calls each a hundred times)
HIDDEN = 0.4  # of a product's traffic, where the next call writes to the same place: A100 and B200 alike; fits of steps see all hidden
CALLS = {"attention": 3.0, "expert": 1 / 3}  # host's time of a call from Python, and of an expert in a loop of C++, in launches of a kernel


class Kernel(NamedTuple):
    """An operation of a table: the FLOPs that its row counts, what it asks of the device, and the host's launches that it costs."""

    flops: float
    work: Work
    calls: float
    sizes: dict[str, set[int]]


def kernel_plan(row: Mapping[str, Any]) -> Plan:
    """A plan on the row's device."""
    return base_of(*part_of(row)).but(**{"train.precision": "bf16", "train.compile": True})


def kernels_of(frame: pd.DataFrame) -> Replayed:
    """Fraction of the peak of every row's matrix products or attention; attention counts the full square of scores."""
    found, failed = each(frame, lambda row: (kernel_plan(row), kernel(row), float(row["peak_tflops"]) * 1e12, str(row["op"])))
    if not found:
        return Replayed(tabled([], [], [], [], [], []), failed)
    plans, kernels, peaks, ops = (list(column) for column in zip(*found.values(), strict=True))
    efficiency = np.array([kernel.flops for kernel in kernels]) / alone(device_of(plans), kernels) / np.array(peaks)
    spread, names = [plan.gpu.error for plan in plans], [plan.gpu.name for plan in plans]
    out = ["; ".join(beyond(plan, kernel.sizes)) for plan, kernel in zip(plans, kernels, strict=True)]
    return Replayed(tabled(list(found), efficiency, spread, 1.0, names, ops).assign(outside=out), failed)


def kernel(row: Mapping[str, Any]) -> Kernel:
    """The operation of a row, as the benchmark of SimuMax called it: again and again from Python, by the host's clock.

    Attention pads values to the width of queries. Of m tokens of an expert the gradient of the input is as deep as the output
    is wide, that of the weight as deep as the tokens are many; it is added in bf16 or fp32, which the table does not tell.
    """
    op = str(row["op"])
    if op.startswith("sdp"):
        stage = {"sdp_fwd": "forward", "sdp_bwd": "backward"}.get(op)
        if stage is None:
            raise Unplayable(f"op={op} is not sdp_fwd or sdp_bwd")
        heads, seq, queries, values = (count(row, name) for name in ("heads", "seq", "qk_head_dim", "v_head_dim"))
        wide, tokens = max(queries, values), seq * count(row, "batch", 1)
        work = attention(tokens, seq, heads * wide, 2, stage, wide)
        sizes = {"seq": {seq}, "head": {queries, values}}
        return Kernel(2 * work.flops * (queries + values) / (2 * wide), work, CALLS["attention"], sizes)
    if op not in ("matmul", "group_matmul"):
        raise Unplayable(f"op={op} is not matmul, group_matmul, sdp_fwd or sdp_bwd")
    grouped, stage = op == "group_matmul", str(row.get("stage"))
    number = count(row, "groups") if grouped else count(row, "batch", 1)
    m, n, k = count(row, "m"), count(row, "n"), count(row, "k")
    adds = str(row.get("accumulate", "")).lower() == "true"
    written = 4 if str(row.get("out_dtype", "")) == "fp32" else 3 if adds and grouped else 2
    if grouped and stage == "bwd_grad_act":
        n, k = k, n
    if grouped and stage == "bwd_grad_w":
        m, n, k = n, k, m
    flops, size = 2.0 * m * n * k * number, (2 * (m * k + n * k) + written * m * n * (1 + adds)) * number
    sizes = {"expert": {count(row, "m")}} if grouped else {"m": {m}, "n": {n}, "k": {k}}
    return Kernel(flops, Work("matmul.forward", flops, size, 1, (Product(m, n, k, number),)), CALLS["expert"] * number * grouped, sizes)


def alone(device: Device, kernels: list[Kernel]) -> Array:
    """Seconds of operations that are measured one by one: those of a moment faster than in a training, none than its calls."""
    seconds = np.empty(len(kernels))
    for kind in {kernel.work.kind for kernel in kernels}:
        index = np.array([place for place, kernel in enumerate(kernels) if kernel.work.kind == kind])
        mine, works = device.take(index), [kernels[place].work for place in index]

        def each(name: str, things: list[Any]) -> Array:
            return np.array([float(getattr(thing, name)) for thing in things])

        flops, size, launches = (each(name, works) for name in ("flops", "bytes", "launches"))
        if works[0].products:
            products = [work.products[0] for work in works]
            m, n, k, matrices = (each(name, products) for name in ("m", "n", "k", "matrices"))
            product = Product(m, n, k, matrices)
            mine.numbers |= {"overlap": np.full(len(index), HIDDEN), "grouped": mine["grouped_alone"]}
            took = mine.seconds(Work(kind, flops, size, launches, (product,)))
            seconds[index] = took / (1 + mine["burst"] / (1 + took / MOMENT))
        else:
            seconds[index] = mine.seconds(Work(kind, flops, size, launches, chain=each("chain", works), head=each("head", works)))
    return np.maximum(seconds / device["alone"], np.array([kernel.calls for kernel in kernels]) * device["host"])


def collectives_of(frame: pd.DataFrame) -> Replayed:
    """Microseconds of every row's collective."""
    found, failed = each(frame, collective)
    if not found:
        return Replayed(tabled([], [], [], [], [], []), failed)
    plans, kinds, sizes = (list(column) for column in zip(*found.values(), strict=True))
    seconds = together(Network(plans, device_of(plans)), kinds, np.array(sizes))
    classes = [f"{plan.gpu.name} {plan.cluster.nodes}" for plan in plans]
    told = [kind if kind in VALIDATED else f"{kind} (not validated)" for kind in kinds]
    return Replayed(tabled(list(found), seconds * 1e6, [plan.gpu.error for plan in plans], sizes, classes, told), failed)


def collective(row: Mapping[str, Any]) -> tuple[Plan, str, float]:
    """Whose collective a row is, its kind, and the bytes of the whole tensor."""
    op, ranks, nodes = str(row["op"]), count(row, "ranks"), count(row, "nodes")
    if op not in COLLECTIVE:
        raise Unplayable(f"op={op} is not {', '.join(COLLECTIVE[:-1])} or {COLLECTIVE[-1]}")
    if ranks % nodes:
        raise Unplayable(f"ranks={ranks} do not divide by nodes={nodes}")
    base = base_of(*part_of(row))
    return (
        base.but(cluster=base.cluster.but(nodes=nodes, gpus_per_node=ranks // nodes), mesh=base.mesh.but(dp_shard=ranks)),
        op,
        float(count(row, "bytes")),
    )


def together(network: Network, kinds: list[str], sizes: Array) -> Array:
    """Seconds of collectives over dp_shard, those of a kind together."""
    told = {kind: network.collective(kind, "dp_shard", sizes) for kind in set(kinds)}
    return np.array([told[kind][place] for place, kind in enumerate(kinds)])
