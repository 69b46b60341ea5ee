"""The run of an alignment, foretold: steps at their pace, checkpoints, and falls in between.

A relay team: whoever stumbles, trainer or generator, all go back to the last mark. So it is pre-training's hike (pretrain.py) at the pace
of alignment's steps, under weather of its own, with three differences:

    any fault of any rank stops the whole job, which restarts whole; slow ranks and silent corruption are as in pre-training
    the step under way is lost with all that engines had begun, and read and written again
    steps since the checkpoint are done again, but where generation has ranks of its own, their samples are in the journal of the trainers:
    they wait for none

In align.py's own world, interrupted at moments spread over a step, a fall with a journal costs 0.2 to 0.5 steps beside that where samples
may be one update old, and 1.5 where four: the whole torn step, half of one on average, stands for it.
"""

from dataclasses import replace
from typing import NamedTuple
from zlib import crc32

from conf.arithmetic import parameters
from conf.plan import Plan
from sim.checkpoint import Checkpoints
from sim.cluster import World
from sim.failures import faults
from sim.kernels import Rates, rates
from sim.pace import Pace
from sim.pretrain import Pretraining
from sim.roles import critic, trained

WEATHER = crc32(b"align")  # so that a seed's faults are other ones than those of its pre-training


class Ran(NamedTuple):
    """What a life of the stage came to."""

    wall: float  # seconds from the start of the ranks to the last checkpoint
    start: float  # of these, before the first step or fall
    useful: float  # in steps that counted
    dragged: float  # beside them, behind a slow server
    saving: float  # in checkpoints
    lost: float  # on the way back up and over old ground
    replayed: float  # of these, over old ground
    interruptions: int


def run(plan: Plan, step: float, again: float = 1.0, seed: int | None = None, speed: Rates | None = None) -> Ran:
    """One life of align.steps steps of so many seconds, of which one that is done again takes the share `again`; another seed is another
    weather."""
    speed, seed = speed or rates(plan), plan.seed if seed is None else seed
    twin = plan.but(**{"train.steps": plan.align.steps, "train.stop_after": None, "train.evaluate_every": 0, "failures.restart": "job",
                       "failures.without_spare": "wait", "checkpoint.local_every": 0, "checkpoint.memory_every": 0})  # fmt: skip
    pace = Pace(step, {"compute": 1.0}, 0.0, 0.0, 0.0, 0.0, again=again)
    world = World(twin, speed)
    job = Pretraining(world, pace, faults(twin, WEATHER + seed))
    job.checkpoints = _checkpoints(plan, twin, speed, step)
    world.env.run(until=world.env.process(job.run()))
    return _told(job, world.timeline.until)


def _checkpoints(plan: Plan, twin: Plan, speed: Rates, step: float) -> Checkpoints:
    """Checkpoints of what is trained, with its moments, and of a critic beside it; every trainer copies its share."""
    share = (1 + critic(plan)) * trained(plan) / float(parameters(plan.model)) * plan.ranks / len(plan.roles.trainers)
    whole = share * len(plan.roles.trainers) / plan.ranks
    speed = replace(speed, storage_write=speed.storage_write / whole, storage_read=speed.storage_read / whole)
    return Checkpoints(twin.but(**{"gpu.snapshot": twin.gpu.snapshot / share}), speed, step)


def _told(job: Pretraining, wall: float) -> Ran:
    """The life in numbers, with the time counted in two ways."""
    each = {state: seconds / job.plan.ranks for state, seconds in job.world.timeline.states().items()}
    first = next((one.at for one in job.world.timeline.happenings if one.event == "failure"), wall)
    start, useful, lost = min(job.world.rates.init, first), each.get("compute", 0.0), sum(job.lost.values())
    dragged, saving, replayed = (each.get(state, 0.0) for state in ("communication", "checkpoint", "replay"))
    ran = Ran(wall, start, useful, dragged, saving, lost, replayed, sum(job.falls.values()))
    assert abs(start + useful + dragged + saving + lost - wall) <= 1e-9 * wall, f"time is not conserved: {ran}"
    assert abs(ran.useful - job.step * job.pace.stride) <= 1e-9 * wall, f"{job.step} steps took {ran.useful} s"
    return ran
