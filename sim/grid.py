"""The grid: what a joule costs the air in each hour, and which hours are worth waiting for.

A tide table: the water comes and goes whatever the boat does; who has time sails with it.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from conf.hourly import hour_of, hours_of
from conf.plan import Grid

Array = NDArray[np.float64]
HOUR = 3600.0


def carbon(grid: Grid, start: str, stops: Array, watts: Array) -> float:
    """Location-based carbon of power that is `watts[i]` from `stops[i]` to `stops[i + 1]`, seconds after `start` [gCO2e]."""
    first, energies = by_hour(start, stops, watts)
    return float(energies @ intensities(grid, first, len(energies)))


def by_hour(start: str, stops: Array, watts: Array) -> tuple[np.datetime64, Array]:
    """The first full hour (UTC) and the energy of each hour from it on [J].

    The meter's reading is a broken line; its differences between full hours are the hours' energies, exactly.
    """
    reading = np.concatenate([[0.0], np.cumsum(watts * np.diff(stops))])
    first, offset = full_hour(start)
    count = int((offset + stops[-1]) // HOUR) + 1
    edges = np.arange(count + 1) * HOUR - offset
    energies = np.diff(np.interp(edges, stops, reading))
    assert abs(energies.sum() - reading[-1]) <= 1e-9 * reading[-1], "the hours do not cover the run"
    return first, np.asarray(energies)


def full_hour(start: str) -> tuple[np.datetime64, float]:
    """The full hour (UTC) in which a run starts, and the seconds since then.

    >>> full_hour("2026-01-31T23:30")
    (np.datetime64('2026-01-31T23','h'), 1800.0)
    """
    moment = hour_of(start)
    hour = moment.replace(minute=0, second=0, microsecond=0)
    return np.datetime64(hour, "h"), (moment - hour).total_seconds()


def intensities(grid: Grid, first: np.datetime64, count: int) -> Array:
    """Intensity of `count` hours from `first` on; a year of hours, or a profile of months and hours, stands for all years [gCO2e/J]."""
    hours = first + np.arange(count)
    if grid.hourly is not None:
        year = np.array(hours_of(grid).values)
        return np.asarray(year[_of_year(hours, grid.year)])
    if grid.profile is None:
        return np.full(count, grid.intensity)
    month = hours.astype("datetime64[M]").astype(int) % 12
    return np.asarray(grid.intensity * np.array(grid.profile)[month, hours.astype(int) % 24])


def _of_year(hours: NDArray[np.datetime64], year: int) -> NDArray[np.int64]:
    """The same month, day and hour as an hour of that year; a 29th of February that it lacks is its 28th."""
    months, begin = hours.astype("datetime64[M]"), np.datetime64(f"{year}-01", "M")
    same = begin + months.astype(int) % 12
    into = (hours - months.astype("datetime64[h]")).astype(int)
    length = ((same + 1).astype("datetime64[h]") - same.astype("datetime64[h]")).astype(int)
    into = np.where(into >= length, into - 24, into)
    return np.asarray((same.astype("datetime64[h]") - begin.astype("datetime64[h]")).astype(int) + into)


class Shift(NamedTuple):
    """When to work in a window of hours, and what that saves."""

    delay: int  # hours until the start
    paused: tuple[int, ...]  # hours after the start that are not worked in
    saved: float  # share of the carbon of working from the first hour on; the idle power of pauses not counted


def best_start(hours: Array, work: int) -> Shift:
    """The start whose `work` hours in a row emit least, within the window that `hours` spans.

    >>> best_start(np.array([3.0, 3.0, 1.0, 2.0, 4.0]), 2)
    Shift(delay=2, paused=(), saved=0.5)
    """
    sums = np.convolve(hours, np.ones(work), "valid")
    delay = int(np.argmin(sums))
    return Shift(delay, (), float(1 - sums[delay] / sums[0]))


def best_pauses(hours: Array, work: int) -> Shift:
    """With perfect foresight: work in the cleanest `work` hours of the window, pause in the others before the last of them.

    >>> best_pauses(np.array([3.0, 2.0, 1.0, 9.0, 2.0]), 3)
    Shift(delay=1, paused=(2,), saved=0.16666666666666663)
    """
    chosen = np.sort(np.argsort(hours, kind="stable")[:work])
    begin, end = int(chosen[0]), int(chosen[-1])
    paused = tuple(int(hour) - begin for hour in np.setdiff1d(np.arange(begin, end + 1), chosen))
    return Shift(begin, paused, float(1 - hours[chosen].sum() / hours[:work].sum()))


def shifted(grid: Grid, start: str, duration: float) -> Shift:
    """What the plan does with the time until its deadline, for a run of so many seconds.

    Raises ValueError with one line when the deadline cannot be met.
    """
    if grid.deadline is None:
        return Shift(0, (), 0.0)
    window, work = (hour_of(grid.deadline) - hour_of(start)).total_seconds() / HOUR, duration / HOUR
    if work > window:
        raise ValueError(f"grid.deadline={grid.deadline} cannot be met: the run is expected to take {work:,.1f} h from start={start} on, "
                         f"{work - window:,.1f} h more than there are; set a later deadline, or more nodes or fewer steps")  # fmt: skip
    if grid.shift == "none" or math.ceil(work) > math.floor(window):
        return Shift(0, (), 0.0)
    hours = intensities(grid, full_hour(start)[0], math.floor(window))
    return (best_start if grid.shift == "start" else best_pauses)(hours, math.ceil(work))
