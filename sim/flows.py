"""Traffic that shares links: every flow moves at its max-min fair rate, which changes when another one starts or ends.

Rates are filled up together until a link is full; the flows across it keep what they have and the others go on (Bertsekas and
Gallager 1992, section 6.5.2).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import simpy

Link: TypeAlias = tuple[str, int]
TINY = 1e-12


def fair(flows: Sequence[tuple[float, Sequence[Link]]], capacity: Mapping[Link, float]) -> list[float]:
    """Rates of flows that are given as (most, links they cross), in the unit of the links' capacities.

    >>> fair([(9.0, [("a", 0)]), (9.0, [("a", 0), ("b", 0)]), (9.0, [("b", 0)])], {("a", 0): 4.0, ("b", 0): 10.0})
    [2.0, 2.0, 8.0]
    """
    rates, left = [0.0] * len(flows), dict(capacity)
    rising = set(range(len(flows)))
    while rising:
        load = {link: sum(link in flows[i][1] for i in rising) for i in rising for link in flows[i][1]}
        step = min([left[link] / count for link, count in load.items()] + [flows[i][0] - rates[i] for i in rising])
        for i in rising:
            rates[i] += step
        for link, count in load.items():
            left[link] -= step * count
        full = {link for link in load if left[link] <= TINY * capacity[link]}
        rising -= {i for i in rising if flows[i][0] - rates[i] <= TINY * flows[i][0] or full & set(flows[i][1])}
    return rates


@dataclass
class Flow:
    links: Sequence[Link]
    left: float  # seconds that it would still take alone
    end: simpy.Event
    rate: float = 0.0


class Flows:
    """Flows over links of capacity 1: each says how long it takes alone, and ends later where it has to share."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.flows: list[Flow] = []
        self.seen = env.now
        self.turn = 0  # changes with the rates, so that an outdated alarm is known

    def send(self, seconds: float, links: Iterable[Link]) -> simpy.Event:
        """A flow that takes so long alone; the event of its end."""
        flow = Flow(tuple(links), seconds, self.env.event())
        self._advance()
        self.flows.append(flow)
        self._share()
        return flow.end

    def _advance(self) -> None:
        for flow in self.flows:
            flow.left -= flow.rate * (self.env.now - self.seen)
        self.seen = self.env.now

    def _share(self) -> None:
        """New rates, and an alarm at the next end."""
        done = [flow for flow in self.flows if flow.left <= TINY + 1e-9 * flow.rate]
        self.flows = [flow for flow in self.flows if flow not in done]
        for flow in done:
            flow.end.succeed()
        links = {link: 1.0 for flow in self.flows for link in flow.links}
        for flow, rate in zip(self.flows, fair([(1.0, flow.links) for flow in self.flows], links), strict=True):
            flow.rate = rate
        self.turn += 1
        if self.flows:
            self.env.process(self._alarm(self.turn, min(flow.left / flow.rate for flow in self.flows)))

    def _alarm(self, turn: int, seconds: float):  # type: ignore[no-untyped-def]
        yield self.env.timeout(seconds)
        if turn == self.turn:
            self._advance()
            self._share()
