"""The plan: everything about a run, in SI units, immutable, with one id wherever it is read."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd, prod
from pathlib import Path
from typing import Any, Optional

from conf.alignment import Align, Roles, roles
from conf.duration import Lasting
from conf.lengths import file_of
from conf.node import NOT_NEGATIVE, POSITIVE, SHARE, Node, say
from conf.units import (
    BitRate,
    ByteRate,
    Bytes,
    DollarsPerByte,
    DollarsPerByteTime,
    DollarsPerEnergy,
    DollarsPerHour,
    FlopRate,
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
    kind: str = say("cpu, cuda (ROCm too) or tpu; real executes the first two", must=("cpu", "cuda", "tpu"))
    fp32_peak: FlopRate = say("peak dense matrix rate of fp32 training (TF32 where there is one)", must=POSITIVE)
    bf16_peak: Optional[FlopRate] = say("peak dense bf16 matrix rate, null where there is none", must=POSITIVE)
    fp16_peak: Optional[FlopRate] = say("peak dense fp16 matrix rate, null where there is none", must=POSITIVE)
    fp8_peak: Optional[FlopRate] = say("peak dense fp8 matrix rate, null where there is none", must=POSITIVE)
    fp4_peak: Optional[FlopRate] = say("peak dense fp4 matrix rate, null where there is none", None, must=POSITIVE)
    memory: Bytes = say("memory of the device", must=POSITIVE)
    memory_bandwidth: ByteRate = say("peak memory bandwidth", must=POSITIVE)
    gemm_efficiency: float = say("fraction of the peak that a large matrix product reaches (measured maximum)", must=POSITIVE)
    narrow_efficiency: float = say("the same in fp8 and fp4, of their peaks", 0.7, must=POSITIVE)
    units: Optional[int] = say(
        "units (SMs) over which a matrix product's tiles are dealt; null = tiles are not modelled", None, must=POSITIVE
    )
    gemm_depth: float = say("depth of a matrix product that filling and draining a tile costs, in elements of k", 0.0, must=NOT_NEGATIVE)
    gemm_half: float = say("intensity a b / (a + b) of an a × b tile at which it runs at half of an endless one's rate", 0.0,
                           must=NOT_NEGATIVE)  # fmt: skip
    gemm_backward: float = say("rate of the gradients' matrix products over that of forward ones", 1.0, must=POSITIVE)
    gemm_odd: float = say("rate of matrix products whose rows do not begin at multiples of 16 bytes over that of others", 1.0,
                          must=POSITIVE)  # fmt: skip
    early: bool = say("whether its libraries are those of its first year, as CUDA 11.8 was for Hopper", False)
    early_gemm: float = say("rate of matrix products by such libraries over that by mature ones", 1.0, must=POSITIVE)
    grouped_efficiency: float = say("rate of grouped matrix products over that of single ones", 1.0, must=POSITIVE)
    grouped_alone: float = say("the same of grouped products that are measured by themselves", 0.85, must=POSITIVE)
    attention_efficiency: float = say("rate of the attention kernel, forward, as a fraction of a large matrix product's", must=POSITIVE)
    attention_backward: float = say("the same, backward", must=POSITIVE)
    attention_head: float = say("width that a head's softmax takes the time of, besides its products", 0.0, must=NOT_NEGATIVE)
    memory_efficiency: float = say("fraction of the memory bandwidth that element-wise kernels reach", must=POSITIVE)
    calibrated: Optional[dict[str, list[int]]] = say(
        "least and most m, n and k of products, tokens of an expert, sequence and head width that were measured", None
    )
    launch: Seconds = say("smallest time of a kernel", must=NOT_NEGATIVE)
    host_launch: Seconds = say("time of the host to launch a kernel; many small ones wait for it", must=NOT_NEGATIVE)
    decode_host: Seconds = say("time that the host of a serving engine takes between two steps: scheduling, sampling, texts", "0.9 ms",
                               must=NOT_NEGATIVE)  # fmt: skip
    decode_block: Seconds = say("time that it takes in a block, whose attention is launched between the graphs of the rest", "50 us",
                                must=NOT_NEGATIVE)  # fmt: skip
    decode_keys: float = say("rate at which attention reads a cache of keys and values over that at which other kernels read", 0.53,
                             must=POSITIVE)  # fmt: skip
    burst: float = say("by how much products of a moment exceed the rate of a training, which runs at its power limit", 0.0,
                       must=NOT_NEGATIVE)  # fmt: skip
    alone: float = say("speed of kernels measured one by one over that in a training", 1.0, must=POSITIVE)
    overlap: float = say("share of the memory traffic of a kernel hidden behind its arithmetic, 0 to 1", must=SHARE)
    eager_attention: float = say("rate of torch's own attention kernel over that of the best one", 1.0, must=POSITIVE)
    tensor_overlap: float = say("share of tensor-parallel traffic hidden behind the matrix products around it, in fused code", 0.0,
                                must=SHARE)  # fmt: skip
    spread: float = say("standard deviation of speed among devices of the kind; a step waits for the slowest", 0.01, must=NOT_NEGATIVE)
    slowdown: float = say("time that a collective beside kernels takes from them, as a share of its own; below 1", 0.0, must=SHARE)
    link_bandwidth: BitRate = say("bandwidth to the other devices of its domain (NVLink), per direction", must=POSITIVE)
    link_efficiency: float = say("fraction of that bandwidth that collectives reach", 1.0, must=POSITIVE)
    nvls: float = say("fraction of that bandwidth at which the switches of a domain reduce; 0 = they cannot", 0.0, must=SHARE)
    nic_efficiency: float = say("fraction of the network's bandwidth that collectives reach", 1.0, must=POSITIVE)
    link_start: Seconds = say("time that any collective takes to start", must=NOT_NEGATIVE)
    link_latency: Seconds = say("latency of one hop inside the domain", must=NOT_NEGATIVE)
    snapshot: ByteRate = say("rate at which the state is copied aside for an asynchronous checkpoint", must=POSITIVE)
    error: float = say("standard deviation of log(predicted / measured) step time on sources left out of the fit", 0.25, must=NOT_NEGATIVE)
    mixture_error: float = say("the same of mixtures of experts", 0.25, must=NOT_NEGATIVE)
    host_error: float = say("what is added to either, in squares, where blocks wait for the host", 0.2, must=NOT_NEGATIVE)
    idle_power: Watts = say("power of the idle device", must=NOT_NEGATIVE)
    max_power: Watts = say("power limit of the device")
    cap_static: float = say("power that does no arithmetic, as a share of the limit: what a lower cap cannot take away", 0.32, must=SHARE)
    cap_exponent: float = say("power of arithmetic grows with its rate to this exponent", 3.2, must=POSITIVE)
    source: str = say("where the numbers come from")

    def peak(self, precision: str) -> float | None:
        """Peak dense matrix rate of training at a precision [FLOP/s], None where the device has none."""
        peaks = {"fp32": self.fp32_peak, "bf16": self.bf16_peak, "fp16": self.fp16_peak, "fp8": self.fp8_peak, "fp4": self.fp4_peak}
        return peaks.get(precision)


@dataclass(kw_only=True)
class Cluster(Node):
    name: str = say("name of the cluster")
    nodes: int = say("servers in the job, spares not counted", must=POSITIVE)
    gpus_per_node: int = say("devices, and so ranks, per server", must=POSITIVE)
    spares: int = say("servers kept idle to replace failed ones", must=NOT_NEGATIVE)
    cold_spares: int = say("servers to be had that must boot first; they are not held before", 0, must=NOT_NEGATIVE)
    domain: Optional[int] = say("devices that the fast link joins (NVLink domain); null = those of a server", must=POSITIVE)
    pod_nodes: Optional[int] = say("servers that share a part of the fabric without oversubscription; null = all", must=POSITIVE)
    rings: Optional[list[float]] = say("rings that 2, 3, … devices close over their own links; null = switches join them", None)
    oversubscription: float = say("bandwidth of a pod's servers over that of the pod's way out; 1 = none", must=POSITIVE)
    cores_per_node: int = say("CPU cores per server that work on data", must=POSITIVE)
    nic_bandwidth: BitRate = say("network bandwidth per device, per direction")
    nic_latency: Seconds = say("latency of one hop between servers", must=NOT_NEGATIVE)
    storage_write: ByteRate = say("write bandwidth of the checkpoint storage, whole cluster", must=POSITIVE)
    storage_read: ByteRate = say("read bandwidth of the checkpoint storage, whole cluster", must=POSITIVE)
    local_bandwidth: Optional[ByteRate] = say("bandwidth of a server's own disks; null = it has none", None, must=POSITIVE)
    source: str = say("where the numbers come from")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def servers(self) -> int:
        """All that can be in the job at some time, spares of both kinds included."""
        return self.nodes + self.spares + self.cold_spares

    @property
    def domain_ranks(self) -> int:
        return self.domain or self.gpus_per_node

    @property
    def pod_ranks(self) -> int:
        return (self.pod_nodes or self.nodes) * self.gpus_per_node

    def part(self, count: int) -> "Cluster":
        """The machines of so many of its ranks: whole servers, or equal parts of them where whole ones do not divide."""
        if count == self.ranks:
            return self
        each = count if self.nodes == 1 else gcd(count, self.gpus_per_node)
        return dataclasses.replace(
            self, nodes=count // each, gpus_per_node=each, domain=self.domain if self.nodes == 1 else self.domain_ranks
        )


@dataclass(kw_only=True)
class Moe(Node):
    """Mixture of experts; without experts the model is dense."""

    experts: int = say("routed experts of a layer; 0 = a dense model", 0, must=NOT_NEGATIVE)
    top_k: int = say("routed experts that a token visits", 0, must=NOT_NEGATIVE)
    shared: int = say("experts that every token visits", 0, must=NOT_NEGATIVE)
    ffn: int = say("width of one expert's feed-forward", 0, must=NOT_NEGATIVE)
    dense_layers: int = say("leading layers whose feed-forward is dense", 0, must=NOT_NEGATIVE)
    groups: int = say("groups into which the experts are parted, one a server in DeepSeek-V3", 1, must=POSITIVE)
    node_limit: Optional[int] = say("groups (servers) among which a token's experts may lie; null = all", None, must=POSITIVE)
    score: str = say("how the router scores: softmax over all experts, or a sigmoid for each", "softmax", must=("softmax", "sigmoid"))
    normalise: bool = say("whether the weights of a token's experts are scaled to sum to 1", True)
    scale: float = say("factor on the weights of a token's experts", 1.0, must=POSITIVE)
    imbalance: float = say("tokens on the fullest rank of experts over the mean of all ranks, at least 1", 1.0, must=POSITIVE)
    balance: str = say("load balancing: none, loss (a share of the loss, by sequence) or bias (a bias when choosing)", "none",
                       must=("none", "loss", "bias"))  # fmt: skip
    balance_rate: float = say("weight of the balancing loss, or step of the balancing bias", 0.001, must=NOT_NEGATIVE)


@dataclass(kw_only=True)
class Mla(Node):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); without kv_rank attention is ordinary."""

    kv_rank: int = say("width of the compressed keys and values; 0 = ordinary attention", 0, must=NOT_NEGATIVE)
    q_rank: int = say("width of the compressed queries; 0 = not compressed", 0, must=NOT_NEGATIVE)
    rope: int = say("width of a head's rotary part, beside model.head", 0, must=NOT_NEGATIVE)


@dataclass(kw_only=True)
class RopeScaling(Node):
    """Rotary frequencies stretched for contexts longer than those of the first training; without a factor they are as they are."""

    kind: str = say("none, linear (every frequency) or llama3 (slow frequencies only)", "none", must=("none", "linear", "llama3"))
    factor: float = say("how many times longer the context becomes", 1.0, must=POSITIVE)
    low: float = say("llama3: turns over the original context below which a frequency is stretched", 1.0, must=POSITIVE)
    high: float = say("llama3: turns above which it is kept", 4.0, must=POSITIVE)
    original: int = say("llama3: context of the first training", 8192, must=POSITIVE)


@dataclass(kw_only=True)
class Model(Node):
    """A decoder. The defaults are Llama's: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    name: str = say("name of the model")
    layers: int = say("decoder blocks", must=POSITIVE)
    hidden: int = say("width of the residual stream", must=POSITIVE)
    heads: int = say("query heads", must=POSITIVE)
    kv_heads: int = say("key and value heads", must=POSITIVE)
    head: Optional[int] = say("width of a head; null = hidden / heads", None, must=POSITIVE)
    ffn: int = say("width of the dense feed-forward", must=POSITIVE)
    gated: bool = say("whether the feed-forward is gated (SwiGLU, three matrices) or not (two)", True)
    vocab: int = say("rows of the embedding; at least the tokenizer's vocabulary", must=POSITIVE)
    tied: bool = say("whether the output head shares the embedding")
    positions: str = say("rope, learned (as GPT-3) or alibi (as BLOOM)", "rope", must=("rope", "learned", "alibi"))
    context: Optional[int] = say("rows of the table of learned positions", None, must=POSITIVE)
    layer_norm: bool = say("LayerNorm and a bias for every matrix (as GPT-3) instead of RMSNorm and none", False)
    qk_norm: bool = say("RMSNorm over each query's and key's head", False)
    rope_theta: float = say("base of the rotary frequencies", must=POSITIVE)
    rope_scaling: RopeScaling = say("stretching of the rotary frequencies", RopeScaling)
    norm_epsilon: float = say("epsilon of the norms", must=POSITIVE)
    moe: Moe = say("mixture of experts", Moe)
    mla: Mla = say("multi-head latent attention", Mla)
    mtp: int = say(
        "blocks that predict one more token each (DeepSeek-V3, arXiv 2412.19437, section 2.2), beside layers", 0, must=NOT_NEGATIVE
    )
    source: str = say("where the shape comes from")

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads

    @property
    def position_rows(self) -> int:
        return (self.context or 0) if self.positions == "learned" else 0


@dataclass(kw_only=True)
class Crawl(Node):
    """Pages fetched from the web; without seeds the stage is off."""

    seeds: list[str] = say("addresses at which the crawl begins, as in [https://example.org/]; empty = no crawl", list)
    hosts: list[str] = say("hosts that may be asked beside those of the seeds, as in [example.org,localhost:8000]; [any] = all", list)
    pages: int = say("most pages to keep", 10_000, must=POSITIVE)
    pages_per_host: int = say("most pages, found or not, that a host is asked for", 1000, must=POSITIVE)
    depth: int = say("most links between a seed and a page", 10, must=NOT_NEGATIVE)
    redirects: int = say("most redirects in a row that are followed", 5, must=NOT_NEGATIVE)
    host_delay: Seconds = say("least time between two requests to a host; its robots.txt may ask for more", "1 s", must=NOT_NEGATIVE)
    delay_limit: Seconds = say("a host whose robots.txt asks for more time than this is left alone", "60 s", must=NOT_NEGATIVE)
    hosts_at_once: int = say("most requests at the same time, each to another host", 64, must=POSITIVE)
    timeout: Seconds = say("most time that a request may take", "30 s", must=POSITIVE)
    page_limit: Bytes = say("most bytes of a page that are kept", "5 MB", must=POSITIVE)
    segment: Bytes = say("size at which an archive is closed and the next begun", "256 MB", must=POSITIVE)
    agent: str = say("User-Agent that is sent; what stands before its first / is the name that robots.txt is asked for", "foretold/0.1")
    expected_hosts: Optional[int] = say("expected hosts; null = those of the seeds", None, must=POSITIVE)
    expected_pages: Optional[int] = say("expected pages of a host; null = pages_per_host", None, must=POSITIVE)
    page_bytes: Bytes = say("expected bytes of a page as it is sent", "100 kB", must=POSITIVE)
    latency: Seconds = say("expected time until a host answers", "0.5 s", must=POSITIVE)
    bandwidth: ByteRate = say("expected bandwidth of the way to the web", "10 MB/s", must=POSITIVE)
    source: str = say("where the expectations come from", "")


@dataclass(kw_only=True)
class Data(Node):
    path: Optional[str] = say(
        "file, folder or glob of text; python = the Python library on this machine; crawl = what the crawl fetched; null = tokens exist"
    )
    limit: Bytes = say("most bytes of text to read", must=POSITIVE)
    text_field: str = say("field or column that holds the text in .jsonl and .parquet")
    held_out: float = say("share of documents kept for evaluation", must=SHARE)
    mixture: list[str] = say("weights in training of files by pattern, as in ['3 *.py', '1 *.md']; empty = as the corpus is")
    tokens: Optional[int] = say("training tokens of a corpus that is not here")
    raw: Optional[Bytes] = say("bytes in the files of a corpus that is not here but is to be made into tokens; null = tokens exist", None,
                               must=POSITIVE)  # fmt: skip
    raw_files: int = say("files that these bytes are in", 1, must=POSITIVE)
    document_bytes: Bytes = say("expected bytes a document, where a file holds many", must=POSITIVE)
    text_yield: float = say(
        "expected bytes of text from a byte of the files: of compressed web archives a few hundredths", 1.0, must=POSITIVE
    )
    extractor: str = say("text of an HTML page: tags = all of it; trafilatura, trafilatura_fast or resiliparse = its main text", "tags",
                         must=("tags", "trafilatura", "trafilatura_fast", "resiliparse"))  # fmt: skip
    page_limit: Bytes = say("largest page of HTML or of a web archive that is looked at", "20 MB", must=POSITIVE)
    page_seconds: Seconds = say("most processor time that one page may take", "30 s", must=POSITIVE)
    page_memory: Bytes = say("most memory that one page may take", "1 GB", must=POSITIVE)
    blocklist: Optional[str] = say("file of domains and words, one a line, that keep a page out by its address", None)
    languages: list[str] = say("languages that stay, as in [en,de]; [any] = all stay, and are told; empty = nobody looks", list)
    language_score: float = say("least probability of a page's language", 0.65, must=SHARE)
    mask: bool = say("whether e-mail addresses, public IP addresses and telephone numbers are masked", False)
    evaluations: list[str] = say("files of evaluation sets; what shares a run of 13 words with one is refused", list)
    filter: str = say("which documents are refused, by the rules of Gopher, C4 or FineWeb; none = none", "none",
                      must=("none", "gopher", "c4", "fineweb"))  # fmt: skip
    filtered: float = say("expected share of text that these rules refuse", 0.0, must=SHARE)
    dedup: str = say("which documents go: exact = repeats; minhash = near-repeats too", "exact", must=("exact", "minhash"))
    substrings: int = say("passages of this many words and more that stand elsewhere too go, but for the first; 0 = none", 0,
                          must=NOT_NEGATIVE)  # fmt: skip
    dedup_within: str = say("where documents meet: corpus = everywhere; folder = in each folder below data.path, a snapshot of the web",
                            "corpus", must=("corpus", "folder"))  # fmt: skip
    keep: str = say("which of near-duplicates stays: first = the smallest id; longest = the longest text", "first",
                    must=("first", "longest"))  # fmt: skip
    duplicates: float = say("expected share of documents that are duplicates", must=SHARE)
    cut: float = say("expected share of text in passages that stand elsewhere too, where these go", 0.0, must=SHARE)
    runner: str = say("who does the tasks: local = processes of this machine; ray = a Ray cluster (RAY_ADDRESS, else one on this machine)",
                      "local", must=("local", "ray"))  # fmt: skip
    spread: float = say("expected spread of a task's time: sigma of its logarithm", 0.0, must=NOT_NEGATIVE)
    failing: float = say("expected share of tasks that fail at a random point and are done again", 0.0, must=SHARE)
    extract_rate: ByteRate = say("expected bytes of files extracted, per core", must=POSITIVE)
    dedup_rate: ByteRate = say("expected text deduplicated, per core", must=POSITIVE)
    substring_rate: ByteRate = say("expected text searched for passages that stand elsewhere, per core", "17 MB/s", must=POSITIVE)
    source: str = say("where the expectations come from")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each pattern of the mixture, in its order."""
        pairs = [entry.split(maxsplit=1) for entry in self.mixture]
        return {pattern: float(weight) for weight, pattern in pairs}


@dataclass(kw_only=True)
class Tokenizer(Node):
    name: str = say("name of the tokenizer")
    vocab: int = say("tokens, special ones included", must=POSITIVE)
    sample: Bytes = say("text that the tokenizer is trained on", must=POSITIVE)
    bytes_per_token: float = say("expected bytes a token", must=POSITIVE)
    train_rate: ByteRate = say("expected text read while training the tokenizer, per core", must=POSITIVE)
    encode_rate: ByteRate = say("expected text encoded, per core", must=POSITIVE)
    source: str = say("where the expectations come from")


# Pipeline schedules, and how many virtual stages a rank holds: exactly one, exactly two, or two and more.
SCHEDULES = {"gpipe": "1", "1f1b": "1", "interleaved": "2+", "zero_bubble": "2+", "zbv": "2", "dualpipev": "2"}


@dataclass(kw_only=True)
class Mesh(Node):
    """Axes of the device mesh; their product is the number of ranks."""

    dp_replicate: int = say("replicas of the sharded model", must=POSITIVE)
    dp_shard: int = say("ranks that share parameters, gradients and optimizer state (FSDP); -1 = what is left")
    cp: int = say("context parallel: ranks that share a sequence", must=POSITIVE)
    tp: int = say("tensor parallel: ranks that share each matrix, with sequence parallelism", must=POSITIVE)
    pp: int = say("pipeline parallel: stages", must=POSITIVE)
    ep: int = say("expert parallel: neighbouring ranks of tp, cp and dp_shard among which the experts are spread", 1, must=POSITIVE)
    etp: int = say("expert tensor parallel: ranks of tp that share the matrices of each expert", 1, must=POSITIVE)
    dispatch: str = say("what travels to the experts: copies (one for each) or tokens (once to a server and a rank, as DeepEP)", "copies",
                        must=("copies", "tokens"))  # fmt: skip
    overlap_experts: bool = say(
        "whether tokens travel to their experts beside the compute of another micro-batch, as under DualPipe", False
    )
    vpp: int = say("virtual stages on each pipeline rank; above 1 for the interleaved schedules, 2 for the V-shaped ones", must=POSITIVE)
    schedule: str = say("pipeline schedule: auto = 1f1b, or interleaved if vpp > 1", "auto", must=("auto", *SCHEDULES))
    zero: int = say("what dp_shard shards: 0 nothing, 1 optimizer states (ZeRO-1), 2 gradients too, 3 parameters too (FSDP)", 3,
                    must=(0, 1, 2, 3))  # fmt: skip
    cp_kind: str = say("context parallelism: ring (keys travel), gather (keys are gathered) or ulysses (heads are traded)", "ring",
                       must=("ring", "gather", "ulysses"))  # fmt: skip

    @property
    def pipeline(self) -> str:
        """The schedule, with auto resolved."""
        return self.schedule if self.schedule != "auto" else "interleaved" if self.vpp > 1 else "1f1b"


@dataclass(kw_only=True)
class Train(Node):
    precision: str = say(
        "of matrix products: fp32, bf16, fp16, fp8, fp4 (weights, moments and reduction stay fp32)",
        must=("fp32", "bf16", "fp16", "fp8", "fp4"),
    )
    seq_len: int = say("tokens a sequence", must=POSITIVE)
    global_batch: int = say("sequences an optimizer step", must=POSITIVE)
    first_batch: Optional[int] = say("sequences of the first optimizer step, where the batch grows; null = global_batch", None,
                                     must=POSITIVE)  # fmt: skip
    batch_warmup: int = say("steps over which the batch grows by multiples of first_batch", 0, must=NOT_NEGATIVE)
    micro_batch: int = say("sequences a forward pass on one rank", must=POSITIVE)
    steps: Optional[int] = say("optimizer steps; null = until stop_after")
    stop_after: Optional[Seconds] = say("wall clock after which training stops; null = never")
    fused_attention: bool = say("whether attention keeps its scores on the chip (FlashAttention), as all do since 2022", True)
    recompute: str = say("activations recomputed in the backward pass: none, attention (with scores), selective (all but matrix products "
                         "and attention) or full", must=("none", "attention", "selective", "full"))  # fmt: skip
    recompute_share: float = say("share of the blocks that recompute, spread evenly", 1.0, must=SHARE)
    compile: bool = say("whether kernels are fused: torch.compile of each block, or a framework that fuses its own", False)
    graphs: bool = say("whether kernels are launched as CUDA graphs, so that the device never waits for the host", False)
    scaling: str = say("of fp8 and fp4: tensor (one scale each) or block (one for every 32 elements, as MXFP8)", "tensor",
                       must=("tensor", "block"))  # fmt: skip
    fused_gradients: bool = say("whether weight gradients add up in the products that make them, as in Megatron", False)
    fused_experts: bool = say("whether activation, quantisation and permutation ride on the experts' grouped products, launched as one",
                              False)  # fmt: skip
    z_loss: float = say("weight of the squared log-partition in the loss (PaLM, section 5), which keeps logits small", 0.0,
                        must=NOT_NEGATIVE)  # fmt: skip
    optimizer: str = say("adamw, adamw8bit (moments in 8 bits; needs the extra adam8bit) or muon (on the matrices of the blocks)", "adamw",
                         must=("adamw", "adamw8bit", "muon"))  # fmt: skip
    packing: str = say("what a sequence is: stream = the next seq_len tokens; best_fit = whole documents, longer ones cut", "stream",
                       must=("stream", "best_fit"))  # fmt: skip
    document_mask: bool = say("whether a token attends only to its own document, where several are packed into a sequence", False)
    learning_rate: float = say("peak learning rate", must=POSITIVE)
    final_rate: float = say("last learning rate as a share of the peak", must=SHARE)
    warmup: int = say("steps of linear warm-up", must=NOT_NEGATIVE)
    schedule: str = say("cosine, linear, wsd or constant", must=("cosine", "linear", "wsd", "constant"))
    decay: float = say("share of the steps in which wsd decays", must=SHARE)
    weight_decay: float = say("weight decay of AdamW, on matrices", must=NOT_NEGATIVE)
    beta1: float = say("AdamW's beta1", must=SHARE)
    beta2: float = say("AdamW's beta2", must=SHARE)
    epsilon: float = say("AdamW's epsilon", must=POSITIVE)
    clip: float = say("largest global gradient norm", must=POSITIVE)
    evaluate_every: int = say("steps between evaluations; 0 = only at the end", must=NOT_NEGATIVE)
    evaluate_sequences: int = say("held-out sequences an evaluation; 0 = none", must=NOT_NEGATIVE)

    @property
    def half(self) -> bool:
        """Whether activations are in bf16: fp8 is a matter of matrix products alone."""
        return self.precision in ("bf16", "fp8")


@dataclass(kw_only=True)
class Checkpoint(Node):
    every: int = say("steps between checkpoints; 0 = only at the end", must=NOT_NEGATIVE)
    keep: int = say("newest checkpoints kept", must=POSITIVE)
    keep_every: int = say("steps between checkpoints that are kept for good; 0 = none", 0, must=NOT_NEGATIVE)
    asynchronous: bool = say("whether training goes on while a copy of the state is written", False)
    local_every: int = say("steps between copies on the servers' own disks, lost with their server; 0 = none", 0, must=NOT_NEGATIVE)
    memory_every: int = say("steps between copies in a neighbour's memory (of one server its own), lost when both fall; 0 = none", 0,
                            must=NOT_NEGATIVE)  # fmt: skip
    spoilt: float = say("share of checkpoints that prove unreadable, so that an older one is taken", 0.0, must=SHARE)


@dataclass(kw_only=True)
class Cause(Node):
    """What strikes the job. Rates are those of a machine in use."""

    per: str = say("what fails at this rate: job, node, gpu, or switch (blast servers each)", must=("job", "node", "gpu", "switch"))
    rate: Rate = say("failures per unit of time", must=POSITIVE)
    planned: bool = say("whether it is maintenance that was planned", False)
    how: str = say("what it does: stop the job, hang it, corrupt it silently, or slow it for a while", "stop",
                   must=("stop", "hang", "corrupt", "slow"))  # fmt: skip
    silent: bool = say("whether a stop shows only in heartbeats that stay away, as a lost server's, and not in an exit", False)
    shape: float = say("Weibull shape of the time between failures: 1 = no memory, below 1 = the young fail most", 1.0, must=POSITIVE)
    blast: int = say("neighbouring servers that fall together; a server's own rate stays", 1, must=POSITIVE)
    notice: Seconds = say("warning before it strikes, as of spot instances: long enough, the job saves first", "0 s", must=NOT_NEGATIVE)
    factor: float = say("slow: time of a step over the usual", 1.0, must=POSITIVE)
    lasts: Lasting = say("slow: for how long", "1 h")


@dataclass(kw_only=True)
class Spikes(Node):
    """Loss spikes: the run goes back to a checkpoint before it and takes other data."""

    every: float = say("mean steps from one loss spike to the next; 0 = none", 0.0, must=NOT_NEGATIVE)
    rewind: int = say("least steps before the spike at which the run starts again", 100, must=NOT_NEGATIVE)
    answer: str = say("real: what a spike or a NaN is answered with: none (a NaN ends the run), skip the step, lower the learning rate "
                      "as well, or rollback", "none", must=("none", "skip", "lower", "rollback"))  # fmt: skip
    window: int = say("real: accepted steps whose median a step is held against", 128, must=POSITIVE)
    threshold: float = say("real: how far above it a step is a spike, in standard deviations taken from the median absolute deviation",
                           8.0, must=POSITIVE)  # fmt: skip
    cut: float = say("real: factor of the learning rate where it is lowered", 0.5, must=SHARE)
    skip: int = say("real: steps of data passed over after a rollback", 200, must=NOT_NEGATIVE)
    budget: int = say("real: most answers in one run before it ends", 10, must=POSITIVE)


@dataclass(kw_only=True)
class Failures(Node):
    """What strikes, and the way back up: detect → abort → diagnose → reallocate (or queue) → init → load → replay."""

    causes: dict[str, Cause] = say("rate of each cause that stops the job")
    detect: Lasting = say("time to notice that a process has ended", must=NOT_NEGATIVE)
    heartbeat: Optional[Lasting] = say("time to notice that heartbeats stay away; null = as detect", None, must=NOT_NEGATIVE)
    timeout: Lasting = say("time after which a hanging collective is given up (torch's NCCL: 10 min)", "10 min", must=NOT_NEGATIVE)
    start_timeout: Seconds = say("real: time after which a start with its first step, a load or a save is given up",
                                 "30 min", must=POSITIVE)  # fmt: skip
    grace: Seconds = say("real: time to save and end after SIGTERM or SIGUSR1, before the ranks are killed", "1 min", must=POSITIVE)
    retries: int = say("real: restarts in a row without a new checkpoint before the run gives up", 10, must=POSITIVE)
    backoff: Seconds = say("real: pause before the second of such restarts, twice as long before each further one", "1 s",
                           must=NOT_NEGATIVE)  # fmt: skip
    quarantine: int = say("real: failures in a row of one rank after which its device is left out until it is repaired; 0 = never", 3,
                          must=NOT_NEGATIVE)  # fmt: skip
    inject: bool = say("real: make the causes strike, for tests: kill, stop, corrupt and slow this run's own ranks", False)
    script: list[str] = say("real: faults to make at a step, as in ['kill rank=1 step=12 phase=backward']", list)
    score: Optional[Lasting] = say("time to find a slow server by its score and replace it; null = it is left alone", None,
                                   must=NOT_NEGATIVE)  # fmt: skip
    verify_every: int = say("real: steps between comparisons of the replicas' weights (mesh.dp_replicate); 0 = never", 0,
                            must=NOT_NEGATIVE)  # fmt: skip
    checksum: Lasting = say("time to find silent corruption, by checksums or a test of the devices", "1 d", must=NOT_NEGATIVE)
    abort: Lasting = say("time to end the processes that are left", "0 s", must=NOT_NEGATIVE)
    diagnose: Lasting = say("time to find the culprit", must=NOT_NEGATIVE)
    reallocate: Lasting = say("time to swap in a spare", must=NOT_NEGATIVE)
    boot: Lasting = say("time to boot a cold spare", "15 min", must=NOT_NEGATIVE)
    init: Lasting = say("time to start all ranks", must=NOT_NEGATIVE)
    repair: Lasting = say("time until a failed server is a spare again", must=NOT_NEGATIVE)
    restart: str = say("who restarts: the whole job, or the replica (of mesh.dp_replicate) that a server belongs to", "job",
                       must=("job", "replica"))  # fmt: skip
    without_spare: str = say("wait for a repaired server, or shrink to the largest legal mesh until there is one", "wait",
                             must=("wait", "shrink"))  # fmt: skip
    frailty: float = say("variance of servers' own failure rates around their mean (gamma): above 0 some are lemons", 0.0,
                         must=NOT_NEGATIVE)  # fmt: skip
    lemons: float = say("share of servers that are lemons", 0.0, must=SHARE)
    lemon_factor: float = say("failure rate of a lemon over that of the others", 1.0, must=POSITIVE)
    infant: float = say("failure rate of new servers over that of old ones, for causes of shape 1", 1.0, must=POSITIVE)
    infant_span: Seconds = say("time in which that excess falls to 1/e", "30 d", must=POSITIVE)
    spikes: Spikes = say("loss spikes", Spikes)
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Limit(Node):
    """A stretch of time in which the grid gives less: demand response, or a feed that is not ready yet."""

    start: Seconds = say("when it begins, after the start of the run", must=NOT_NEGATIVE)
    length: Seconds = say("how long it lasts", must=POSITIVE)
    most: Watts = say("most power at the building's meter meanwhile", must=POSITIVE)
    answer: str = say("cap (limit every device), shrink (fewer data-parallel groups, the others idle) or pause (save, stop, start again)",
                      "cap", must=("cap", "shrink", "pause"))  # fmt: skip


@dataclass(kw_only=True)
class Power(Node):
    """Draw of a device in each state as a share of the way from idle to its limit, and what surrounds it."""

    compute: float = say("share in matrix products and attention; above 1 where they would draw more than the limit", must=NOT_NEGATIVE)
    memory: float = say("share in kernels that only move tensors, and in the optimizer", 0.6, must=SHARE)
    communication: float = say("share while waiting for a collective (NCCL spins)", must=SHARE)
    bubble: float = say("share in a pipeline bubble, and while kernels wait for the host", must=SHARE)
    hang: float = say("share until a fault is noticed: ranks spin in a collective that never ends", 0.4, must=SHARE)
    other: float = say("share in every other state in which ranks live", must=SHARE)
    cap: Optional[Watts] = say("power limit set on every device, which slows its arithmetic; null = the device's own", None, must=POSITIVE)
    host: Watts = say("power of a loaded server without its devices: CPUs, memory, NICs, switches of its fast link, fans, power supplies",
                      must=NOT_NEGATIVE)  # fmt: skip
    host_idle: Optional[Watts] = say("the same of an idle server, between them in proportion to the devices' draw; null = host", None,
                                     must=NOT_NEGATIVE)  # fmt: skip
    network: Watts = say("power of the switches between servers, for each server", "0 W", must=NOT_NEGATIVE)
    storage: Watts = say("power of the storage that serves the run", "0 W", must=NOT_NEGATIVE)
    pue: float = say("power usage effectiveness of the building; with pue_fixed its part that follows the load")
    pue_fixed: float = say("overhead that does not follow the load, as a share of the loaded servers' power: PUE = pue + pue_fixed / load",
                           0.0, must=NOT_NEGATIVE)  # fmt: skip
    water_site: Litres = say("water that cooling evaporates, per energy of the servers, where grid.water is of generation alone", "0 L/kWh",
                             must=NOT_NEGATIVE)  # fmt: skip
    limits: dict[str, Limit] = say("grid limits and demand response, by name", dict)
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Grid(Node):
    name: str = say("region")
    year: int = say("year of the intensity")
    intensity: Intensity = say("yearly mean, location-based", must=NOT_NEGATIVE)
    market: Optional[Intensity] = say("market-based intensity after contracts; null = as location", must=NOT_NEGATIVE)
    profile: Optional[list[list[float]]] = say("12 months × 24 hours (UTC) relative to the yearly mean; null = flat")
    hourly: Optional[str] = say("CSV file of hourly intensities [gCO2e/kWh] of the year, in UTC, instead of mean and profile", None)
    region: Optional[str] = say("column of that file; null where it has one", None)
    fill: bool = say("whether hours that the file lacks are interpolated, instead of refused", False)
    deadline: Optional[str] = say("date and hour (UTC) by which the run must have ended; null = none", None)
    shift: str = say("what the time left until then is for: none, start (begin in the cleanest window) or pause (in the dirtiest hours)",
                     "none", must=("none", "start", "pause"))  # fmt: skip
    water: Litres = say("water per energy used: of generation, and of the site unless power.water_site says it", must=NOT_NEGATIVE)
    source: str = say("where the numbers come from")


@dataclass(kw_only=True)
class Offer(Node):
    low: DollarsPerHour = say("cheapest price of a device-hour", must=NOT_NEGATIVE)
    mid: DollarsPerHour = say("price of a device-hour used for the cost", must=NOT_NEGATIVE)
    high: DollarsPerHour = say("dearest price of a device-hour", must=NOT_NEGATIVE)


@dataclass(kw_only=True)
class StoragePrice(Node):
    low: DollarsPerByteTime = say("cheapest price of stored data", "0 USD/GB/month", must=NOT_NEGATIVE)
    mid: DollarsPerByteTime = say("price of stored data used for the cost", "0 USD/GB/month", must=NOT_NEGATIVE)
    high: DollarsPerByteTime = say("dearest price of stored data", "0 USD/GB/month", must=NOT_NEGATIVE)


@dataclass(kw_only=True)
class EgressPrice(Node):
    low: DollarsPerByte = say("cheapest price of data taken out", "0 USD/GB", must=NOT_NEGATIVE)
    mid: DollarsPerByte = say("price of data taken out used for the cost", "0 USD/GB", must=NOT_NEGATIVE)
    high: DollarsPerByte = say("dearest price of data taken out", "0 USD/GB", must=NOT_NEGATIVE)


@dataclass(kw_only=True)
class Tariff(Node):
    low: DollarsPerEnergy = say("cheapest electricity", "0.06 USD/kWh", must=NOT_NEGATIVE)
    mid: DollarsPerEnergy = say("electricity used for the cost", "0.08 USD/kWh", must=NOT_NEGATIVE)
    high: DollarsPerEnergy = say("dearest electricity", "0.25 USD/kWh", must=NOT_NEGATIVE)


@dataclass(kw_only=True)
class Price(Node):
    as_of: str = say("date of the prices")
    gpu_hours: dict[str, Offer] = say("price of an hour of each device")
    unbilled: Optional[list[str]] = say(
        "states whose device-hours the provider does not bill, as time lost to its faults; null = none", None
    )
    storage: StoragePrice = say("price of data kept: the checkpoints that are kept at once, and the corpus", StoragePrice)
    egress: EgressPrice = say("price of data taken out of the cluster", EgressPrice)
    taken: Bytes = say("data taken out in the end, such as the model", "0 B", must=NOT_NEGATIVE)
    owned: bool = say("whether devices are owned, and paid by wear and electricity, instead of rented by the hour", False)
    capex: dict[str, float] = say("price to buy each device with its share of server, network and building [USD]", dict)
    tariff: Tariff = say("price of electricity, where devices are owned", Tariff)
    hours: Optional[list[float]] = say("24 hours (UTC) of the tariff relative to its mean; null = flat", None)
    embodied: dict[str, float] = say("embodied carbon of each device with its share of the server [kgCO2e]")
    lifetime: Seconds = say("service life over which embodied carbon and capex are spread", must=POSITIVE)
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
class Finetune(Node):
    """Supervised fine-tuning of the model that pre-training, or `start`, leaves; with method none the stage is off."""

    method: str = say(
        "none = no fine-tuning; full = every parameter; lora = adapters on a frozen base; qlora = on one in 4 bits",
        must=("none", "full", "lora", "qlora"),
    )
    data: Optional[str] = say(
        "JSON Lines file of conversations: messages, or prompt and completion, or question and answer; digits = our own task"
    )
    template: str = say("how a conversation becomes text: plain, chatml, llama3, or a file of a Jinja chat template")
    held_out: float = say("share of conversations kept for evaluation", must=SHARE)
    steps: int = say("optimizer steps", must=POSITIVE)
    seq_len: int = say("tokens of a sequence that conversations are packed into; longer ones are cut", must=POSITIVE)
    global_batch: int = say("sequences of a step", must=POSITIVE)
    micro_batch: int = say("sequences a rank works on at once", must=POSITIVE)
    learning_rate: float = say("highest learning rate", must=POSITIVE)
    warmup: int = say("steps until it is reached", must=NOT_NEGATIVE)
    rank: int = say("rank r of the adapters", must=POSITIVE)
    alpha: float = say("adapters are scaled by alpha / rank", must=POSITIVE)
    targets: list[str] = say("matrices of every block that get adapters, by their names, as in [q_proj,v_proj]")
    source: str = say("where the numbers come from")

    @property
    def adapters(self) -> bool:
        return self.method in ("lora", "qlora")


@dataclass(kw_only=True)
class Fact(Node):
    """What a publication reports of a run."""

    value: str = say("the quantity with its unit; a bound starts with < or >")
    source: str = say("where it was published")


@dataclass(kw_only=True)
class Plan(Node):
    seed: int = say("seed of everything random")
    start: str = say("date and hour (UTC) at which the run starts")
    profile: Optional[str] = say("file of measured rates (foretold analysis calibrate writes it); null = the gpu's table")
    gpu: Gpu = say("the device", Gpu)
    cluster: Cluster = say("the machines", Cluster)
    model: Model = say("the model", Model)
    crawl: Crawl = say("the crawl", Crawl)
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
    finetune: Finetune = say("the fine-tuning", Finetune)
    align: Align = say("the alignment", Align)
    published: dict[str, Fact] = say("published values of the run's quantities; no part of the id", dict)

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

    def batch(self, step: int) -> int:
        """Sequences of step 0, 1, …: global_batch, or less while the batch warms up.

        A function of the step alone, so that the order of the data is the same on every mesh.
        """
        train = self.train
        if train.first_batch is None or step >= train.batch_warmup:
            return train.global_batch
        levels = train.global_batch // train.first_batch
        return train.first_batch * (1 + step * levels // train.batch_warmup)

    @cached_property
    def _warming(self) -> list[int]:
        """Sequences seen before each step of the warm-up, and before the first step after it."""
        return [0, *accumulate(self.batch(step) for step in range(self.train.batch_warmup if self.train.first_batch else 0))]

    def samples(self, step: int) -> int:
        """Sequences that the first `step` optimizer steps have seen: the data cursor."""
        beyond = max(0, step - (len(self._warming) - 1))
        return self._warming[step - beyond] + beyond * self.train.global_batch

    def step_of(self, samples: int) -> int | None:
        """The step before which so many sequences have been seen, None where that is inside a step."""
        if samples <= self._warming[-1]:
            return self._warming.index(samples) if samples in self._warming else None
        step, rest = divmod(samples - self._warming[-1], self.train.global_batch)
        return None if rest else len(self._warming) - 1 + step

    @cached_property
    def tuned(self) -> "Plan":
        """The plan whose training is this one's fine-tuning: its own steps, batch and rate on whole conversations, and the same mesh."""
        own = ("steps", "seq_len", "global_batch", "micro_batch", "learning_rate", "warmup")
        said: dict[str, Any] = {name: getattr(self.finetune, name) for name in own}
        said |= {"packing": "best_fit", "document_mask": True, "first_batch": None, "stop_after": None}
        train = dataclasses.replace(self.train, **said)
        data, failures = dataclasses.replace(self.data, mixture=[]), dataclasses.replace(self.failures, script=[])
        return dataclasses.replace(self, train=train, data=data, failures=failures)

    @cached_property
    def roles(self) -> Roles:
        """Which ranks hold which role of the alignment."""
        return roles(self.align, self.ranks)

    @cached_property
    def aligned(self) -> "Plan":
        """The plan whose training is this one's alignment: a sequence a row, on the trainers' part of the mesh, and adapters as the
        alignment has them."""
        align, count = self.align, len(self.roles.trainers)
        said: dict[str, Any] = {"steps": align.steps * (align.updates if align.rollouts else 1), "seq_len": align.longest,
                "global_batch": align.sequences // (align.updates if align.rollouts else 1), "micro_batch": align.micro_batch,
                "learning_rate": align.learning_rate, "warmup": align.warmup, "packing": "stream", "document_mask": False,
                "first_batch": None, "stop_after": None}  # fmt: skip
        mesh = self.mesh
        if count != self.ranks:
            shards = max(1, count // (mesh.cp * mesh.tp * mesh.pp))
            mesh = dataclasses.replace(mesh, dp_replicate=1, dp_shard=shards)
        cluster = self.cluster.part(count)
        method = "lora" if align.adapters else "full"
        tune = dataclasses.replace(self.finetune, method=method, rank=align.rank, alpha=align.alpha, targets=align.targets)
        train, failures = dataclasses.replace(self.train, **said), dataclasses.replace(self.failures, script=[])
        data = dataclasses.replace(self.data, mixture=[])
        return dataclasses.replace(self, train=train, data=data, failures=failures, mesh=mesh, cluster=cluster, finetune=tune)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.train.seq_len

    @cached_property
    def id(self) -> str:
        """Digest of every value, the content of profile, hours and lengths included; it starts with a letter, so no tool reads a number."""
        values = dataclasses.asdict(self)
        del values["published"]
        if not self.crawl.seeds:
            del values["crawl"]  # what is off changes nothing
        if self.finetune.method == "none":
            del values["finetune"]
        if self.align.method == "none":
            del values["align"]
        elif self.align.lengths:
            values["align"]["lengths"] = digest(file_of(self.align.lengths)[0]) + file_of(self.align.lengths)[1]
        else:
            del values["align"]["lengths"]
        values["profile"] = digest(Path(self.profile)) if self.profile else None
        values["grid"]["hourly"] = digest(Path(self.grid.hourly)) if self.grid.hourly else None
        text = json.dumps(values, sort_keys=True)
        return "p" + hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
