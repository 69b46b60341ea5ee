"""Watts → joules → gCO2e, litres, dollars: what the building's meter will show.

Power is constant within a segment of the timeline, so energy is a sum of products. It is told twice, by what draws it and
by the hour in which it is drawn, and both add up to the reading of the meter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from conf.plan import Plan
from conf.record import STATES
from sim.grid import HOUR, Array, by_hour, intensities
from sim.kernels import measured
from sim.money import Bill, bill, billed, weighted
from sim.timeline import Segment, Timeline

DRAWS = ("devices", "spares", "hosts", "network", "overhead")  # what draws: their watts add up to the building's
DARK = ("paused", "queue", "idle")  # states without a process on the devices


class Meter:
    """Power of the whole building in each state of the job [W].

    `step` is the mix of states in a step, `arithmetic` and `stalled` the shares of compute in matrix products and in waiting for
    the host; the rest of compute moves tensors.
    """

    def __init__(self, plan: Plan, step: Mapping[str, float], arithmetic: float = 1.0, stalled: float = 0.0) -> None:
        self.plan, self.step, self.arithmetic, self.stalled = measured(plan), step, arithmetic, stalled
        self.parts = {state: self._parts(self.device(state)) for state in STATES}
        self.table = {state: float(sum(parts)) for state, parts in self.parts.items()}
        self.spells: Sequence[Spell] = ()

    def share(self, state: str) -> float:
        """Draw of a device between idle (0) and its limit (1); a step done again draws what a step draws."""
        power = self.plan.power
        moving = max(0.0, 1 - self.arithmetic - self.stalled)
        compute = self.arithmetic * power.compute + moving * power.memory + self.stalled * power.bubble
        known = {"compute": compute, "evaluate": compute, "score": compute, "logprob": compute, "optimizer": power.memory,
                 "generate": power.memory, "communication": power.communication, "sync": power.communication, "bubble": power.bubble,
                 "detect": power.hang, **dict.fromkeys(DARK, 0.0)}  # fmt: skip
        if state == "replay":
            return sum(part * self.share(s) for s, part in self.step.items())
        return known.get(state, power.other)

    def device(self, state: str) -> float:
        """Power of one device [W]. Its limit holds for the mean over a state: kernels are shorter than the limiter's window."""
        if state == "replay":
            return sum(part * self.device(s) for s, part in self.step.items())
        gpu, cap = self.plan.gpu, self.plan.power.cap
        return min(gpu.idle_power + self.share(state) * (gpu.max_power - gpu.idle_power), gpu.max_power if cap is None else cap)

    def watts(self, mix: Mapping[str, float]) -> float:
        """Mean power of ranks that share themselves among states.

        >>> from conf.program import load
        >>> plan = load(["experiment=llama3_405b", "power.network=0 W", "power.host=1900 W", "power.host_idle=null"])
        >>> round(Meter(plan, {"compute": 1.0}).watts({"compute": 1.0}) / 1e6, 2)  # 1.1 × (16384 × 700 W + 256 × 100 W + 2080 × 1900 W)
        16.99
        """
        return sum(part * self.table[state] for state, part in mix.items())

    def _parts(self, device: float) -> Array:
        """Watts of DRAWS while every device of the job draws so much.

        Hosts go from idle to loaded with their devices. PUE = pue + pue_fixed / load is an overhead that in part follows the servers'
        power and in part is a share of what they draw at most.
        """
        gpu, cluster, power = self.plan.gpu, self.plan.cluster, self.plan.power

        def servers(device: float) -> Array:
            idle = power.host if power.host_idle is None else power.host_idle
            load = min(1.0, (device - gpu.idle_power) / max(1e-9, gpu.max_power - gpu.idle_power))
            spares = cluster.spares * (cluster.gpus_per_node * gpu.idle_power + idle)
            hosts = cluster.nodes * (idle + load * (power.host - idle))
            return np.array([self.plan.ranks * device, spares, hosts, (cluster.nodes + cluster.spares) * power.network + power.storage])

        drawn, most = servers(device), servers(gpu.max_power)
        return np.append(drawn, (power.pue - 1) * drawn.sum() + power.pue_fixed * most.sum())

    def cap_for(self, most: float) -> float:
        """Power of every device at which the building draws so much [W]; all that grows with it grows linearly."""
        gpu = self.plan.gpu
        low, high = (float(self._parts(device).sum()) for device in (gpu.idle_power, gpu.max_power))
        return gpu.idle_power + (most - low) / (high - low) * (gpu.max_power - gpu.idle_power)

    def least(self) -> float:
        """Power of the building with devices capped to what they draw without arithmetic [W]."""
        gpu = self.plan.gpu
        return float(self._parts(max(gpu.idle_power, gpu.cap_static * gpu.max_power)).sum())

    def peak(self, states: Iterable[str]) -> float:
        """Highest power of a moment: ranks are in step, so all draw the same at once; a step done again has a step's moments."""
        return max((self.table[state] for state in states if state != "replay"), default=0.0)

    # -- over time, with spells in which another meter holds

    def over(self, timeline: Timeline) -> Iterator[tuple["Meter", list[Segment]]]:
        """The segments in order, bundled by the meter that holds for them."""
        if not self.spells:
            yield self, timeline.segments
            return
        spells = iter([*self.spells, Spell(np.inf, np.inf, self)])
        spell = next(spells)

        def holds(segment: Segment) -> Meter:
            nonlocal spell
            while segment.start >= spell.stop:
                spell = next(spells)
            return spell.meter if segment.start >= spell.start else self

        for meter, bundle in groupby(timeline.segments, holds):
            yield meter, list(bundle)

    def draw(self, timeline: Timeline) -> Array:
        """Watts of each segment."""
        told: list[float] = []
        for meter, bundle in self.over(timeline):
            known: dict[int, float] = {}  # by the mix itself: thousands of segments share that of a step
            for _, _, _, mix, _ in bundle:
                if id(mix) not in known:
                    known[id(mix)] = meter.watts(mix)
                told.append(known[id(mix)])
        return np.array(told)

    def drawn(self, timeline: Timeline) -> dict[str, Array]:
        """Joules by state, each by DRAWS."""
        joules: dict[str, Array] = {}
        for meter, bundle in self.over(timeline):
            seconds: dict[str, float] = {}
            for segment in bundle:
                for state, share in segment.mix.items():
                    seconds[state] = seconds.get(state, 0.0) + share * (segment.stop - segment.start)
            for state, spent in seconds.items():
                joules[state] = joules.get(state, np.zeros(len(DRAWS))) + spent * meter.parts[state]
        return joules


class Spell(NamedTuple):
    """A stretch of time with a meter of its own, as under a cap."""

    start: float
    stop: float
    meter: Meter


@dataclass(frozen=True)
class Footprint:
    energy: float  # [J]
    energy_of: dict[str, float]  # by what draws it: DRAWS
    energy_in: dict[str, float]  # by state
    carbon_location: float  # [gCO2e]
    carbon_market: float
    carbon_embodied: float
    water: float  # [L]
    gpu_hours: float
    bill: Bill
    peak_power: float  # [W]

    @property
    def cost(self) -> tuple[float, float, float]:
        """Mid, low, high [USD]."""
        return self.bill.total


def footprint(plan: Plan, meter: Meter, timeline: Timeline, start: str = "") -> Footprint:
    """Everything that the run draws from the world, from the plan's start on or from a later one.

    Embodied carbon is spread over the service life: kgCO2e × 1000 × device time / lifetime. Water is what generation takes of all
    energy and what the site evaporates of the servers'.
    """
    stops = np.array([0.0, *(s.stop for s in timeline.segments)])
    watts = meter.draw(timeline)
    joules = meter.drawn(timeline)
    of = dict(zip(DRAWS, map(float, sum(joules.values(), np.zeros(len(DRAWS)))), strict=True))
    energy = float(watts @ np.diff(stops))
    first, energies = by_hour(start or plan.start, stops, watts)
    location = float(energies @ intensities(plan.grid, first, len(energies)))
    devices = plan.ranks + plan.cluster.spares * plan.cluster.gpus_per_node
    hours = devices * timeline.until / HOUR
    return Footprint(
        energy=energy,
        energy_of=of,
        energy_in={state: float(parts.sum()) for state, parts in joules.items()},
        carbon_location=location,
        carbon_market=location if plan.grid.market is None else plan.grid.market * energy,
        carbon_embodied=plan.price.embodied[plan.gpu.name] * 1000 * hours * HOUR / plan.price.lifetime,
        water=plan.grid.water * energy + plan.power.water_site * (energy - of["overhead"]),
        gpu_hours=hours,
        bill=bill(plan, billed(plan, hours, timeline.states()), timeline.until, weighted(plan, first, energies)),
        peak_power=max((m.peak({s for segment in bundle for s in segment.mix}) for m, bundle in meter.over(timeline)), default=0.0),
    )  # fmt: skip
