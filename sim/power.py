"""Watts → joules → gCO2e, litres, dollars: what the building's meter will show.

Power is constant within a segment of the timeline, so energy is a sum of products. Carbon is energy by hour times the
grid's intensity in that hour, and the hours' energies add up to the energy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from conf.plan import Grid, Plan
from conf.record import STATES
from sim.timeline import Timeline

HOUR = 3600.0


class Meter:
    """Power of the whole building in each state of the job [W]."""

    def __init__(self, plan: Plan, step: Mapping[str, float]) -> None:
        self.plan, self.step = plan, step
        self.table = {state: self._moment(self.share(state)) for state in STATES}

    def share(self, state: str) -> float:
        """Draw of a device between idle (0) and its limit (1); a step done again draws what a step draws."""
        power = self.plan.power
        if state == "replay":
            return sum(part * self.share(s) for s, part in self.step.items())
        return {"compute": power.compute, "communication": power.communication, "bubble": power.bubble}.get(state, power.other)

    def watts(self, mix: Mapping[str, float]) -> float:
        """Mean power of ranks that share themselves among states.

        >>> from conf.program import load
        >>> meter = Meter(load(["experiment=llama3_405b"]), {"compute": 1.0})
        >>> round(meter.watts({"compute": 1.0}) / 1e6, 2)  # 1.1 × (16384 × 670 W + 256 × 100 W + 2080 × 1900 W)
        16.45
        """
        return sum(part * self.table[state] for state, part in mix.items())

    def _moment(self, share: float) -> float:
        """PUE × (devices + idle spares' devices + hosts), all devices at the same share."""
        gpu, cluster, power = self.plan.gpu, self.plan.cluster, self.plan.power
        spares = cluster.spares * cluster.gpus_per_node * gpu.idle_power
        return power.pue * (self._devices(share) + spares + (cluster.nodes + cluster.spares) * power.host)

    def _devices(self, share: float) -> float:
        gpu, cap = self.plan.gpu, self.plan.power.cap
        natural = gpu.idle_power + share * (gpu.max_power - gpu.idle_power)
        return self.plan.ranks * (natural if cap is None else min(cap, natural))

    def devices(self, seconds: Mapping[str, float]) -> float:
        """Energy of the job's devices alone over rank-seconds by state [J]."""
        return sum(self._devices(self.share(state)) * spent / self.plan.ranks for state, spent in seconds.items())

    def peak(self, states: Mapping[str, float]) -> float:
        """Highest power of a moment: ranks are in step, so all draw the same at once; a step done again has a step's moments."""
        return max((self.table[state] for state in states if state != "replay"), default=0.0)


@dataclass(frozen=True)
class Footprint:
    energy: float  # [J]
    energy_devices: float  # of the job's devices alone, before the building's overhead [J]
    carbon_location: float  # [gCO2e]
    carbon_market: float
    carbon_embodied: float
    water: float  # [L]
    gpu_hours: float
    cost: tuple[float, float, float]  # mid, low, high [USD]
    peak_power: float  # [W]


def footprint(plan: Plan, meter: Meter, timeline: Timeline) -> Footprint:
    """Everything that the run draws from the world.

    Embodied carbon is spread over the service life: kgCO2e × 1000 × device time / lifetime.
    """
    stops = np.array([0.0, *(s.stop for s in timeline.segments)])
    watts = np.array([meter.watts(s.mix) for s in timeline.segments])
    energy = float(watts @ np.diff(stops))
    location = carbon(plan.grid, plan.start, stops, watts)
    devices = plan.ranks + plan.cluster.spares * plan.cluster.gpus_per_node
    hours = devices * timeline.until / HOUR
    offer = plan.price.gpu_hours[plan.gpu.name]
    return Footprint(
        energy=energy,
        energy_devices=meter.devices(timeline.states()),
        carbon_location=location,
        carbon_market=location if plan.grid.market is None else plan.grid.market * energy,
        carbon_embodied=plan.price.embodied[plan.gpu.name] * 1000 * hours * HOUR / plan.price.lifetime,
        water=plan.grid.water * energy,
        gpu_hours=hours,
        cost=(hours * offer.mid, hours * offer.low, hours * offer.high),
        peak_power=meter.peak(timeline.states()),
    )


def carbon(grid: Grid, start: str, stops: NDArray[np.float64], watts: NDArray[np.float64]) -> float:
    """Location-based carbon of power that is `watts[i]` from `stops[i]` to `stops[i + 1]`, seconds after `start` [gCO2e].

    The meter's reading is a broken line; its differences between full hours are the hours' energies, exactly.
    """
    reading = np.concatenate([[0.0], np.cumsum(watts * np.diff(stops))])
    first, offset = hour_of(start)
    count = int((offset + stops[-1]) // HOUR) + 1
    edges = np.arange(count + 1) * HOUR - offset
    energies = np.diff(np.interp(edges, stops, reading))
    assert abs(energies.sum() - reading[-1]) <= 1e-9 * reading[-1], "the hours do not cover the run"
    return float(energies @ intensities(grid, first, count))


def hour_of(start: str) -> tuple[np.datetime64, float]:
    """The full hour (UTC) in which a run starts, and the seconds since then.

    >>> hour_of("2026-01-31T23:30")
    (np.datetime64('2026-01-31T23','h'), 1800.0)
    """
    moment = datetime.fromisoformat(start)
    moment = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    hour = moment.replace(minute=0, second=0, microsecond=0)
    return np.datetime64(hour, "h"), (moment - hour).total_seconds()


def intensities(grid: Grid, first: np.datetime64, count: int) -> NDArray[np.float64]:
    """Intensity of `count` hours from `first` on: yearly mean × profile of month and hour; years repeat [gCO2e/J]."""
    if grid.profile is None:
        return np.full(count, grid.intensity)
    hours = first + np.arange(count)
    month = hours.astype("datetime64[M]").astype(int) % 12
    return np.asarray(grid.intensity * np.array(grid.profile)[month, hours.astype(int) % 24])
