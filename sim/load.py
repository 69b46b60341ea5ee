"""The run as a load on the grid: its power over time, how fast it changes, and how it swings with every step.

Ranks are in step, so what one does all do: a cluster that waits for a collective is a load that drops by half, ten times a minute
or a hundred (Choukse et al. 2025, arXiv 2508.14318, on what utilities limit: ramp, range, and the swing from 0.1 to 20 Hz).
"""

import cmath
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.files import write
from sim.grid import Array, full_hour, intensities
from sim.pace import Pace
from sim.power import Meter
from sim.timeline import Timeline

SECOND = 1.0


class Load(NamedTuple):
    mean_power: float  # [W]
    peak_to_mean: float
    ramp: float  # largest change of the mean power of a second to that of the next [W/s]
    swing: float  # amplitude of a step's fundamental [W]
    swing_frequency: float  # one over the step time [Hz]


def load(meter: Meter, timeline: Timeline, pace: Pace, peak: float) -> Load:
    """The run's load; `peak` is its highest power of a moment [W]."""
    stops, watts = np.array([0.0, *(s.stop for s in timeline.segments)]), meter.draw(timeline)
    mean = float(watts @ np.diff(stops) / stops[-1])
    return Load(mean, peak / mean, ramp(stops, watts), swing(meter.table, pace.mix), 1 / pace.step_time)


def ramp(stops: Array, watts: Array) -> float:
    """Largest change from the mean of one second to the mean of the next, wherever the two meet [W/s].

    It is largest where power changes at that moment, a second before or a second after.

    >>> ramp(np.array([0.0, 10.0, 10.5, 20.0]), np.array([4.0, 2.0, 4.0]))
    1.0
    """
    reading = np.concatenate([[0.0], np.cumsum(watts * np.diff(stops))])
    meets = np.concatenate([stops - SECOND, stops, stops + SECOND])
    meets = meets[(meets >= SECOND) & (meets <= stops[-1] - SECOND)]
    if not len(meets):
        return 0.0
    before, at, after = (np.interp(meets + shift, stops, reading) for shift in (-SECOND, 0.0, SECOND))
    return float(np.max(np.abs(after - 2 * at + before)) / SECOND**2)


def swing(table: Mapping[str, float], mix: Mapping[str, float]) -> float:
    """Amplitude at the frequency of steps, with the parts of a step in a row: the most that it can be [W].

    2 |∫ P(x) exp(−2πix) dx| over a step. Half a step at 2 W and half at 1 W swing by 2/π W:

    >>> round(swing({"compute": 2.0, "bubble": 1.0}, {"compute": 0.5, "bubble": 0.5}), 4)
    0.6366
    """
    total, at = 0j, 0.0
    for state, share in mix.items():
        turned = (cmath.exp(-2j * cmath.pi * x) for x in (at, at + share))
        first, last = turned
        total += table[state] * (first - last) / (2j * cmath.pi)
        at += share
    return 2 * abs(total)


def write_power(meter: Meter, timeline: Timeline, start: str, folder: Path) -> None:
    """power.csv: power [W] and the grid's intensity [gCO2e/kWh] from each moment `at` to the next [s]."""
    at, watts = np.array([s.start for s in timeline.segments]), meter.draw(timeline)
    changes = np.concatenate([[True], watts[1:] != watts[:-1]]) if len(watts) else np.zeros(0, bool)
    first, offset = full_hour(start)
    hours = np.arange(int((offset + timeline.until) // 3600) + 1)
    moments = np.unique(np.concatenate([at[changes], np.maximum(0.0, hours * 3600 - offset), [timeline.until]]))
    moments = moments[moments <= timeline.until]
    place = np.minimum(np.searchsorted(at, moments, "right") - 1, len(at) - 1)
    intensity = intensities(meter.plan.grid, first, len(hours)) * 3.6e6
    now = np.minimum(((moments + offset) // 3600).astype(int), len(hours) - 1)
    rows = zip(moments.tolist(), watts[place].tolist(), intensity[now].tolist(), strict=True)
    write(folder / "power.csv", "at,power,intensity\n" + "".join(f"{moment!r},{power!r},{grams:.6g}\n" for moment, power, grams in rows))
