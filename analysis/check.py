"""Does a claim of energy and carbon multiply? Hours, watts, PUE and intensity against what was printed."""

from collections.abc import Mapping

from analysis.claims import Claim
from conf.errors import Refused
from conf.schema import choices, rows
from conf.units import read, show

OPTIONS = {
    "hours": ("", "device-hours"),
    "power": ("", "watts of a device"),
    "pue": ("1", "power usage effectiveness, 1 where the claim leaves it out"),
    "intensity": ("", "gCO2e/kWh of the grid; empty = what the claim implies is held against the grids of conf"),
    "energy": ("", "MWh printed"),
    "tco2e": ("", "tCO2e printed"),
}
ROOM = 1.5  # times that an implied intensity may lie beyond the cleanest and the dirtiest grid


def check(options: Mapping[str, str]) -> int:
    """Print what follows from the claim; status 1 when it contradicts itself.

    Raises Refused for numbers that are none, or too few.
    """
    hours, watts, pue, intensity, energy, tco2e = (_number(options, name) for name in OPTIONS)
    claim = Claim(hours, watts, pue or 1.0, intensity, energy, tco2e)
    told = claim.arithmetic()
    if not told and not (energy and tco2e):
        raise Refused("analysis check needs hours=… and power=…, or energy=… with tco2e=… or intensity=…; for example "
                      "foretold analysis check hours=7e6 power=700 tco2e=12.9")  # fmt: skip
    for name, value in told.items():
        print(f"{name:12} {value:,.4g}   {claim.said()}")
    wrong = list(claim.contradictions().values())
    base = energy or told.get("energy_mwh")
    if intensity is None and tco2e and base:
        implied, (clean, dirty) = tco2e / base * 1e3, _grids()
        print(f"{'implied':12} {implied:,.4g} gCO2e/kWh")
        if not clean / ROOM <= implied <= dirty * ROOM:
            wrong.append(f"contradicts every grid: {implied:,.3g} gCO2e/kWh is not between {clean:.3g} and {dirty:.3g}, the cleanest and "
                         f"the dirtiest of conf/grid; at the mean of the USA it would be {show(base * 385e3, 'gCO2e')}")  # fmt: skip
    print("\n".join(wrong) if wrong else "consistent")
    return 1 if wrong else 0


def _number(options: Mapping[str, str], name: str) -> float | None:
    if not options[name]:
        return None
    try:
        number = float(options[name])
    except ValueError:
        raise Refused(f"{name}={options[name]} is no number; write for example {name}=700") from None
    if not number >= 0:
        raise Refused(f"{name}={options[name]} must not be negative")
    return number


def _grids() -> tuple[float, float]:
    """Lowest and highest yearly mean of conf/grid [gCO2e/kWh]."""
    texts = [str(row.default) for name in choices("grid") for row in rows("grid", name) if row.name == "grid.intensity"]
    means = [read(text, "gCO2e/kWh") for text in texts]
    return min(mean for mean in means if mean > 0), max(means)
