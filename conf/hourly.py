"""A year of hourly carbon intensities from a CSV file: a column of times in UTC, and one of gCO2e/kWh for each region.

A gap is refused, and interpolated only when the plan asks for it: a missing hour is not a clean one.
"""

import csv
import math
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

from conf.plan import Grid, Plan, digest


class Hours(NamedTuple):
    """Every hour of a year [gCO2e/J], and how many of them the file did not have."""

    values: tuple[float, ...]
    filled: int


def hours_of(grid: Grid) -> Hours:
    """The year of `grid.hourly`.

    Raises ValueError with one line for a file that is no such table, of another year, or with gaps that nobody asked to fill.
    """
    path = Path(str(grid.hourly))
    if not path.is_file():
        raise ValueError(f"grid.hourly={path} is no file; give a CSV file of times (UTC) and gCO2e/kWh")
    return _read(path, digest(path), grid.year, grid.region, grid.fill)


@cache
def _read(path: Path, content: str, year: int, region: str | None, fill: bool) -> Hours:
    """Read once for each content."""
    seen = _rows(path, region)
    years = sorted({moment.year for moment in seen})
    if year not in years:
        raise ValueError(f"grid.hourly={path} is of {' and '.join(map(str, years))}, but grid.year={year}; set grid.year={years[-1]}")
    first = datetime(year, 1, 1)
    count = round((datetime(year + 1, 1, 1) - first) / timedelta(hours=1))
    known = [(hour, value) for hour in range(count) if (value := seen.get(first + timedelta(hours=hour), math.nan)) >= 0]
    missing = count - len(known)
    if missing and not (fill and known):
        have = {hour for hour, _ in known}
        gap = first + timedelta(hours=next(hour for hour in range(count) if hour not in have))
        raise ValueError(f"grid.hourly={path} lacks {missing:,} of the {count:,} hours of {year}, the first at {gap:%Y-%m-%dT%H:%M}; "
                         "complete it, or set grid.fill=true to interpolate")  # fmt: skip
    return Hours(tuple(value / 3.6e6 for value in _whole(known, count)), missing)


def _rows(path: Path, region: str | None) -> dict[datetime, float]:
    """Intensity by hour; nan where the cell holds no number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            head, *rows = [row for row in csv.reader(lines) if row]
    except (OSError, ValueError) as error:
        raise ValueError(f"grid.hourly={path} is no CSV table of times and intensities ({error})") from error
    regions = head[1:]
    if region is None and len(regions) != 1:
        raise ValueError(f"grid.hourly={path} has the columns {', '.join(regions) or 'none'}; choose one with grid.region=…")
    if region is not None and region not in regions:
        raise ValueError(f"grid.region={region} is no column of grid.hourly={path}; it has {', '.join(regions)}")
    place = 1 if region is None else 1 + regions.index(region)
    try:
        return {_hour(row[0]): _number(row[place]) if len(row) > place else math.nan for row in rows}
    except ValueError as error:
        raise ValueError(f"grid.hourly={path}: {error}; write times as 2022-01-31T23:00, in UTC") from error


def hour_of(text: str) -> datetime:
    """A date and hour in UTC.

    Raises ValueError for a text that is none.

    >>> hour_of("2026-01-31T23:30+01:00")
    datetime.datetime(2026, 1, 31, 22, 30)
    """
    moment = datetime.fromisoformat(text.strip())
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _hour(text: str) -> datetime:
    return hour_of(text).replace(minute=0, second=0, microsecond=0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(known: list[tuple[int, float]], count: int) -> list[float]:
    """Every hour, with gaps on the straight line between their neighbours.

    >>> _whole([(1, 10.0), (3, 30.0)], 5)
    [10.0, 10.0, 20.0, 30.0, 30.0]
    """
    values, before = [], known[0]
    later = iter(known)
    after = next(later)
    for hour in range(count):
        while after[0] < hour and (following := next(later, None)):
            before, after = after, following
        (left, low), (right, high) = before, after
        share = 0.0 if right == left else min(1.0, max(0.0, (hour - left) / (right - left)))
        values.append(low + share * (high - low))
    return values


def dated(plan: Plan) -> dict[str, str]:
    """Of when the prices and of where the hours are, for every report: without, cost and carbon mean nothing."""
    grid = f"{plan.grid.name}, {plan.grid.year}"
    if plan.grid.hourly:
        filled = hours_of(plan.grid).filled
        grid += f", hourly from {Path(plan.grid.hourly).name}" + (f", {filled:,} missing hours interpolated" if filled else "")
    return {"prices": f"of {plan.price.as_of}, in USD" + (", devices owned" if plan.price.owned else ""), "grid": grid}
