"""Money: what the run costs, item by item, at the lowest, usual and highest price of the day that the prices are of.

Rented devices are paid by the hour they are held, working or not; owned ones by their wear and by the electricity of each
hour. Stored and taken data come on top.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from conf.arithmetic import state_bytes
from conf.plan import Plan
from sim.grid import HOUR, Array

ENDS = ("mid", "low", "high")


class Bill(NamedTuple):
    """Each item at the mid, low and high price [USD]."""

    devices: tuple[float, float, float]  # rent, or wear
    electricity: tuple[float, float, float]  # of owned devices; rent has it in
    storage: tuple[float, float, float]
    egress: tuple[float, float, float]

    @property
    def total(self) -> tuple[float, float, float]:
        mid, low, high = (sum(prices) for prices in zip(*self, strict=True))
        return mid, low, high


def bill(plan: Plan, device_hours: float, wall: float, electricity: float) -> Bill:
    """The bill of devices held so long, of data stored for the wall clock [s], and of so much energy at the mean tariff [J].

    >>> from conf.program import load
    >>> round(bill(load(["experiment=deepseek_v3"]), 2.664e6, 1.0, 0.0).total[0])  # DeepSeek-V3 report, table 1: 5.328 M USD
    5328000
    """
    price, name = plan.price, plan.gpu.name
    stored = kept(plan) * wall
    worn = price.capex[name] / price.lifetime * device_hours * HOUR if price.owned else 0.0
    rent = [0.0 if price.owned else getattr(price.gpu_hours[name], end) * device_hours for end in ENDS]
    power = [getattr(price.tariff, end) * electricity if price.owned else 0.0 for end in ENDS]
    rows = ([worn + paid for paid in rent], power, [getattr(price.storage, end) * stored for end in ENDS],
            [getattr(price.egress, end) * price.taken for end in ENDS])  # fmt: skip
    devices, electric, storage, egress = ((mid, low, high) for mid, low, high in rows)
    return Bill(devices, electric, storage, egress)


def billed(plan: Plan, device_hours: float, states: Mapping[str, float]) -> float:
    """Of the device-hours that were held, those that are paid: without the rank-seconds of unbilled states, where devices are rented."""
    free = sum(states.get(state, 0.0) for state in plan.price.unbilled or [])
    return device_hours if plan.price.owned else device_hours - free / HOUR


def kept(plan: Plan) -> float:
    """Bytes in storage: the checkpoints kept at once, and the corpus as token ids of four bytes."""
    return plan.checkpoint.keep * float(state_bytes(plan.model)) + 4.0 * (plan.data.tokens or 0)


def weighted(plan: Plan, first: np.datetime64, energies: Array) -> float:
    """Energy weighted by the tariff's hours: what it would be at the mean tariff for the same money [J]."""
    if plan.price.hours is None:
        return float(energies.sum())
    hour = (first + np.arange(len(energies))).astype(int) % 24
    return float(energies @ np.array(plan.price.hours)[hour])
