"""Bytes on each pipeline rank's devices, part by part, at the moments of a step when most is held.

A step is a tide: activations rise with the forward passes in flight and fall with the backward ones, while gradients rise. Which
moment is the highest depends on the plan, so each that can be is added up, on the first, the second and the last rank of the pipeline
(which stands for those between), and the fullest counts. What FSDP2 holds unsharded, and what torch's pipeline stages
receive into, is counted from the trainer's own code; with ZeRO below 3 from Megatron's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from conf.arithmetic import expert_layers, parameters, routed_parameters
from sim.activations import FP32, blocks
from sim.kernels import Array

USABLE = 0.94  # of a device's memory that a run can use: the rest is the driver's, NCCL's, and holes
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes a number in four bits with double quantisation (QLoRA, section 3)
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "muon": 4.0}  # bytes a parameter; 8 bits have a scale a block of 256
PARTS = ("activations", "working", "logits", "experts", "messages", "gathered", "gradients", "state")  # said in conf.record
Moment: TypeAlias = dict[str, Any]  # bytes by part; a part that is not there is 0


@dataclass(frozen=True)
class Kind:
    """The moments of the plans that shard as `mine` says, each with its pipeline rank."""

    mine: Array
    moments: list[tuple[Array, Moment]]

    def most(self) -> Array:
        """The state is the one part that depends on the shards: what moments hold besides it is compared before it is added."""
        groups: dict[int, list[Moment]] = {}
        for _, moment in self.moments:
            groups.setdefault(id(moment["state"]), []).append(moment)
        return reduce(np.maximum, (reduce(np.maximum, map(_besides, same)) + same[0]["state"] for same in groups.values()))


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline rank at the fullest moment, one entry a plan."""

    kinds: list[Kind]

    @cached_property
    def total(self) -> Array:
        return self._of(Kind.most)

    @cached_property
    def rank(self) -> Array:
        """The pipeline rank that is the fullest."""
        return self._fullest(lambda rank, _: rank)

    def part(self, name: str) -> Array:
        """One of PARTS; they add up to the total."""
        return self._fullest(lambda _, moment: moment.get(name, 0.0))

    def of_rank(self, rank: int) -> Array:
        """The most on one pipeline rank: the first, the second or the last."""
        return self._of(lambda kind: reduce(np.maximum, (np.where(at == rank, _whole(moment), 0.0) for at, moment in kind.moments)))

    def _fullest(self, pick: Callable[[Array, Moment], Any]) -> Array:
        def of(kind: Kind) -> Array:
            found: Any = 0.0
            for rank, moment in kind.moments:
                found = np.where(_whole(moment) == self.total, pick(rank, moment), found)
            return np.asarray(found)

        return self._of(of)

    def _of(self, tell: Callable[[Kind], Array]) -> Array:
        return np.asarray(reduce(lambda found, kind: np.where(kind.mine, tell(kind), found), self.kinds[1:], tell(self.kinds[0])))


def _besides(moment: Moment) -> Any:
    return sum(value for part, value in moment.items() if part != "state")


def _whole(moment: Moment) -> Any:
    return _besides(moment) + moment["state"]


def held(p: Any) -> Array:
    """Parameters of the fullest tensor-, expert- and pipeline-parallel rank: what it would hold without sharding.

    Leading dense layers leave more of the mixtures to the other stages.
    """
    routed = routed_parameters(p)
    stage = np.minimum(1.0, p.layers / p.pp / np.maximum(expert_layers(p), 1))
    return np.asarray((parameters(p) - routed) / p.tp / p.pp + routed / p.ep / p.etp * stage)


def adapters_held(p: Any) -> Any:
    """Parameters of adapters on a tensor- and pipeline-parallel rank."""
    return sum(p.rank * (inputs + outputs) * count for inputs, outputs, count in p.thin) * p.layers / p.pp


def memory(p: Any) -> Memory:
    """Memory of each plan; `p` holds the plans' values as arrays that broadcast (see sim.parallel)."""
    kinds = []
    for moments, mine in ((_sharded, np.equal(p.zero, 3)), (_megatron, np.less(p.zero, 3))):
        if np.any(mine):
            block, found = blocks(p, moments is _sharded), []
            for rank in [0.0] + [1.0] * bool(np.any(np.greater(p.pp, 2))) + [p.pp - 1.0] * bool(np.any(np.greater(p.pp, 1))):
                stage = _stage(p, block, np.minimum(rank, p.pp - 1.0), moments is _sharded)
                found += [(stage.rank, {"messages": stage.messages} | moment) for moment in _untrained(p, moments(p, block, stage))]
            kinds.append(Kind(mine, found))
    return Memory(kinds)


def _untrained(p: Any, moments: list[Moment]) -> list[Moment]:
    """Without the gradients of weights that are frozen, as under low-rank adapters."""
    if not np.any(p.frozen):
        return moments
    return [moment | {"gradients": np.where(p.frozen, 0.0, moment.get("gradients", 0.0))} for moment in moments]


# -- when


def _megatron(p: Any, block: SimpleNamespace, stage: SimpleNamespace) -> list[Moment]:
    """With ZeRO below 3: the loss, and the backward pass of a block, beside weights, fp32 gradients, weights and moments.

    Its kernels leave autograd an empty weight gradient, one of each shape (get_dummy_wgrad in Transformer Engine's
    module/base.py), and one of the head while its own is computed.
    """
    whole = p.size * (p.size < FP32) + FP32 * (p.zero != 2) + (FP32 + p.moments) * (p.zero == 0)
    split = (FP32 + p.moments) * (p.zero > 0) + FP32 * (p.zero == 2)
    state = np.where(p.frozen, p.size * stage.held, whole * stage.held + split * stage.shard)  # weights alone; adapters are small
    always, trained = {"activations": stage.activations, "state": state}, p.size * np.where(p.frozen, 0.0, 1.0)
    empty, loss = trained * (block.largest + block.expert), (FP32 + p.size) * stage.logits
    return [
        always | {"gradients": empty + trained * stage.head, "logits": loss + stage.ends},
        always | {"gradients": empty, "working": block.working},
        always | {"gradients": empty, "working": block.mixture, "experts": block.rows},
    ]


def _sharded(p: Any, block: SimpleNamespace, stage: SimpleNamespace) -> list[Moment]:
    """With FSDP: the loss, the head's reduction, first, second and last block of the backward pass, the update, gradients that wait.

    Gradients are added up in fp32, unsharded, until the last micro-batch, with which they are reduced; the buffer of a reduction is
    held until the next one's. A pipeline's parameters stay unsharded, and it reduces when few activations are left. Else the
    block in work is unsharded and the unit after it, the head until it is done, and the embedding.
    """
    alone, size, several = np.equal(p.pp, 1), p.size, np.greater(p.accumulation, 1)
    table, head, unit = stage.tables * block.table, stage.own_head, block.largest + block.routed
    adapters = (2 * FP32 + p.moments) * adapters_held(p) / stage.spread  # with their gradients
    spared = size - np.where(p.frozen, p.stored, size)  # of a parameter of the blocks by four bits; one matrix at a time is whole
    state = np.where(p.frozen, size * stage.shard - spared * stage.blocks / stage.spread, (FP32 + p.moments) * stage.shard) + adapters
    shard = np.where(p.frozen, 0.0, FP32) / stage.spread * alone
    added = several * FP32 * stage.held
    added = added - ~stage.steady * np.minimum(added, stage.a_pass)
    tied = size * (table - head) * (p.tied > 0)  # a tied table's gradient is whole until the end
    unsharded = size * np.where(alone, table, stage.held)
    around = size * np.where(alone, table - head + block.largest + np.where(block.routed > 0, 0.0, block.largest), stage.held)
    smaller = np.where(spared > 0, spared * np.where(alone, block.largest, stage.blocks) - size * block.down, 0.0)
    unsharded, around = unsharded - spared * np.where(alone, 0.0, stage.blocks), around - smaller
    first = added + tied + alone * ~several * FP32 * head
    second = np.where(several, added - FP32 * head, FP32 * unit) * alone + tied
    final = (several * FP32 * (unit + table - head) + FP32 * unit) * alone + tied
    copies = np.where((p.tp > 1) | (p.pp > 1), 3 * FP32 + size, 3 * FP32)  # logits as they are, where the loss does not own them
    # Gradients of weights wait in half precision for the next inputs' backward pass of their stage: all before it, one stage's at the loss.
    split, blocks_held = p.parted * ~np.equal(p.dual, 1), size * (stage.held - table)
    late = (size * stage.head + blocks_held / p.vpp) * split
    acts, reduced = stage.activations, state + np.where(p.frozen, 0.0, FP32) * stage.shard
    back = {"gathered": around, "activations": acts}
    fewer = back | {"activations": acts - block.kept, "working": alone * block.working}
    moments = [
        back | {"gradients": first + np.maximum(size * block.down, split * blocks_held), "working": block.working,
                "state": state + shard * head},
        back | {"gradients": first + size * block.feed, "working": block.attending, "activations": acts - block.freed, "state": state},
        fewer | {"gradients": second + size * block.down, "state": state + shard * (head + unit)},
        fewer | {"gradients": final + size * block.down, "activations": alone * block.kept, "state": reduced},
        back | {"gradients": np.where(several, added + FP32 * unit, (FP32 + size) * unit) * alone, "activations": acts - alone * block.kept,
                "state": state},
        {"state": reduced},
    ]  # fmt: skip
    if stage.ending:
        ends = back | {"gathered": unsharded, "state": state}
        moments += [
            ends | {"gradients": added + late, "logits": copies * stage.logits + stage.outputs + stage.ends},
            ends | {"gradients": added + alone * (FP32 + ~several * size) * head, "logits": stage.ends},
        ]
    if np.any(block.routed > 0):  # their units are gathered in the order of the ranks, and then in their own
        experts = {"gathered": around + alone * size * 2 * block.routed, "working": block.mixture, "experts": block.rows}
        moments.append(back | experts | {"gradients": first, "state": state})
    if np.any(p.parted):
        moments.append(back | {"gathered": unsharded, "gradients": added, "activations": stage.waits, "state": state})
    return moments


# -- where


def in_flight(p: Any, rank: Any) -> Array:
    """Passes of a micro-batch through a virtual stage that a pipeline rank keeps at once, until their weights' gradients are there.

    GPipe: all. 1F1B: as many as there are stages from here on. Interleaved: its warm-up and one (Narayanan et al. 2021, section
    2.2.2). Zero-bubble: those of its first rank everywhere, because weights wait (Qi et al. 2024); the V-shaped ones two a rank,
    DualPipeV (DeepSeek-V3, 2024) one more. Equal to torch's schedules, and where the backward pass is whole to sim.schedule's
    (tests/test_memory.py).
    """
    count, turn = p.accumulation, np.minimum(p.pp, p.accumulation)
    plain = np.where(p.vpp > 1, 2 * (p.pp - rank - 1) + (p.vpp - 1) * turn + 1, p.pp - rank)
    v_shaped = np.minimum(2 * p.pp + 1 * p.dual, count + 1 + rank)
    most = np.where(p.v_shaped, v_shaped, np.where(p.parted, (p.vpp - 1) * turn + p.pp, np.where(p.gpipe, count, plain)))
    return np.asarray(np.minimum(count * p.vpp, most))


def waiting(p: Any, rank: Any) -> Array:
    """Of these, passes whose inputs' backward pass is done and whose weights' is not, when most is held; in ZBV's last rank all but
    one wait at the end of the step."""
    flight, last = in_flight(p, rank), np.equal(rank, p.pp - 1)
    found = np.where(p.v_shaped, np.where(last, flight - 1, 1.0), rank + 1.0)
    return np.asarray(np.where(p.parted & ~np.equal(p.dual, 1), np.minimum(found, flight), 0.0))


def _stage(p: Any, block: SimpleNamespace, rank: Any, eager: bool) -> SimpleNamespace:
    """What one pipeline rank has: layers, parameters and passes in flight."""
    stages = p.pp * p.vpp
    ends = (p.layers % stages > 0) & ((p.layers + 2) % stages == 0)  # embedding and head count as layers
    first, last = np.equal(rank, 0), np.where(p.v_shaped, np.equal(rank, 0), np.equal(rank, p.pp - 1)) > 0
    between = np.greater(rank, 0) & np.less(rank, p.pp - 1)  # of those one has the most layers
    even = np.where(between, np.ceil(p.layers / p.pp), np.floor(p.layers * (rank + 1) / p.pp) - np.floor(p.layers * rank / p.pp))
    layers = np.where(ends, (p.layers + 2) / p.pp - first - last, even)
    dense = np.where(p.pp > 1, np.clip(p.moe.dense_layers - rank * layers / p.vpp, 0, layers / p.vpp), p.moe.dense_layers)
    mixed = np.where(np.greater(p.moe.experts, 0), layers - dense, 0.0)
    tied = first & last & np.greater(p.tied, 0)
    tables = first + last * np.where(tied, 0, 1)
    more = p.mtp * last  # blocks of further tokens lie beside the head, each with a projection of two hidden states to one
    blocks = (layers - mixed) * block.dense_parameters + mixed * block.mixed_parameters
    common = blocks + tables * block.table
    common = common + more * np.where(np.greater(p.moe.experts, 0), block.mixed_parameters, block.dense_parameters)
    common, spread = common + first * p.position_rows * p.hidden + more * 2 * p.hidden**2, p.dp_shard * p.cp
    routed = (mixed + more) * block.routed
    flight, wait, each = in_flight(p, rank), waiting(p, rank), layers / p.vpp
    kept = ((layers - mixed) * block.dense + mixed * block.mixed + more * block.kept) / p.vpp
    message = eager * np.greater(p.pp, 1) * block.tokens * p.hidden / p.tp * p.size
    passed = flight * message * (1.0 * first - last)  # a stage's inputs are messages, and its outputs are kept until they come back
    late = np.where(p.v_shaped, 0.0, np.maximum(wait - 1, 0.0) * p.size)  # gradients of logits that wait
    logits = last * block.tokens * p.vocab / p.tp * (1 + p.mtp)
    return SimpleNamespace(
        rank=rank, blocks=blocks, ending=np.any(last), tables=tables, held=common + routed, spread=spread, head=last * block.table,
        own_head=last * block.table * np.where(tied, 0, 1), shard=common / spread + routed / np.maximum(1, spread * p.tp / (p.ep * p.etp)),
        logits=logits, outputs=np.where(p.gpipe, (p.accumulation - 1) * (FP32 + p.size), late) * logits,
        ends=last * block.tokens * p.hidden * (1 + 1 / p.tp) * p.size,  # inputs of the last norm and of the head
        activations=flight * kept + passed, a_pass=kept, steady=p.accumulation * p.vpp > flight,
        waits=(flight - (p.v_shaped & np.equal(rank, p.pp - 1))) * kept + wait * each * block.waits + passed,
        messages=p.accumulation * message * np.where(p.v_shaped, 4 - 2 * first, 2 * p.vpp - 1.0 * first - last),
    )  # fmt: skip
