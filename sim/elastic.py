"""The job as it stands: whole, slowed by a straggler, with a replica down, or on a smaller mesh.

A rowing crew: when one is slow all are slow, when one is out the others row for it, and a smaller boat is another boat.
What stands here says how long a step takes now and what the ranks do meanwhile.
"""

from collections.abc import Mapping

from conf.plan import Plan
from conf.rules import problems
from sim.pace import Pace, pace
from sim.timeline import WHOLLY

Mix = Mapping[str, float]


class Shape:
    """Of what a step consists now."""

    def __init__(self, plan: Plan, pace_: Pace) -> None:
        self.plan, self.pace = plan, pace_
        self.slow: list[float] = []  # how many times as long a step takes, for each straggler
        self.down: dict[int, str] = {}  # replicas that are not in step, and the state they are in
        self.servers = plan.cluster.nodes  # in the mesh
        self.smaller = Smaller(plan)
        self.settle()

    def settle(self) -> None:
        """Work out stride [s] and mixes anew, after a change.

        K replicas of which some are down share the batch among those that are up: a step takes K / (K − down) as long. A straggler
        makes the others wait in a collective.
        """
        replicas = self.plan.mesh.dp_replicate
        up = (replicas - len(self.down)) / replicas
        used = self.servers / self.plan.cluster.nodes
        drag = max(self.slow, default=1.0)
        base, times = (self.pace.mix, 1.0) if used == 1 else self.smaller.step(self.servers)
        self.stride = self.pace.stride * times * drag / up
        busy = up * used
        mix = {state: share * busy / drag for state, share in base.items()}
        rest = {"idle": 1 - used} if used < 1 else {}
        for state in self.down.values():
            rest[state] = rest.get(state, 0.0) + 1 / replicas
        if drag > 1:
            mix["communication"] = mix.get("communication", 0.0) + busy * (1 - 1 / drag)
        for state, share in rest.items():
            mix[state] = mix.get(state, 0.0) + share
        again = {"replay": busy} | rest
        self.mix, self.again = (self.pace.mix, WHOLLY["replay"]) if busy == drag == 1 else (mix, again)


class Smaller:
    """Legal meshes on fewer servers, each predicted once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.largest: dict[int, int] = {plan.cluster.nodes: plan.cluster.nodes}
        self.known: dict[int, tuple[Mix, float]] = {}

    def fitting(self, servers: int) -> int:
        """Servers of the largest legal mesh on at most so many; 0 when there is none."""
        if servers not in self.largest:
            legal = (n for n in range(servers, 0, -1) if not problems(self._on(n)))
            self.largest[servers] = next(legal, 0)
        return self.largest[servers]

    def step(self, servers: int) -> tuple[Mix, float]:
        """The mix of a step there, and the time of a full batch over that of the whole job.

        Its batch is what its data-parallel ranks divide, so the time is scaled to the tokens of a full one.
        """
        if servers not in self.known:
            plan = self._on(servers)
            found = pace(plan)
            times = found.step_time / pace(self.plan).step_time * self.plan.train.global_batch / plan.train.global_batch
            self.known[servers] = (found.mix, times)
        return self.known[servers]

    def _on(self, servers: int) -> Plan:
        """The plan on fewer servers: fewer data-parallel ranks, and a batch that they divide."""
        plan = self.plan.but(**{"cluster.nodes": servers, "cluster.spares": 0, "mesh.dp_shard": -1, "train.first_batch": None})
        share = plan.dp * plan.train.micro_batch
        batch = max(share, plan.train.global_batch // share * share)
        return plan.but(**{"train.global_batch": batch})
