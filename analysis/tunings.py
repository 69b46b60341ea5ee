"""Published fine-tunings predicted from rows that say what was run in words: model, GPUs, method, length and batch.

What a row does not say follows from whose it is: MLPerf's submitters choose the quickest mesh that fits, on Megatron's kernels in fp8 where
the device has it; Qwen's scripts (transformers, DeepSpeed) and prime-rl (FSDP2) recompute everything; torchtune recomputes and compiles.
Power is that of the meter that tells pre-training's, over the run's steps and evaluations; energy is this power for the predicted time.
Training in bf16 throughout is not predicted, which no plan says. Steps of reinforcement learning are in rollouts.py.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from math import hypot
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import mlperf, nodes
from analysis.rollouts import Rolled, rolled
from analysis.rows import Replayed, Unplayable, each, part_of, tabled, word
from conf.arithmetic import flops_per_token, parameters
from conf.plan import Plan
from conf.program import load
from sim.memory import USABLE
from sim.pace import Pace, pace
from sim.power import Meter

TUNINGS = ("model sizes", "gpus", "placement", "algo", "seq lens", "batch", "metric", "value")
MODELS = (
    (r"llama-?2-70b", ["llama2_70b"]), (r"llama-?3\.1[-_]8b", ["llama3_8b"]), (r"llama-?3\.1[-_]70b", ["llama3_70b"]),
    (r"llama-?3\.2[-_]3b", ["llama3_2_3b"]), (r"qwen3-0\.6b", ["qwen3_0_6b"]), (r"qwen3-4b", ["qwen3_4b"]), (r"qwen3-8b", ["qwen3_8b"]),
    (r"qwen3-14b", ["qwen3_14b"]), (r"qwen3-32b", ["qwen3_32b"]), (r"qwen3-30b-?a3b", ["qwen3_30b_a3b"]),
    (r"qwen-7b", ["llama2_7b", "model.vocab=151936"]),
    (r"qwen-14b", ["llama2_13b", "model.ffn=13696", "model.vocab=152064"]),
    (r"qwen-72b", ["llama2_70b", "model.kv_heads=64", "model.ffn=24576", "model.vocab=152064"]),
)  # fmt: skip
ATTENTION, GATES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj")
GENERATION = 0.15  # standard deviation that rollouts add to the logarithm of a step's error
GIB, GB, KWH = 2**30, 1e9, 3.6e6


class Maker(NamedTuple):
    """What the software behind a source does that its rows do not say."""

    words: tuple[str, ...]  # of the plan
    targets: tuple[str, ...]
    rank: int
    meshes: bool = False  # whether its users choose the mesh
    whole: bool = False  # whether the base of adapters is whole on every device where it fits, as with ZeRO-2
    pure: bool = False  # whether full training keeps everything in bf16


MAKERS = (
    ("mlcommons", Maker(("mesh.zero=1", "train.compile=true", "train.recompute=none"), ATTENTION, 16, meshes=True)),
    ("QwenLM", Maker(("mesh.zero=3", "train.recompute=full"), (*ATTENTION, *GATES), 64, whole=True)),  # README, "Multi-node Fine-tuning"
    ("torchtune", Maker(("mesh.zero=3", "train.recompute=full", "train.compile=true"), (*ATTENTION, *GATES, "down_proj"), 8, pure=True)),
    ("prime-rl", Maker(("mesh.zero=3", "train.recompute=full"), (*ATTENTION, *GATES, "down_proj"), 16)),
)  # fmt: skip


class Tuned(NamedTuple):
    """A row's plan with its step."""

    plan: Plan
    step: Pace
    seen: float = 1.0  # share of a server's power that the row's meter sees

    @property
    def samples_per_s(self) -> float:
        return self.plan.train.global_batch / self.step.step_time

    @property
    def ideal(self) -> float:
        """Seconds of a step at the device's peak."""
        plan = self.plan
        flops = plan.tokens_per_step * float(flops_per_token(plan.model, plan.train.seq_len))
        return flops / (plan.ranks * (plan.gpu.peak("bf16") or np.nan))

    @property
    def spent(self) -> dict[str, float]:
        """Seconds in each state until MLPerf's target."""
        mix, long = self.step.mix, self.step.step_time
        return mlperf.spent(self.plan.train.global_batch, {state: share * long for state, share in mix.items()}, self.step.evaluate)

    @property
    def seconds(self) -> float:
        return sum(self.spent.values())

    @property
    def ideal_seconds(self) -> float:
        """Until the same at the device's peak, without evaluations."""
        batch = self.plan.train.global_batch
        return mlperf.samples(batch) / batch * self.ideal

    @property
    def watts(self) -> float:
        """Mean of a server meanwhile."""
        meter = Meter(self.plan, self.step.mix, self.step.arithmetic, self.step.stalled)
        return self.seen * nodes.server(meter, self.spent)

    @property
    def servers(self) -> int:
        return self.plan.cluster.nodes

    @property
    def limit(self) -> float:
        """Watts of a server's devices at their limit."""
        return self.plan.cluster.gpus_per_node * self.plan.gpu.max_power


METRICS: dict[str, Callable[[Tuned], tuple[float, float]]] = {  # predicted, and what the device's peak or the weights alone would say
    "samples/s": lambda t: (t.samples_per_s, t.plan.train.global_batch / t.ideal),
    "s/iter": lambda t: (t.step.step_time, t.ideal),
    "step_s": lambda t: (t.step.step_time, t.ideal),
    "tokens/s": lambda t: (t.step.tokens_per_s, t.plan.tokens_per_step / t.ideal),
    "trainer_tokens/s": lambda t: (t.step.tokens_per_s, t.plan.tokens_per_step / t.ideal),
    "time_to_train_min": lambda t: (t.seconds / 60, t.ideal_seconds / 60),
    "mean_node_W": lambda t: (t.watts, t.limit),
    "energy_kWh_per_run": lambda t: (t.servers * t.watts * t.seconds / KWH, t.servers * t.limit * t.ideal_seconds / KWH),
    "memory_GB": lambda t: (t.step.memory * t.plan.ranks / GB, 2 * parameters(t.plan.model) / GB),
    "peak_GiB": lambda t: (t.step.memory / GIB, 2 * parameters(t.plan.model) / GIB),
    "peak_GiB_per_GPU": lambda t: (t.step.memory / GIB, 2 * parameters(t.plan.model) / t.plan.ranks / GIB),
}  # fmt: skip
METERED = ("mean_node_W", "energy_kWh_per_run")
SCORED = {*METRICS, "step_time_s", "gen_s", "tokens/s/GPU", "seconds_per_1024_prompts", "weight_sync_s", "weight_sync_bf16_s"}


def scored(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of quantities that are predicted at all, by the source's family."""
    kept = frame[frame["metric"].isin(SCORED)]
    family = kept["source"].astype(str).str.split(r"[/ ]", n=2, regex=True).str[:2].str.join("/")
    notes = kept["note"].astype(str) if "note" in kept else pd.Series("", kept.index)
    release = notes.str.extract(r"NeMo RL( v\S+)")[0].fillna("")  # constants were fitted to one of them
    return kept.assign(row=kept.index, group=family + release)


def tunings_of(frame: pd.DataFrame) -> Replayed:
    """Every row that names a fine-tuning of a known model on known GPUs."""
    known: dict[Any, Tuned] = {}

    def of(row: Mapping[str, Any]) -> tuple[Tuned | Rolled, float, float]:
        if word(row, "placement") not in ("trainer", "trainer only"):
            return rolled(row)
        method, maker = _method(row), _maker(row)
        said = tuple(word(row, name) for name in ("model sizes", "gpus", "seq lens", "batch"))
        key = (maker, method, _rank(row, maker), said, _servers(row), nodes.seen(word(row, "source")))
        metric = METRICS.get(word(row, "metric"))
        if "rl" in word(row, "algo") and row["metric"] != "step_s":
            raise Unplayable("what a reinforcement learning's trainer does beside its step is not predicted yet")
        if "optimisation table" in word(row, "source") and "GiB" in word(row, "metric"):
            raise Unplayable("its loss is made of chunks of the logits: no plan says that")
        if metric is None:
            raise Unplayable(f"metric={row['metric']} of a fine-tuning is not predicted yet")
        if key not in known:
            known[key] = _tuned(row, maker, method)
        return known[key], *metric(known[key])

    found, failed = each(frame, of)
    rows = list(found.values())
    classes = [f"{frame['metric'][index]} {one.plan.finetune.method} {one.plan.align.method}" for index, (one, _, _) in found.items()]
    kinds = [_kind(one, word(frame.loc[index], "metric")) for index, (one, _, _) in found.items()]
    spread = [_spread(row[0], kind) for row, kind in zip(rows, kinds, strict=True)]
    return Replayed(tabled(list(found), [row[1] for row in rows], spread, [row[2] for row in rows], classes, kinds), failed)


def _kind(one: Tuned | Rolled, metric: str) -> str:
    """What a metric measures."""
    if isinstance(one, Rolled):
        return "rollouts, mixture" if one.plan.model.moe.experts else "rollouts, dense"
    return {"mean_node_W": "power", "energy_kWh_per_run": "energy"}.get(metric, "memory" if re.search("GB|GiB", metric) else "time")


def _spread(one: Tuned | Rolled, kind: str) -> float:
    """Standard deviation of the logarithm of a prediction's error."""
    if isinstance(one, Rolled):
        return hypot(one.lived.parts.step.error, GENERATION)
    return {"power": nodes.SPREAD, "energy": hypot(nodes.SPREAD, one.step.error)}.get(kind, one.step.error)


def _method(row: Mapping[str, Any]) -> str:
    said = word(row, "algo").lower()
    if "emb" in said:
        raise Unplayable("embedding and head are trained beside the adapters: no plan says that")
    if "q-lora" in said or "qlora" in said:
        return "qlora"
    if "lora" in said and "dora" not in said:
        return "lora"
    if "full" in said:
        return "full"
    raise Unplayable(f"algo={row['algo']} is no full, LoRA or QLoRA fine-tuning")


def _maker(row: Mapping[str, Any]) -> Maker:
    found = next((maker for name, maker in MAKERS if name in word(row, "source")), None)
    if found is None:
        raise Unplayable("what this source's software does is not known here")
    return found


def _tuned(row: Mapping[str, Any], maker: Maker, method: str) -> Tuned:
    if maker.pure and method == "full":
        raise Unplayable("weights and moments in bf16 throughout: no plan says that")
    count, server, gpu, cluster = _machine(row)
    model = next((words for pattern, words in MODELS if re.search(pattern, word(row, "model sizes"), re.IGNORECASE)), None)
    if model is None:
        raise Unplayable(f"model={row['model sizes']} is not in conf/model")
    length = re.search(r"\d+", word(row, "seq lens"))
    if length is None:
        raise Unplayable("its length is not said")
    words = [f"model={model[0]}", *model[1:], f"gpu={gpu}", f"cluster={cluster}", f"cluster.nodes={-(-count // server)}",
             f"cluster.gpus_per_node={server}", "cluster.spares=0", "data=prepared", "tokenizer=llama3", "train=large", *maker.words,
             f"train.seq_len={length[0]}", f"train.evaluate_sequences={mlperf.HELD_OUT}", f"finetune={method}",
             f"finetune.rank={_rank(row, maker)}", f"finetune.targets=[{','.join(maker.targets)}]", *_servers(row)]  # fmt: skip
    plans = _meshes(words, count, _batch(row, count, maker), maker)
    found = [Tuned(plan, pace(plan, method != "full"), nodes.seen(word(row, "source"))) for plan in plans]
    fits = [one for one in found if one.step.memory <= USABLE * one.plan.gpu.memory] or found
    return min(fits, key=lambda one: one.step.step_time)


def _machine(row: Mapping[str, Any]) -> tuple[int, int, str, str]:
    """Devices, those of a server, and their options of gpu and cluster."""
    said = word(row, "gpus")
    if logged := re.match(r"(\d+) nodes? x ?(\d+)$", said):  # a log of servers, whose folder names the devices
        return int(logged[1]) * int(logged[2]), int(logged[2]), *part_of({"gpu": word(row, "source")})
    count = re.match(r"\s*(\d+)\s*x?\s*\S", said)
    if count is None or "node" in said.split("(")[0]:
        raise Unplayable(f"gpus={said or 'blank'} names no device")
    ranks, servers = int(count[1]), re.search(r"\((\d+) nodes?\)", said)
    return ranks, -(-ranks // int(servers[1])) if servers else min(8, ranks), *part_of({"gpu": said[count.end(1) :]})


def _servers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Words for the servers whose power a row is of."""
    return (*nodes.servers(_machine(row)[2], word(row, "source")),) if row["metric"] in METERED else ()


def _rank(row: Mapping[str, Any], maker: Maker) -> int:
    said = re.search(r"\br(\d+)", word(row, "algo"))
    return int(said[1]) if said else maker.rank


def _batch(row: Mapping[str, Any], count: int, maker: Maker) -> tuple[int, int]:
    """Sequences of a step, and of a micro-batch."""
    said = word(row, "batch")
    if not said and row["metric"] in METERED and maker.meshes:
        return max(8, count // 8), 1  # as MLPerf's submitters take
    accumulated = re.search(r"bs (\d+)(?: x grad-accum (\d+))?", said)
    if accumulated:
        micro = int(accumulated[1])
        return micro * int(accumulated[2] or 1) * count, micro
    if micros := re.search(r"micro_batches (\d+)", said):
        return int(micros[1]) * count, 1
    if said.split(".")[0].isdigit():
        return int(float(said)), 1
    raise Unplayable(f"batch={said or 'blank'} is not said in sequences")


def _meshes(words: list[str], count: int, batch: tuple[int, int], maker: Maker) -> Iterator[Plan]:
    """The plan on every mesh that its users would try: tensor and context parallelism in a server, the rest data parallelism."""
    sizes, micro = batch
    base = _base(tuple(words))
    precision = "fp8" if maker.meshes and base.gpu.peak("fp8") else "bf16"
    whole = maker.whole and base.finetune.adapters
    for tp, cp in product((1, 2, 4, 8), (1, 2, 4, 8)) if maker.meshes else ((1, 1),):
        dp = count // (tp * cp)
        if dp and count % (tp * cp) == 0 and sizes % (dp * micro) == 0:
            train = base.train.but(precision=precision, global_batch=sizes, micro_batch=micro)
            for copies in {1, dp} if whole else {1}:
                yield base.but(mesh=base.mesh.but(tp=tp, cp=cp, dp_replicate=copies, dp_shard=dp // copies), train=train)


@cache
def _base(words: tuple[str, ...]) -> Plan:
    return load(words, rules=lambda _: [])
