"""The plan: everything about a run, in SI units, immutable, with one id wherever it is read."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Optional

from conf.node import Node, say
from conf.units import (
    BitRate,
    ByteRate,
    Bytes,
    DollarsPerHour,
    FlopRate,
    Flops,
    Intensity,
    Litres,
    Rate,
    Seconds,
    Watts,
)


@dataclass(kw_only=True)
class Gpu(Node):
    """One device that holds one rank: an accelerator, or one CPU core."""

    name: str = say("name of the device, the key of its price")
    kind: str = say("cpu or cuda")
    fp32_peak: FlopRate = say("peak dense fp32 matrix rate")
    bf16_peak: Optional[FlopRate] = say("peak dense bf16 matrix rate, null where there is none")
    memory: Bytes = say("memory of the device")
    memory_bandwidth: ByteRate = say("peak memory bandwidth")
    gemm_efficiency: float = say("fraction of the peak that a large matrix product reaches (measured maximum)")
    gemm_half: Flops = say("size of a matrix product that runs at half of that rate")
    attention_efficiency: float = say("rate of the attention kernel as a fraction of a large matrix product's")
    memory_efficiency: float = say("fraction of the memory bandwidth that element-wise kernels reach")
    launch: Seconds = say("smallest time of a kernel")
    overlap: float = say("share of the memory traffic of a kernel hidden behind its arithmetic, 0 to 1")
    link_bandwidth: BitRate = say("bandwidth to the other devices of the node, per direction")
    link_latency: Seconds = say("latency of one hop inside the node")
    idle_power: Watts = say("power of the idle device")
    max_power: Watts = say("power limit of the device")
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Cluster(Node):
    name: str = say("name of the cluster")
    nodes: int = say("servers in the job, spares not counted")
    gpus_per_node: int = say("devices, and so ranks, per server")
    spares: int = say("servers kept idle to replace failed ones")
    cores_per_node: int = say("CPU cores per server that work on data")
    nic_bandwidth: BitRate = say("network bandwidth per device, per direction")
    nic_latency: Seconds = say("latency of one hop between servers")
    storage_write: ByteRate = say("write bandwidth of the checkpoint storage, whole cluster")
    storage_read: ByteRate = say("read bandwidth of the checkpoint storage, whole cluster")
    source: str = say("where the numbers come from")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(kw_only=True)
class Model(Node):
    """A Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    name: str = say("name of the model")
    layers: int = say("decoder blocks")
    hidden: int = say("width of the residual stream")
    heads: int = say("query heads")
    kv_heads: int = say("key and value heads")
    ffn: int = say("width of the SwiGLU feed-forward")
    vocab: int = say("rows of the embedding; at least the tokenizer's vocabulary")
    tied: bool = say("whether the output head shares the embedding")
    rope_theta: float = say("base of the rotary frequencies")
    norm_epsilon: float = say("epsilon of RMSNorm")
    source: str = say("where the shape comes from")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(kw_only=True)
class Data(Node):
    path: Optional[str] = say("file, folder or glob of text; python = the Python library on this machine; null = tokens exist")
    limit: Bytes = say("most bytes of text to read")
    text_field: str = say("field or column that holds the text in .jsonl and .parquet")
    held_out: float = say("share of documents kept for evaluation")
    tokens: Optional[int] = say("training tokens of a corpus that is not here")
    document_bytes: Bytes = say("expected bytes a document, where a file holds many")
    duplicates: float = say("expected share of documents that are exact duplicates")
    extract_rate: ByteRate = say("expected text extracted, per core")
    dedup_rate: ByteRate = say("expected text deduplicated, per core")
    source: str = say("where the expectations come from")


@dataclass(kw_only=True)
class Tokenizer(Node):
    name: str = say("name of the tokenizer")
    vocab: int = say("tokens, special ones included")
    sample: Bytes = say("text that the tokenizer is trained on")
    bytes_per_token: float = say("expected bytes a token")
    train_rate: ByteRate = say("expected text read while training the tokenizer, per core")
    encode_rate: ByteRate = say("expected text encoded, per core")
    source: str = say("where the expectations come from")


@dataclass(kw_only=True)
class Mesh(Node):
    """Axes of the device mesh; their product is the number of ranks."""

    dp_replicate: int = say("replicas of the sharded model")
    dp_shard: int = say("ranks that share parameters, gradients and optimizer state (FSDP); -1 = what is left")
    cp: int = say("context parallel: ranks that share a sequence")
    tp: int = say("tensor parallel: ranks that share each matrix, with sequence parallelism")
    pp: int = say("pipeline parallel: stages")
    vpp: int = say("virtual stages on each pipeline rank (interleaved schedule); 1 = plain 1F1B")


@dataclass(kw_only=True)
class Train(Node):
    precision: str = say("fp32 or bf16 (bf16 compute, fp32 weights and reduction)")
    seq_len: int = say("tokens a sequence")
    global_batch: int = say("sequences an optimizer step")
    micro_batch: int = say("sequences a forward pass on one rank")
    steps: Optional[int] = say("optimizer steps; null = until stop_after")
    stop_after: Optional[Seconds] = say("wall clock after which training stops; null = never")
    recompute: str = say("activations recomputed in the backward pass: none or full")
    learning_rate: float = say("peak learning rate of AdamW")
    final_rate: float = say("last learning rate as a share of the peak")
    warmup: int = say("steps of linear warm-up")
    schedule: str = say("cosine, wsd or constant")
    decay: float = say("share of the steps in which wsd decays")
    weight_decay: float = say("weight decay of AdamW, on matrices")
    beta1: float = say("AdamW's beta1")
    beta2: float = say("AdamW's beta2")
    epsilon: float = say("AdamW's epsilon")
    clip: float = say("largest global gradient norm")
    evaluate_every: int = say("steps between evaluations; 0 = only at the end")
    evaluate_sequences: int = say("held-out sequences an evaluation; 0 = none")


@dataclass(kw_only=True)
class Checkpoint(Node):
    every: int = say("steps between checkpoints; 0 = only at the end")
    keep: int = say("newest checkpoints kept")


@dataclass(kw_only=True)
class Cause(Node):
    per: str = say("what fails at this rate: job, node or gpu")
    rate: Rate = say("failures per unit of time")
    planned: bool = say("whether it is maintenance that was planned", False)


@dataclass(kw_only=True)
class Failures(Node):
    causes: dict[str, Cause] = say("rate of each cause that stops the job")
    detect: Seconds = say("time to notice")
    diagnose: Seconds = say("time to find the culprit")
    reallocate: Seconds = say("time to swap in a spare")
    init: Seconds = say("time to start all ranks")
    repair: Seconds = say("mean time until a failed server is a spare again")
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Power(Node):
    """Draw of a device in each state as a share of the way from idle to its limit, and what surrounds it."""

    compute: float = say("share while computing")
    communication: float = say("share while waiting for a collective (NCCL spins)")
    bubble: float = say("share in a pipeline bubble")
    other: float = say("share in every other state")
    host: Watts = say("power of a server without its devices")
    pue: float = say("power usage effectiveness of the building")
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Grid(Node):
    name: str = say("region")
    year: int = say("year of the intensity")
    intensity: Intensity = say("yearly mean, location-based")
    market: Optional[Intensity] = say("market-based intensity after contracts; null = as location")
    profile: Optional[list[list[float]]] = say("12 months × 24 hours (UTC) relative to the yearly mean; null = flat")
    water: Litres = say("water per energy used, site and generation")
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Offer(Node):
    low: DollarsPerHour = say("cheapest price of a device-hour")
    mid: DollarsPerHour = say("price of a device-hour used for the cost")
    high: DollarsPerHour = say("dearest price of a device-hour")


@dataclass(kw_only=True)
class Price(Node):
    as_of: str = say("date of the prices")
    gpu_hours: dict[str, Offer] = say("price of an hour of each device")
    embodied: dict[str, float] = say("embodied carbon of each device with its share of the server [kgCO2e]")
    lifetime: Seconds = say("service life over which embodied carbon is spread")
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Law(Node):
    """Loss = irreducible + A / N**alpha + B / D**beta, with N parameters and D tokens, in nats a token."""

    name: str = say("name of the law; none = no loss is predicted")
    irreducible: float = say("loss of a perfect model", 0.0)
    A: float = say("scale of the parameter term", 0.0)
    B: float = say("scale of the data term", 0.0)
    alpha: float = say("exponent of parameters", 0.0)
    beta: float = say("exponent of tokens", 0.0)
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Plan(Node):
    seed: int = say("seed of everything random")
    start: str = say("date and hour (UTC) at which the run starts")
    profile: Optional[str] = say("file of measured rates (foretold analysis calibrate writes it); null = the gpu's table")
    gpu: Gpu = say("the device", Gpu)
    cluster: Cluster = say("the machines", Cluster)
    model: Model = say("the model", Model)
    data: Data = say("the corpus", Data)
    tokenizer: Tokenizer = say("the tokenizer", Tokenizer)
    mesh: Mesh = say("the parallelism", Mesh)
    train: Train = say("the training", Train)
    checkpoint: Checkpoint = say("the checkpoints", Checkpoint)
    failures: Failures = say("what fails, and what that costs", Failures)
    power: Power = say("watts", Power)
    grid: Grid = say("carbon and water", Grid)
    price: Price = say("money", Price)
    law: Law = say("the scaling law", Law)

    @property
    def dp_shard(self) -> int:
        """Ranks of the sharding axis, with -1 filled in."""
        rest = self.mesh.dp_replicate * self.mesh.cp * self.mesh.tp * self.mesh.pp
        return self.mesh.dp_shard if self.mesh.dp_shard != -1 else max(1, self.cluster.ranks // rest)

    @property
    def axes(self) -> dict[str, int]:
        """Degree of every mesh axis, outermost first."""
        mesh = self.mesh
        return {"pp": mesh.pp, "dp_replicate": mesh.dp_replicate, "dp_shard": self.dp_shard, "cp": mesh.cp, "tp": mesh.tp}

    @property
    def ranks(self) -> int:
        return prod(self.axes.values())

    @property
    def dp(self) -> int:
        """Data-parallel degree: groups of ranks that see different sequences."""
        return self.mesh.dp_replicate * self.dp_shard

    @property
    def accumulation(self) -> int:
        """Micro-batches a step on each data-parallel rank."""
        return self.train.global_batch // (self.dp * self.train.micro_batch)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.train.seq_len

    @cached_property
    def id(self) -> str:
        """Digest of every value, the profile's content included; it starts with a letter, so no tool reads a number."""
        values = dataclasses.asdict(self)
        values["profile"] = digest(Path(self.profile)) if self.profile else None
        text = json.dumps(values, sort_keys=True)
        return "p" + hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def groups() -> dict[str, type[Node]]:
    """The groups of the plan by name."""
    from conf.node import hints

    return {n: t for n, t in hints(Plan).items() if isinstance(t, type) and issubclass(t, Node)}


def keys(kind: type[Node] = Plan, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every key of the plan with its type and meaning: the schema table behind help and messages."""
    from conf.node import hints

    table: dict[str, tuple[Any, str]] = {}
    for name, annotation in hints(kind).items():
        if isinstance(annotation, type) and issubclass(annotation, Node):
            table |= keys(annotation, f"{prefix}{name}.")
        else:
            table[prefix + name] = (annotation, kind.__dataclass_fields__[name].metadata["means"])
    return table
