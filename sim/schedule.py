"""Pipeline schedules: the order in which each rank runs the forward and backward passes of its virtual stages.

A virtual stage lies on rank (stage mod pp), or for the V-shaped schedules on a path that runs down the ranks and up again, so
that the first and the last are neighbours' neighbours on rank 0. Zero-bubble schedules part a backward pass into that of the
inputs, on which other ranks wait, and that of the weights, on which nobody does: it fills the holes.
"""

from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import product
from typing import NamedTuple

PARTED = ("zero_bubble", "zbv", "dualpipev")  # schedules that part the backward pass
V_SHAPED = ("zbv", "dualpipev")
EQUAL = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
TINY = 1e-9  # passes that end this close together end at once


class Pass(NamedTuple):
    """A pass of one micro-batch through one virtual stage: F forward, B backward, or its parts I (inputs) and W (weights)."""

    kind: str
    stage: int
    micro: int


def rank_of(schedule: str, stage: int, pp: int) -> int:
    """The pipeline rank that holds a virtual stage."""
    if schedule in V_SHAPED and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def orders(schedule: str, pp: int, vpp: int, count: int, lengths: Mapping[str, float] = EQUAL) -> list[list[Pass]]:
    """The passes of every pipeline rank in order, for `count` micro-batches; `lengths` of a pass of each kind, in any unit.

    >>> [" ".join(f"{p.kind}{p.micro}" for p in rank) for rank in orders("1f1b", 2, 1, 3)]
    ['F0 F1 B0 F2 B1 B2', 'F0 B0 F1 B1 F2 B2']
    """
    if schedule == "gpipe":
        return [[Pass(kind, rank, micro) for kind in "FB" for micro in range(count)] for rank in range(pp)]
    if schedule in PARTED:
        return _filled(schedule, pp, vpp, count, lengths)
    return [_one_by_one(rank, pp, vpp, count) for rank in range(pp)]


def _one_by_one(rank: int, pp: int, vpp: int, count: int) -> list[Pass]:
    """1F1B, and interleaved with several virtual stages (Narayanan et al. 2021, sections 2.2.1 and 2.2.2).

    Micro-batches pass a rank's virtual stages in turns of pp.
    """
    turn = min(pp, count)
    places = [(k // (turn * vpp) * turn + k % turn, k % (turn * vpp) // turn) for k in range(count * vpp)]
    forward = [Pass("F", part * pp + rank, micro) for micro, part in places]
    backward = [Pass("B", (vpp - 1 - part) * pp + rank, micro) for micro, part in places]
    ahead = min(len(forward), pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * turn)
    steady = [each for pair in zip(forward[ahead:], backward, strict=False) for each in pair]
    return [*forward[:ahead], *steady, *backward[len(forward) - ahead :]]


def _filled(schedule: str, pp: int, vpp: int, count: int, lengths: Mapping[str, float]) -> list[list[Pass]]:
    """Zero-bubble schedules, dealt out by how long each kind of pass takes (Qi et al. 2024, sections 2 and 3).

    Whenever a rank is free it runs the backward pass that others wait for, else the forward pass that is furthest on its way,
    else weights. A rank takes a new micro-batch only while fewer than pp are under way on it, the memory of 1F1B.
    """
    last = pp * vpp - 1
    mine = [[stage for stage in range(last, -1, -1) if rank_of(schedule, stage, pp) == rank] for rank in range(pp)]
    done: set[Pass] = set()
    found: list[list[Pass]] = [[] for _ in range(pp)]
    weights: list[list[Pass]] = [[] for _ in range(pp)]
    next_of = {(kind, stage): 0 for kind in "FI" for stage in range(last + 1)}  # the micro-batch whose turn it is
    most = pp if schedule in V_SHAPED else 2 * pp

    def ready(kind: str, stage: int, first: bool) -> bool:
        micro = next_of[kind, stage]
        if micro == count:
            return False
        if kind == "I":
            return Pass("F", stage, micro) in done and (stage == last or Pass("I", stage + 1, micro) in done)
        room = not first or micro - next_of["I", stage] < most
        return room and (stage == 0 or Pass("F", stage - 1, micro) in done)

    ends: list[tuple[float, int, Pass]] = []  # of the passes that run
    free = set(range(pp))
    now = 0.0
    while True:
        for rank in sorted(free):
            choice = next((each for each in product("IF", mine[rank]) if ready(*each, each[1] == mine[rank][-1])), None)
            if choice is not None:
                each = Pass(*choice, next_of[choice])
                next_of[choice] += 1
                weights[rank] += [Pass("W", each.stage, each.micro)] * (each.kind == "I")
            elif weights[rank]:
                each = weights[rank].pop(0)
            else:
                continue
            free.remove(rank)
            found[rank].append(each)
            heappush(ends, (now + lengths[each.kind], rank, each))
        if not ends:
            return found
        now = ends[0][0]
        while ends and ends[0][0] <= now * (1 + TINY):
            _, rank, each = heappop(ends)
            done.add(each)
            free.add(rank)
