"""Power caps: how much slower a GPU is below its limit, fitted for each GPU and tried on what was left out of the fit.

Tables as the Zeus project publishes them: one row a workload and cap, with the time of an epoch and the mean power. A workload's
natural draw is what it takes at the highest cap.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.compare import columns
from conf.errors import Refused
from conf.files import write
from sim.kernels import capped

OPTIONS = {
    "tables": ("", "CSV files, one a GPU, with commas: network, batch_size, power_limit [W], time_per_epoch [s], average_power [W]"),
    "out": ("", "CSV file to write: gpu, static, exponent and the errors in percent"),
}
NEEDED = ("network", "batch_size", "power_limit", "time_per_epoch", "average_power")
HEAD = ("gpu", "points", "static", "exponent", "points' error", "median curve's", "workload left out", "GPU left out")


class Law(NamedTuple):
    static: float  # share of the limit
    exponent: float

    def rate(self, points: pd.DataFrame) -> Any:
        return capped(points["power_limit"], points["natural"], self.static * points["limit"], self.exponent)

    def errors(self, points: pd.DataFrame) -> Any:
        """Predicted over measured rate, less 1."""
        return self.rate(points) / points["rate"] - 1


def caps(options: Mapping[str, str]) -> int:
    """Fit, print the errors, and write them when asked to.

    Raises Refused for files that are no such tables.
    """
    if not options["tables"]:
        raise Refused("analysis caps needs tables=…, CSV files of measured power caps, one a GPU")
    every = pd.concat([points_of(Path(path)) for path in options["tables"].split(",")], ignore_index=True)
    rows = [told(str(gpu), part, every[every["gpu"] != gpu]) for gpu, part in every.groupby("gpu", sort=False)]
    frame = pd.DataFrame(rows, columns=["gpu", "points", "static", "exponent", "error", "curve", "workload_left_out", "gpu_left_out"])
    shown = [
        (row[0], f"{row[1]:,}", *(f"{x:.2f}" for x in row[2:4]), *("–" if x is None else f"{x:.1f}%" for x in row[4:])) for row in rows
    ]
    print("\n".join(columns([HEAD, *shown])))
    if len(rows) > 1:
        law = fitted(every)
        print(f"\nall together: static {law.static:.2f} of the limit, exponent {law.exponent:.2f}")
    if options["out"]:
        write(Path(options["out"]), frame.to_csv(index=False))
    return 0


def told(gpu: str, part: pd.DataFrame, others: pd.DataFrame) -> tuple[Any, ...]:
    """A GPU's law, and mean absolute errors in percent: of all points, of the median curve, of each workload and of the GPU left out."""
    law = fitted(part)
    medians = part.assign(told=law.rate(part)).groupby("power_limit")[["told", "rate"]].median()
    left = [_mean(fitted(part[part["network"] != name]), one) for name, one in part.groupby("network") if part["network"].nunique() > 1]
    return (gpu, len(part), law.static, law.exponent, _mean(law, part), 100 * float((medians["told"] / medians["rate"] - 1).abs().mean()),
            float(np.mean(left)) if left else None, _mean(fitted(others), part) if len(others) else None)  # fmt: skip


def _mean(law: Law, points: pd.DataFrame) -> float:
    return 100 * float(law.errors(points).abs().mean())


def points_of(path: Path) -> pd.DataFrame:
    """Rates of every workload below the highest cap, relative to that at it; repeated runs are averaged.

    Raises Refused for a file that is no such table.
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise Refused(f"tables={path} is no CSV table: {' '.join(str(error).split())[:120]}") from error
    if missing := [name for name in NEEDED if name not in frame]:
        raise Refused(f"tables={path} has no column {', '.join(missing)}; a table of caps has {', '.join(NEEDED)}")
    keys = [name for name in ("dataset", "network", "batch_size", "optimizer") if name in frame]
    means = frame.groupby([*keys, "power_limit"], as_index=False)[["time_per_epoch", "average_power"]].mean()
    limit = float(means["power_limit"].max())
    top = means[means["power_limit"] == limit].rename(columns={"time_per_epoch": "fastest", "average_power": "natural"})
    points = means.merge(top[[*keys, "fastest", "natural"]], on=keys)
    points = points[points["power_limit"] < limit]
    return points.assign(gpu=path.stem.rsplit("_", 1)[-1], limit=limit, rate=points["fastest"] / points["time_per_epoch"])


def fitted(points: pd.DataFrame) -> Law:
    """The law with the least absolute relative errors (soft above 3%)."""
    from scipy.optimize import least_squares

    def missed(x: Any) -> Any:
        return Law(*x).errors(points).to_numpy()

    starts, bounds = ((0.1, 1.5), (0.3, 3.0)), ([0.0, 1.0], [0.39, 6.0])
    found = [least_squares(missed, start, bounds=bounds, loss="soft_l1", f_scale=0.03) for start in starts]
    return Law(*map(float, min(found, key=lambda solution: solution.cost).x))
