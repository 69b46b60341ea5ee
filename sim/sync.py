"""Weight sync, foretold: what new weights take from trainers to generators.

    full         buckets: gathered from the trainers' shards, then sent to every rank that generates, whole
    per_tensor   the same, a tensor at a time
    sharded      a unit at a time, and to every rank only its own part
    adapters     only what is trained
    delta        only the numbers that changed, each with its place

Where trainers generate too, nothing is sent: shards are gathered into what a generator holds.
"""

from typing import NamedTuple

import numpy as np

from conf.arithmetic import parameters, tensors
from conf.plan import Plan
from sim.kernels import Device, rates
from sim.network import Network
from sim.roles import trained

CHANGED = 0.02  # share of numbers in half precision that an update changes: 1 to 3% (verl's delta checkpoint engine, its documentation)
PLACE = 4  # bytes of where it stands
REACHED = 0.24  # share of the links' rate that it reaches, with gathering, casting and loading (NeMo-RL v0.5, LOG.md, 2026-11-30)


class Sync(NamedTuple):
    bytes: float  # that a generator is sent
    pieces: int  # collectives that it takes
    seconds: float


def sync(plan: Plan) -> Sync:
    """One transfer of the weights after an update."""
    align, size = plan.align, 4 if plan.train.precision == "fp32" else 2
    whole = size * trained(plan) if align.adapters and align.sync == "adapters" else size * float(parameters(plan.model))
    sent = whole * CHANGED * (size + PLACE) / size if align.sync == "delta" else whole
    pieces = _pieces(plan, sent)
    each = 1 / align.engine_tp if align.sync == "sharded" else 1.0
    device = Device([rates(plan)])
    network = Network([plan], device)
    trainers, ranks = len(plan.roles.trainers), plan.ranks
    moved = sent * each / (1.0 if plan.gpu.kind == "cpu" else REACHED)  # rates of a CPU's links are measured with all of it
    seconds = _seconds(network, trainers, moved, pieces) + (_seconds(network, ranks, moved, pieces) if align.apart else 0.0)
    return Sync(sent, pieces, seconds)


def _pieces(plan: Plan, sent: float) -> int:
    by = {"per_tensor": int(tensors(plan.model)), "sharded": plan.model.layers + 2}
    return max(1, by.get(plan.align.sync, int(np.ceil(sent / plan.align.bucket))))


def _seconds(network: Network, ranks: int, size: float, pieces: int) -> float:
    """Of so many collectives in a row over so many ranks: a start each, and all bytes around the ring."""
    if ranks == 1:
        return 0.0
    n, stride = np.array([float(ranks)]), np.ones(1)
    start = network.around("all_gather", n, stride, np.zeros(1))
    whole = network.around("all_gather", n, stride, np.array([size])) - start
    return float((pieces * start + whole)[0])
