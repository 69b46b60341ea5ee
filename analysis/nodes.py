"""Measured power of servers predicted: the benchmark that a row names becomes a plan, whose phases the meter turns into watts.

A benchmark's rules say more than a row does: MLPerf's fine-tuning trains adapters of Llama 2 70B on packed sequences of 8,192
tokens, in batches of 8 or of as many as a server each has (see mlperf.py); its pre-training is GPT-3 on 2,048 tokens. What a row does
not say of the mesh follows from memory: frozen weights take half of it at most.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis import mlperf
from analysis.replay import arrays
from analysis.rows import Replayed, Unplayable, each, part_of, tabled
from conf.arithmetic import parameters
from conf.plan import Plan
from conf.program import load
from conf.schema import choices
from sim.parallel import predict
from sim.power import Meter

MEASURED = "mean_node_W(middle 80% of run)"
NODES = ("system", "workload", "nodes", MEASURED)
# Systems without fans; Sustainable Metal Cloud (smc) immerses its servers.
WET = re.compile(r"immersion|immersed|liquid|water|\bsmc\b|LCC|DLC|SR780a", re.IGNORECASE)
# Option of gpu, and of power for its servers with fans and without.
POWER = {"h100_sxm": ("hgx", "hgx_liquid"), "h200_sxm": ("hgx", "hgx_liquid"), "h800": ("hgx", "hgx_liquid"),
         "b200": ("dgx_b200", "b200_liquid"), "b300": ("dgx_b200", "b200_liquid"), "gb200": ("gb200", "gb200"), "gb300": ("gb200", "gb200"),
         "v100_sxm": ("dgx_v100", "dgx_v100"), "a100_40": ("dgx_a100", "dgx_a100"), "a100_80": ("dgx_a100", "dgx_a100")}  # fmt: skip
RECTIFIER = 0.975  # of an open rack's power shelf (ORv3); a meter behind it, on the DC side, does not see its loss
SPREAD = 0.06  # standard deviation of log(predicted / measured) on MLPerf's eight


def nodes_of(frame: pd.DataFrame) -> Replayed:
    """Mean watts of a server of every row."""
    found, failed = each(frame, node)
    values = list(found.values())
    watts, plans = [v[0] for v in values], [v[1] for v in values]
    limits = [plan.cluster.gpus_per_node * plan.gpu.max_power for plan in plans]
    kinds = [str(frame["workload"][index]).split()[0] for index in found]
    return Replayed(tabled(list(found), watts, [SPREAD] * len(plans), limits, [plan.gpu.name for plan in plans], kinds), failed)


def node(row: Mapping[str, Any]) -> tuple[float, Plan]:
    """Watts of a server, and the plan that draws them."""
    plan, adapters = plan_of(row)
    p, network = arrays([plan], np.array([adapters]))
    told = predict(p, network.device, network)
    seconds = {name: float(getattr(told, name)[0]) for name in ("compute", "communication", "bubble", "optimizer")}
    meter = Meter(plan, {}, *(float(part[0] / told.compute[0]) for part in (told.arithmetic, told.stalled)))
    if adapters:
        seconds = mlperf.spent(plan.train.global_batch, seconds, float(told.evaluate[0]))
    return server(meter, seconds) * seen(f"{row['system']} {row.get('submitter', '')}"), plan


def server(meter: Meter, seconds: Mapping[str, float]) -> float:
    """Mean watts of a server over so many seconds in each state."""
    return sum(meter.table[state] * spent for state, spent in seconds.items()) / sum(seconds.values()) / meter.plan.cluster.nodes


def seen(said: str) -> float:
    """Share of a server's power that its meter sees."""
    return RECTIFIER if re.search(r"\bDC\b", said, re.IGNORECASE) else 1.0


def servers(gpu: str, said: str) -> list[str]:
    """Words for the servers that hold this gpu, metered one by one.

    Raises Unplayable where none are known.
    """
    if gpu not in POWER:
        raise Unplayable(f"conf/power has no servers of {gpu}")
    return [f"power={POWER[gpu][WET.search(said) is not None]}", "power.pue=1", "power.network=0 W"]


def plan_of(row: Mapping[str, Any]) -> tuple[Plan, bool]:
    """The plan of a row, and whether it trains adapters.

    Raises Unplayable with what it does not say.
    """
    said, system = str(row["workload"]), str(row["system"])
    gpu, cluster = part_of({"gpu": system})
    held = servers(gpu, f"{system} {row.get('submitter', '')}")
    model, adapters = _model(said), "lora" in said.lower()
    size = re.search(r"(\d+) ?x ?(\d+)", system)
    if size is None:
        raise Unplayable(f"system={system} does not say how many devices a server has; write for example 8x8 H100")
    nodes, per_node = int(float(row["nodes"])), int(size[2])
    ranks = nodes * per_node
    words = [f"gpu={gpu}", f"cluster={cluster}", f"model={model}", *held, "train=large"]
    plan = load([*words, "data.path=null", "data.tokens=1", "tokenizer.vocab=1", "train.compile=true"])
    given = {axis: int(found[1]) for axis in ("tp", "pp", "cp") if (found := re.search(rf"\b{axis}(\d+)", said, re.IGNORECASE))}
    batch, length = (max(8, ranks // 8), 8192) if adapters else (1536, 2048)
    tp, pp, cp = _mesh(plan, given, ranks, per_node, batch, adapters)
    dp = ranks // (tp * pp * cp)
    if dp < 1 or dp * tp * pp * cp != ranks:
        raise Unplayable(f"workload={said}: tp {tp} × pp {pp} × cp {cp} does not divide {ranks} devices")
    precision = next((name for name in ("fp8", "bf16", "fp16") if name in said.lower()), "fp8" if plan.gpu.fp8_peak else "bf16")
    stages = plan.model.layers // pp
    return plan.but(
        cluster=plan.cluster.but(nodes=nodes, gpus_per_node=per_node, spares=0),
        model=plan.model.but(context=max(plan.model.context or 0, length) if plan.model.context else None),
        mesh=plan.mesh.but(dp_replicate=1, dp_shard=dp, tp=tp, pp=pp, cp=cp, zero=1, vpp=stages // 2 if pp > 1 and stages % 2 == 0 else 1),
        train=plan.train.but(precision=precision, seq_len=length, global_batch=-(-batch // dp) * dp, micro_batch=1,
                             fused_gradients=True, evaluate_sequences=mlperf.HELD_OUT if adapters else 0),
    ), adapters  # fmt: skip


def _mesh(plan: Plan, given: Mapping[str, int], ranks: int, per_node: int, batch: int, adapters: bool) -> tuple[int, int, int]:
    """Degrees of tp, pp and cp: those given, and else the least over which weights and gradients take half of the memory."""
    half, count = 0.5 * plan.gpu.memory, float(parameters(plan.model))
    tp = given.get("tp") or (next((t for t in (1, 2, 4) if 2 * count / t <= half), per_node) if adapters else min(4, per_node))
    pp = given.get("pp") or (1 if adapters else next((s for s in (1, 2, 4, 8) if 6 * count / (tp * s) <= half), 16))
    return tp, pp, given.get("cp") or max(1, ranks // (batch * tp * pp))


def _model(said: str) -> str:
    """The model in conf whose name begins the workload, whatever the punctuation."""
    plain = re.sub(r"[^a-z0-9]", "", said.lower())
    names = {re.sub(r"[^a-z0-9]", "", name): name for name in choices("model")}
    found = max((name for name in names if plain.startswith(name)), key=len, default=None)
    if found is None:
        raise Unplayable(f"workload={said}: no model of conf/model has this name")
    return names[found]
