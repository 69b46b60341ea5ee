"""Published failures and effective times beside what the other sources say of them.

A cluster is left out, and foretold from the rest: its failures as Poisson at a rate that is lognormal between clusters, its
effective time from the recovery of others. What a source says of itself is never used for it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import poisson, t

from conf.errors import Refused
from conf.program import flag
from conf.units import show
from sim.expect import useful

OPTIONS = {"json": ("false", "print one JSON object instead of tables")}
FACTS = Path(__file__).parent / "facts" / "clusters.csv"
QUANTILES = (np.arange(400) + 0.5) / 400  # equal slices of a distribution
BAND = (0.05, 0.95)
HOUR, MINUTE, TINY = 3600.0, 60.0, 1e-3  # [s]


class Row(NamedTuple):
    name: str
    low: float
    high: float
    published: float
    implied: float | None = None  # recovery that the published effective time implies [min]

    @property
    def inside(self) -> bool:
        return self.low <= self.published <= self.high


def reliability(options: Mapping[str, str]) -> int:
    """Print both tables."""
    facts = pd.read_csv(FACTS)
    counts, times = counted(facts), effective(facts)
    if flag(options, "json"):
        print(json.dumps({"failures": [_told(row) for row in counts], "ettr": [_told(row) for row in times]}))
    else:
        print(_table("failures, 90% band from the other clusters", counts, lambda value: f"{value:,.0f}"))
        print()
        print(_table("effective time (ETTR), 90% band from the recovery of others", times, lambda value: f"{value:.3f}"))
    return 0


def between(values: np.ndarray[Any, Any], quantiles: Any) -> Any:
    """Quantiles of one more value of a lognormal of which some are known: Student's t on the logarithms, with n − 1 degrees.

    >>> between(np.array([1.0, 1.0, 1.0]), 0.3)
    1.0
    """
    if len(values) < 2:
        raise Refused("fewer than two other sources; nothing can be said of the spread between them")
    logs = np.log(values)
    spread = logs.std(ddof=1) * np.sqrt(1 + 1 / len(logs))
    told = np.exp(logs.mean() + t.ppf(quantiles, len(logs) - 1) * spread)
    return float(told) if np.isscalar(quantiles) else told


def counted(facts: pd.DataFrame) -> list[Row]:
    """Each cluster's failures beside the band that the rates of the others leave: Poisson mixed over their spread."""
    clusters = facts[facts["kind"] == "rate"].set_index("name")
    exposure = clusters["servers"] * clusters["days"]
    rows = []
    for name in clusters.index:
        others = clusters.index != name
        rates = between((clusters["failures"] / exposure)[others].to_numpy(), QUANTILES)
        counts = poisson.ppf(QUANTILES[None, ::10], exposure[name] * rates[:, None])
        low, high = map(float, np.quantile(counts, BAND))
        rows.append(Row(str(name), low, high, float(clusters["failures"][name])))
    return rows


def effective(facts: pd.DataFrame) -> list[Row]:
    """Each run's effective time beside the band that the recoveries of others leave, by F1 of the notes (sim/expect.py).

    Recoveries by hand are told from those by machine; those of the run itself are left out.
    """
    runs, recoveries = facts[facts["kind"] == "ettr"], facts[facts["kind"] == "recovery"]
    rows = []
    for run in runs.to_dict("records"):
        own = recoveries["name"].str.startswith(run["name"].split(" ")[0])
        replicas = "replicas" in run["name"]
        alike = recoveries[(recoveries["hands"] == run["hands"]) & ~own]
        known = alike["minutes"].to_numpy()
        known = known[known < 5] if replicas else known  # a stall is not a restart: only the swift ones say something of it
        slow, fast = (between(known, quantile) for quantile in reversed(BAND))

        failures = 1 / (run["mtbf_h"] * HOUR)
        spotless = useful(failures, run["work_min"] * MINUTE or TINY, run["save_s"], 0.0)  # if recovery took no time
        published = float(run["ettr"])
        low, high = (spotless / (1 + failures * minutes * MINUTE) for minutes in (slow, fast))
        implied = (spotless / published - 1) / failures / MINUTE
        rows.append(Row(str(run["name"]), low, high, published, implied))
    return rows


def _told(row: Row) -> dict[str, Any]:
    return row._asdict() | {"inside": row.inside}


def _table(title: str, rows: list[Row], number: Callable[[float], str]) -> str:
    lines = [title]
    for row in rows:
        implied = "" if row.implied is None else f"   implies {show(row.implied * MINUTE, 's')} a recovery"
        verdict = "inside" if row.inside else "OUTSIDE"
        lines.append(
            f"  {row.name:22} {number(row.low):>7} … {number(row.high):>7}   published {number(row.published):>7}   {verdict}{implied}"
        )
    return "\n".join([*lines, f"  {sum(row.inside for row in rows)} of {len(rows)} inside"])
