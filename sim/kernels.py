"""Time of an operation: launches, arithmetic and memory traffic, each at the rate its device was measured at.

    seconds = launches × launch + max(f, b) + (1 − overlap) min(f, b),   f = FLOPs / rate,  b = bytes / bandwidth

With overlap 1 this is the roofline (Williams, Waterman and Patterson 2009), with 0 the sum, as on one CPU thread.

On a device of many units (the SMs of a GPU) a matrix product is cut into tiles, as many at a time as there are units: of a
last wave that is not full half of the empty places are paid for, small tiles reload their operands more often, and every
tile fills and drains its pipeline once:

    f = min over tile shapes (a, b) of  waves × 2 a b (k + depth) / (rate / units × e(a b / (a + b)))

with waves = max(1, (w + ceil w) / 2), w = ceil(m / a) ceil(n / b) matrices / units, and e(i) = (i / (i + half)) / (i₀ / (i₀ +
half)), i₀ that of the largest tile. The kernel library's choice of tile is taken to be the best one. Causal attention is as
long as its rows of blocks spread evenly, or as its longest row, √(even² + longest²) where the two are near; its softmax works on
every score once, whatever the width of a head, and takes the time of so much more width. A product whose rows do not begin at
multiples of 16 bytes cannot be fetched by the tensor memory engine and has slower kernels. Everything takes arrays over plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from conf.plan import Plan, digest
from conf.profile import Parameter, read_profile

Array: TypeAlias = NDArray[np.float64]

# kind.stage: (kernels launched, tensor passes over memory), counted in the trainer's eager code
TRAFFIC = {
    "norm.forward": (1, 2), "norm.backward": (2, 5),
    "rotary.forward": (6, 11), "rotary.backward": (6, 11),
    "swiglu.forward": (2, 5), "swiglu.backward": (4, 9),
    "gelu.forward": (1, 2), "gelu.backward": (1, 3),
    "scores.forward": (3, 6), "scores.backward": (3, 8),
    "quantise.forward": (1, 1.5), "quantise.backward": (2, 3),  # 2 bytes read, 1 written; backward transposed too
    "permute.forward": (4, 4), "permute.backward": (4, 4),
    "add.forward": (1, 3), "add.backward": (0, 0),
    "loss.forward": (2, 4), "loss.backward": (2, 4),
    "embedding.forward": (1, 2), "embedding.backward": (2, 3),
    "optimizer.step": (0, 8),
    "dequantise.forward": (6, 5), "dequantise.backward": (6, 5),  # of a number's fp32, from 4 bits (real/nf4.py)
}  # fmt: skip
# tensor passes of the same in fused kernels: what must be read and written once; of scores with dropout and its mask, which the
# code had that kept them
FUSED = {
    "norm.forward": 2, "norm.backward": 3, "rotary.forward": 2, "rotary.backward": 2, "swiglu.forward": 3, "swiglu.backward": 5,
    "gelu.forward": 2, "gelu.backward": 3, "scores.forward": 6.5, "scores.backward": 9.5, "permute.forward": 2, "permute.backward": 2,
    "loss.forward": 2, "loss.backward": 2,
}  # fmt: skip
KINDS = (*(f"{kind}.{stage}" for kind in ("matmul", "attention") for stage in ("forward", "backward")), *TRAFFIC)


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device and its machine, by name as in a profile; SI."""

    rate: dict[str, float]  # FLOP/s of each kind and stage
    bandwidth: dict[str, float]  # B/s of each kind and stage
    launch: float
    host: float  # s that the host takes to launch a kernel: a block is never faster than its launches
    units: float  # that work at the same time; nan where tiles are not modelled (measured rates hold their cost)
    gemm_depth: float  # of k that filling and draining a tile costs
    gemm_odd: float  # rate of products with rows that are not aligned over that of others
    attention_head: float  # width of a head that softmax takes the time of
    gemm_half: float  # intensity, a b / (a + b), at which a tile runs at half of an endless one's rate
    grouped: float  # rate of grouped products over that of single ones
    burst: float  # by how much products of a moment are faster than those of a training, which runs at its power limit
    grouped_alone: float  # the same of grouped products that are measured by themselves
    alone: float  # speed of kernels that are measured one by one over that in a training
    overlap: float
    composition: float  # time of operations in a row over the sum of their times alone
    glue: float  # s that a block's forward or backward takes besides its operations
    optimizer_tensor: float  # s that the optimizer takes for each parameter tensor, whatever its size
    tensor_overlap: float  # share of tensor-parallel traffic hidden behind the products around it in fused code
    spread: float  # standard deviation of speed among devices
    slowdown: float  # of kernels by the traffic beside them, as a share of its time
    jitter: float  # coefficient of variation of a block's time
    latency: dict[str, float]  # s a hop of each collective inside a server
    link: dict[str, float]  # B/s of each collective inside a server
    start: float  # s that any collective takes to start
    nvls: float  # B/s at which the switches of a domain reduce, 0 where they cannot
    nic: float  # fraction of the network's bandwidth that collectives reach
    shard_unit: float  # s that sharding adds to a unit's forward and backward
    shard_copy: float  # B/s of copying a unit's parameters and gradients
    error: float  # standard deviations of log(predicted / measured): of dense models,
    mixture_error: float  # of mixtures of experts,
    host_error: float  # and what is added, in squares, where blocks wait for the host
    extract_rate: float
    extract_start: float  # s by which a worker's first task is longer than those behind it
    dedup_rate: float
    dedup_start: float
    substring_rate: float
    train_rate: float
    encode_rate: float
    encode_start: float
    snapshot: float  # B/s at which a state is copied aside
    storage_write: float
    storage_read: float
    save_start: float  # s that a save takes whatever it holds,
    save_tensor: float  # and for each tensor in it
    load_start: float  # the same of a load
    load_tensor: float
    init: float  # s to start the ranks
    workers: float  # s to start the workers of the data stages


TILES = ((256, 128), (128, 256), (128, 128))  # rows and columns, largest first
ROWS = 128  # queries that a unit attends for at a time (FlashAttention-2 and later)
ALIGNED = 8  # elements of 2 bytes in the 16 bytes at whose multiples a row is to begin
LOOSE = ("embedding", "optimizer", "dequantise")  # what compiling a block leaves as it is
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def rates(plan: Plan) -> Rates:
    """The rates that a plan is predicted with."""
    return given(plan, _profile(plan))


def measured(plan: Plan) -> Plan:
    """The plan with what its profile says of its device, and of the power that it draws, in place of the tables' numbers."""
    return _replaced(plan, _profile(plan))


def _profile(plan: Plan) -> Mapping[str, Parameter]:
    return _read(plan.profile, digest(Path(plan.profile))) if plan.profile else {}


def _replaced(plan: Plan, found: Mapping[str, Parameter]) -> Plan:
    """The plan with the parameters that bear the name of a number of its gpu, or of its power."""
    gpu = {f"gpu.{name}": p.value for name, p in found.items() if name in plan.gpu.__dataclass_fields__}
    power = {name: p.value for name, p in found.items() if name.startswith("power.")}
    return plan.but(**gpu, **power) if gpu or power else plan


def given(plan: Plan, found: Mapping[str, Parameter]) -> Rates:
    """Measured rates where there are any, those of the gpu's and the other groups' tables otherwise."""

    def pick(name: str, default: float) -> float:
        return found[name].value if name in found else default

    plan = _replaced(plan, found)
    gpu = plan.gpu
    precision = plan.train.precision
    narrow = precision in ("fp8", "fp4")  # attention stays in bf16
    clock = throttle(plan) * (gpu.early_gemm if gpu.early else 1.0)
    matmul = clock * (gpu.peak(precision) or gpu.fp32_peak) * (gpu.narrow_efficiency if narrow else gpu.gemm_efficiency)
    wide = clock * (gpu.peak("bf16" if narrow else precision) or gpu.fp32_peak) * gpu.gemm_efficiency
    memory = gpu.memory_bandwidth * gpu.memory_efficiency
    kernel = 1.0 if plan.train.compile else gpu.eager_attention
    default = {
        "matmul.forward": matmul,
        "matmul.backward": matmul * gpu.gemm_backward,
        "attention.forward": wide * gpu.attention_efficiency * kernel,
        "attention.backward": wide * gpu.attention_backward * kernel,
    }
    tiled = gpu.units is not None and "matmul.forward.rate" not in found
    fused = tiled and plan.train.compile  # a profile has the rates of eager kernels
    return Rates(
        rate={k: pick(f"{k}.rate", default.get(k, np.inf)) for k in KINDS},
        bandwidth={k: memory if fused and k.split(".")[0] not in LOOSE else pick(f"{k}.bandwidth", memory) for k in KINDS},
        launch=pick("launch", gpu.launch),
        host=gpu.host_launch if tiled else 0.0,
        units=float(gpu.units or 0) if tiled else np.nan,
        gemm_depth=gpu.gemm_depth,
        gemm_odd=gpu.gemm_odd,
        attention_head=gpu.attention_head,
        gemm_half=gpu.gemm_half,
        grouped=gpu.grouped_efficiency,
        burst=gpu.burst,
        grouped_alone=gpu.grouped_alone,
        alone=gpu.alone,
        overlap=gpu.overlap,
        composition=pick("composition", 1.0),
        glue=pick("glue", 0.0),
        optimizer_tensor=pick("optimizer_tensor", gpu.launch),
        tensor_overlap=gpu.tensor_overlap,
        spread=gpu.spread if tiled else 0.0,
        slowdown=gpu.slowdown,
        jitter=pick("jitter", 0.0),
        latency={c: pick(f"{c}.latency", gpu.link_latency) for c in COLLECTIVES},
        link={c: pick(f"{c}.bandwidth", gpu.link_efficiency * gpu.link_bandwidth / 8) for c in COLLECTIVES},
        start=gpu.link_start if tiled else 0.0,
        nvls=gpu.nvls * gpu.link_bandwidth / 8,
        nic=gpu.nic_efficiency,
        shard_unit=pick("shard_unit.latency", 0.0),
        shard_copy=pick("shard_unit.bandwidth", memory),
        error=gpu.error,
        mixture_error=gpu.mixture_error,
        host_error=gpu.host_error if tiled else 0.0,
        extract_rate=pick("extract_rate", plan.data.extract_rate),
        extract_start=pick("extract_start", 0.0),
        dedup_rate=pick("dedup_rate", plan.data.dedup_rate),
        dedup_start=pick("dedup_start", 0.0),
        substring_rate=pick("substring_rate", plan.data.substring_rate),
        train_rate=pick("train_rate", plan.tokenizer.train_rate),
        encode_rate=pick("encode_rate", plan.tokenizer.encode_rate),
        encode_start=pick("encode_start", 0.0),
        snapshot=gpu.snapshot,
        storage_write=pick("storage_write", plan.cluster.storage_write),
        storage_read=pick("storage_read", plan.cluster.storage_read),
        **{name: pick(name, 0.0) for name in ("save_start", "save_tensor", "load_start", "load_tensor")},
        init=pick("init", plan.failures.init.mean),
        workers=pick("workers", 0.5 * plan.failures.init.mean),
    )


def throttle(plan: Plan) -> float:
    """Rate of arithmetic under the plan's power cap over that without one."""
    gpu, power = plan.gpu, plan.power
    natural = min(gpu.max_power, gpu.idle_power + power.compute * (gpu.max_power - gpu.idle_power))
    return 1.0 if power.cap is None else float(capped(power.cap, natural, gpu.cap_static * gpu.max_power, gpu.cap_exponent))


def capped(cap: Any, natural: Any, static: Any, exponent: Any) -> Array:
    """Rate under a cap over that at the natural draw, ((cap − static) / (natural − static))^(1 / exponent), watts.

    Fitted to the Zeus project's traces (You et al. 2023, NSDI) of V100, A40, RTX6000 and P100 under caps of a third to nine tenths of
    their limits by `foretold analysis caps`: mean errors of 3 to 7%, and of 3 to 14% on a GPU left out (LOG.md, 2026-11-25).
    No newer device was measured.

    >>> float(capped(150.0, 250.0, 50.0, 2.0).round(3))
    0.707
    """
    room = np.maximum(np.minimum(cap, natural) - static, 1e-3) / np.maximum(natural - static, 1e-3)
    return np.asarray(np.minimum(1.0, room) ** (1 / exponent))


@cache
def _read(path: str, content: str) -> dict[str, Parameter]:
    """Read once for each content."""
    return read_profile(Path(path)).parameters


class Device:
    """Rates of many plans as arrays."""

    def __init__(self, each: Sequence[Rates]) -> None:
        self.numbers: dict[str, Array] = {}
        for field in fields(Rates) if each else ():
            values = [getattr(r, field.name) for r in each]
            if isinstance(values[0], dict):
                self.numbers |= {f"{field.name}.{k}": np.array([v[k] for v in values]) for k in values[0]}
            else:
                self.numbers[field.name] = np.array(values)

    def __getitem__(self, name: str) -> Array:
        return self.numbers[name]

    def take(self, which: Any) -> "Device":
        """The devices of these entries, by index."""
        taken = Device([])
        taken.numbers = {name: values[which] for name, values in self.numbers.items()}
        return taken

    def seconds(self, work: "Work") -> Array:
        """Time of some work at this device's rates."""
        if work.products or work.chain is not None:
            return np.asarray(self.each([work])[0])
        return np.asarray(work.times * (work.launches * self["launch"] + work.bytes / self[f"bandwidth.{work.kind}"]))  # it only moves

    def each(self, works: Sequence["Work"], share: Sequence[Any] | None = None) -> Array:
        """Times of some works, or of a share of each, on a new first axis.

        Stacked, because a plan's sixty operations one by one spend more time in calls than in arithmetic.
        """
        rate, bandwidth, flops, size, launches, times = stacked(
            [self[f"rate.{work.kind}"] for work in works], [self[f"bandwidth.{work.kind}"] for work in works],
            [work.flops for work in works], [work.bytes for work in works], [work.launches for work in works],
            [work.times if share is None else work.times * share[place] for place, work in enumerate(works)],
        )  # fmt: skip
        arithmetic, memory = flops / rate, size / bandwidth
        if np.isfinite(self["units"]).any():
            arithmetic = self._in_units(works, arithmetic)
        hidden = self["overlap"] * np.minimum(arithmetic, memory)
        return np.asarray(times * (launches * self["launch"] + arithmetic + memory - hidden))

    def _in_units(self, works: Sequence["Work"], plain: Array) -> Array:
        """Arithmetic where a device has units: products in waves, attention with its longest row, the others plain."""
        tiled = np.isfinite(self["units"])
        spent = list(plain)
        found = [(place, product) for place, work in enumerate(works) for product in work.products]
        if found:
            tiles = self._tiles([product for _, product in found], [self[f"rate.{works[place].kind}"] for place, _ in found])
            for place in {place for place, _ in found}:
                whole = sum(tile for (where, _), tile in zip(found, tiles, strict=True) if where == place)
                spent[place] = np.where(tiled, whole, spent[place])
        for place, work in enumerate(works):
            if work.chain is not None:
                longest = np.where(tiled, work.chain * self["units"] / self[f"rate.{work.kind}"], 0.0)
                softmax = 1 + self["attention_head"] / np.maximum(work.head, 1)
                spent[place] = softmax * np.hypot(spent[place], longest)
        return stacked(spent)[0]

    def _tiles(self, products: Sequence["Product"], rates: Sequence[Array]) -> Array:
        """Arithmetic of products, each in waves of its best tiles."""
        columns = [[getattr(product, name) for product in products] for name in ("m", "n", "k", "matrices")]
        unequal = bool((self["gemm_odd"] != 1).any())
        m, n, k, matrices, rate, odd = stacked(*columns, rates, [unequal and product.odd for product in products])
        each, half, best = matrices / self["units"], self["gemm_half"], None
        for a, b in TILES:
            waves = np.ceil(m / a) * np.ceil(n / b) * each
            cost = np.ceil(waves)  # in place: these are the largest arrays of a step
            cost += waves
            np.maximum(cost, 2.0, out=cost)
            cost *= a * b + (a + b) * half  # a b / e, but for what all tiles have in common
            best = cost if best is None else np.minimum(best, cost, out=best)
        largest = np.prod(TILES[0]) / np.sum(TILES[0])
        best = best * (0.5 * largest / (largest + half))
        grouped = np.where(matrices > 1, self["grouped"], 1.0)
        rate = rate * np.where(odd > 0, self["gemm_odd"], 1.0)
        return np.asarray(2 * best * (k + self["gemm_depth"]) * (k > 0) / (rate / self["units"] * grouped))


def some(numbers: Any) -> bool:
    """Whether any of some numbers, or the one that all plans have, is not zero."""
    return bool(numbers.any() if isinstance(numbers, np.ndarray) else numbers)


def stacked(*columns: Sequence[Any]) -> list[Array]:
    """Each column's arrays and numbers along a new first axis, in shapes that broadcast (np.stack takes only equal ones)."""
    shapes = [np.broadcast_shapes(*{getattr(value, "shape", ()) for value in column}) for column in columns]
    depth = max(map(len, shapes))
    arrays = [np.empty((len(column), *[1] * (depth - len(shape)), *shape)) for column, shape in zip(columns, shapes, strict=True)]
    for array, column in zip(arrays, columns, strict=True):
        for place, value in enumerate(column):
            array[place] = value
    return arrays


@dataclass(slots=True)
class Product:
    """A matrix product [m, k] × [k, n], or as many at once with m rows each; arrays over plans, or numbers.

    Of one of tokens the rows in memory are n or k long; of a weight's gradient, which is summed over the tokens, m or n.
    """

    m: Any
    n: Any
    k: Any
    matrices: Any = 1
    summed: bool = False

    @property
    def odd(self) -> Any:
        """Whether its rows do not begin at multiples of 16 bytes."""
        return np.asarray(self.n % ALIGNED > 0) | np.asarray((self.m if self.summed else self.k) % ALIGNED > 0)

    def sizes(self) -> dict[str, Any]:
        """What is held against a calibrated range: m, n and k, or the tokens of an expert."""
        single = np.all(np.asarray(self.matrices) == 1)
        return {"m": self.m, "n": self.n, "k": self.k} if single else {"expert": np.minimum(self.m, self.k)}


@dataclass(slots=True)
class Work:
    """What an operation asks of a device; arrays over plans, or numbers."""

    kind: str  # kind.stage
    flops: Any
    bytes: Any
    launches: Any
    products: tuple[Product, ...] = ()
    chain: Any = None  # FLOPs of the longest row, which is one unit's
    head: Any = 0  # width of its heads
    times: Any = 1
    fused: float = 1.0  # share of the bytes that fused code moves
    trained: bool = False  # whether its weights are trained beside frozen ones

    @property
    def single(self) -> bool:
        """Whether it is a kernel of its own, which nothing fuses: a product or attention."""
        return bool(self.products) or self.chain is not None

    def __mul__(self, times: Any) -> "Work":
        return replace(self, times=self.times * times)


def matmul(m: Any, n: Any, k: Any, size: Any, stage: str, matrices: Any = 1, launches: Any = 1) -> Work:
    """[m, k] × [k, n], with the rows of m spread over so many matrices in one grouped product of so many launches; backward is the
    two products for the input's and the weight's gradient."""
    rows = m / np.maximum(matrices, 1)
    products = (
        (Product(rows, n, k, matrices),) if stage == "forward" else (Product(rows, k, n, matrices), Product(n, k, rows, matrices, True))
    )
    count = len(products)
    return Work(f"matmul.{stage}", count * 2 * m * n * k, count * (m * k + matrices * n * k + m * n) * size, count * launches, products)


def attention(tokens: Any, seq: Any, width: Any, size: Any, stage: str, head: Any = 0) -> Work:
    """Causal attention of sequences of `seq` tokens: forward 2 t s w, backward 2.5 times that (Dao 2023, FlashAttention-2).

    Its traffic also stands for the tiles on the diagonal, whose masked half is computed: both grow with t w. The last ROWS
    queries of a head look at the whole sequence, and one unit computes them.
    """
    factor = 1.0 if stage == "forward" else 2.5
    chain = factor * 4 * ROWS * seq * head
    return Work(f"attention.{stage}", factor * 2 * tokens * seq * width, factor * 4 * tokens * width * size, 2, chain=chain, head=head)


def outside(plan: Plan, works: Sequence[Work]) -> list[str]:
    """What of a plan's products and attention lies outside the range in which its device's kernels were measured.

    Empty where nothing was, as of a device without such measurements: its rates come from whole steps.
    """
    sizes: dict[str, set[int]] = {"seq": {plan.train.seq_len}, "head": {plan.model.head_dim}}
    for product in (product for work in works if np.any(work.times) for product in work.products):
        for name, size in product.sizes().items():
            sizes.setdefault(name, set()).update(np.ravel(size).astype(int).tolist())
    return beyond(plan, sizes)


def beyond(plan: Plan, sizes: Mapping[str, set[int]]) -> list[str]:
    """The same of some sizes, by their name in the device's table."""
    told = []
    for name, (least, most) in (plan.gpu.calibrated or {}).items():
        out = sorted(size for size in sizes.get(name, ()) if not least <= size <= most)
        told += [f"{name}={', '.join(map(str, out))} (measured {least} to {most})"] if out else []
    return told


def moved(kind: str, elements: Any, size: Any, stage: str) -> Work:
    """An operation that only moves tensors of so many elements."""
    name = f"{kind}.{stage}"
    launches, passes = TRAFFIC[name]
    return Work(name, 0.0 * elements, passes * elements * size, launches, fused=FUSED.get(name, passes) / max(passes, 1))
