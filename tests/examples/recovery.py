"""Every state of the recovery machine, in two acts with a storm written by hand.

    python -m tests.examples.recovery

A step takes a second. Faults strike, are noticed in the way of their kind, and the job comes up again: on a spare, on a
smaller mesh, on a repaired server; from a neighbour's memory, from the storage, from further back. In the second act a
replica comes up by itself while the other goes on.
"""

from dataclasses import replace

from conf.plan import Cause, Plan
from conf.program import load
from sim.cluster import World
from sim.failures import Fault
from sim.kernels import rates
from sim.pace import Pace
from sim.pretrain import Pretraining

SECOND = Pace(1.0, {"compute": 1.0}, 2.0, 1e9, 0.4, 1e3)  # a step, and an evaluation of two seconds
CAUSES = {
    "server": Cause(per="node", rate=1e-9, silent=True),
    "hang": Cause(per="job", rate=1e-9, how="hang"),
    "straggler": Cause(per="node", rate=1e-9, how="slow", factor=1.5, lasts="1 h"),
    "corruption": Cause(per="node", rate=1e-9, how="corrupt"),
    "spot": Cause(per="node", rate=1e-9, notice="2 min"),
}
PHASES = {"detect": "3 s", "heartbeat": "6 s", "timeout": "30 s", "score": "20 s", "checksum": "50 s", "abort": "1 s", "diagnose": "4 s",
          "reallocate": "2 s", "boot": "15 s", "init": "5 s", "repair": "300 s"}  # fmt: skip
ACTS = {
    "a spare, a smaller mesh, corruption, a spike": (
        ["cluster.spares=1", "failures.without_spare=shrink", "checkpoint.memory_every=50"],
        [
            Fault(75.0, "server", 1),  # its heartbeats stay away; a spare takes its place, a neighbour has its state
            Fault(140.0, "hang", 0),  # only the timeout ends it; the same servers again
            Fault(240.0, "straggler", 2),  # slow until its score tells; no spare is left: the job shrinks
            Fault(560.0, "corruption", 0),  # found 50 s later: back to before it
        ],
        [430],
    ),
    "a warning, a replica by itself, a queue": (
        ["cluster.cold_spares=1", "failures.restart=replica", "mesh.dp_replicate=2", "mesh.dp_shard=2"],
        [
            Fault(60.0, "server", 0),  # of the first replica; a cold spare boots for it
            Fault(160.0, "server", 3),  # of the second; it queues for the first one's server
            Fault(180.0, "hang", 0),  # all fall together now
            Fault(480.0, "spot", 2),  # warned: a replica that leaves costs the other no work
        ],
        [],
    ),
}


def plan(words: list[str]) -> Plan:
    """Four servers of one rank; on the storage every 100 steps."""
    usual = ["data.path=null", "data.tokens=1000000", "cluster.nodes=4", "cluster.gpus_per_node=1", "train.steps=450",
             "train.evaluate_every=300", "checkpoint.every=100", "train.global_batch=12", "train.micro_batch=1"]  # fmt: skip
    base = load([*usual, *words, *(f"failures.{phase}='{value}'" for phase, value in PHASES.items())])
    return base.but(**{"failures.causes": CAUSES, "failures.spikes.rewind": 60})


def main() -> None:
    for title, (words, storm, spikes) in ACTS.items():
        it = plan(words)
        world = World(it, replace(rates(it), storage_write=9.6e6 / 2, storage_read=9.6e6 / 8, init=5.0))
        job = Pretraining(world, SECOND, iter(storm), iter(spikes))
        job.shape.smaller.known[3] = (SECOND.mix, 4 / 3)  # three servers take 4 / 3 as long, so that a hand can follow
        world.env.run(until=world.env.process(job.run()))
        print(f"-- {title}")
        told = [
            (h.at, 0, "", h.event, " ".join(f"{k}={v}" for k, v in h.detail.items() if k != "bytes")) for h in world.timeline.happenings
        ]
        told += [(s.start, 1, f"{s.stop - s.start:.1f} s", "  " + " ".join(f"{k} {v:.0%}" for k, v in s.mix.items()), "")
                 for s in world.timeline.segments if s.stop - s.start > 0.05]  # fmt: skip
        for start, _, span, what, detail in sorted(told, key=lambda line: line[:2]):
            print(f"{start:7.1f} {span:>8}  {what:40} {detail}".rstrip())


if __name__ == "__main__":
    main()
