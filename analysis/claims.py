"""Published claims of energy and carbon: given the hours they are mere multiplication, and some do not even multiply.

    energy = device-hours × watts × PUE,   carbon = energy × intensity

What was printed before PUE, or with PUE folded into the intensity, is compared as it was printed. Where the plan of a run is
known, its hours are predicted too.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pandas as pd

from analysis.rows import Replayed, Unplayable, each, records, tabled
from conf.program import load
from sim.expect import expected
from sim.pace import pace

ENERGY = ("model", "gpu_hours", "avg_power_w", "pue", "carbon_intensity_g_per_kwh", "energy_mwh", "tco2e")
DOUBT = 3.0  # times that a claim may be off its own arithmetic before it contradicts itself
BEFORE_PUE = re.compile("gopher|starcoder|olmo", re.IGNORECASE)  # their energy was printed without the building's overhead
META = 385 * 1.1  # gCO2e/kWh, PUE included: mean of the USA and PUE of the LLaMA paper, table 15; later cards print neither
# Runs whose model, cluster and tokens were published. BLOOM's hours are of all its 366 billion tokens, those of the growing batch included;
# LLaMA's paper counts OPT's 34 days of training alone, not its failures.
RUNS = (
    (r"GPT-3-175B", ("experiment=gpt3_175b",)), (r"BLOOM-17[56]B( dynamic| \(re)", ("experiment=bloom_176b", "train.steps=87262")),
    (r"OPT-175B", ("experiment=opt_175b", "failures=none", "cluster.spares=0")), (r"LLaMA-65B", ("experiment=llama_65b",)),
    (r"Llama-3.1-405B", ("experiment=llama3_405b_full",)), (r"Llama-2-70B", ("experiment=llama2_70b",)),
    (r"T5-11B", ("experiment=t5_11b",)), (r"Gopher-280B", ("experiment=gopher_280b",)),
)  # fmt: skip


class Claim(NamedTuple):
    """What a publication says; None where it does not. Energy in MWh, intensity in gCO2e/kWh, carbon in t."""

    hours: float | None
    watts: float | None
    pue: float
    intensity: float | None
    energy: float | None
    tco2e: float | None
    before_pue: bool = False

    def arithmetic(self, hours: float | None = None) -> dict[str, float]:
        """Energy and carbon that follow from the hours, or from others; carbon from the printed energy where no hours are known."""
        hours = self.hours if hours is None else hours
        told = {}
        drawn = hours * self.watts / 1e6 if hours and self.watts else None
        if drawn is not None:
            told["energy_mwh"] = drawn * (1.0 if self.before_pue else self.pue)
        whole = drawn * self.pue if drawn is not None else (self.energy or 0.0) * (self.pue if self.before_pue else 1.0)
        if whole and self.intensity is not None:
            told["tco2e"] = whole * self.intensity / 1e3
        return told

    def contradictions(self) -> dict[str, str]:
        """Printed quantities that are further from their own arithmetic than DOUBT allows."""
        printed = {"energy_mwh": self.energy, "tco2e": self.tco2e}
        found = {}
        for name, value in self.arithmetic().items():
            said = printed[name]
            if said and not 1 / DOUBT < value / said < DOUBT:
                times = max(value / said, said / value)
                found[name] = f"contradicts itself: {self.said()} make {name}={value:,.4g}, {times:,.0f} times off the {said:g} printed"
        return found

    def said(self) -> str:
        parts = [f"{self.hours:,.0f} h × {self.watts:g} W" if self.hours and self.watts else f"{self.energy:g} MWh"]
        parts += [f"PUE {self.pue:g}"] if self.pue != 1 else []
        return " × ".join(parts + ([f"{self.intensity:.4g} g/kWh"] if self.intensity is not None else []))


def claim_of(row: Mapping[str, Any]) -> Claim:
    """The claim of a row. An intensity that was worked out from the row's own carbon is no evidence; Meta's is its papers'."""
    said, model = str(row["carbon_intensity_g_per_kwh"]), f"{row['model']} {row.get('source', '')}"
    intensity = _number(said)
    if "implied" in said:
        intensity = META if "llama" in model.lower() else None
    return Claim(_number(row["gpu_hours"]), _number(row["avg_power_w"]), _number(row["pue"]) or 1.0, intensity,
                 _number(row["energy_mwh"]), _number(row["tco2e"]), BEFORE_PUE.search(model) is not None)  # fmt: skip


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if pd.isna(number) else number


def long(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a printed quantity and way of predicting it; a row that prints neither energy nor carbon keeps one line."""
    lines = []
    for row in records(frame):
        known = [name for name in ("energy_mwh", "tco2e") if _number(row[name]) is not None]
        planned = any(re.search(pattern, str(row["model"])) for pattern, _ in RUNS)
        for how in ("given hours", *(["from the plan"] if planned else [])):
            for name in known or ["energy_mwh"]:
                about = {"id": f"{row['id']} {name}" + (" from the plan" if how == "from the plan" else ""), "row": row["id"]}
                lines.append({**row, **about, "group": f"{name}, {how}", "quantity": name, "how": how, "printed": row[name]})
    return pd.DataFrame(lines)


def claims_of(frame: pd.DataFrame) -> Replayed:
    """The printed quantity of every line."""
    found, failed = each(frame, _predicted)
    values = list(found.values())
    ideal = [float(frame["gpu_hours"][index]) if not pd.isna(frame["gpu_hours"][index]) else 1.0 for index in found]
    return Replayed(tabled(list(found), values, [0.1] * len(values), ideal, [frame["quantity"][index] for index in found],
                           [frame["how"][index] for index in found]), failed)  # fmt: skip


def _predicted(row: Mapping[str, Any]) -> float:
    claim, name = claim_of(row), str(row["quantity"])
    if name in (wrong := claim.contradictions()):
        raise Unplayable(wrong[name])
    told = claim.arithmetic(_hours(str(row["model"])) if row["how"] == "from the plan" else None)
    if name not in told:
        raise Unplayable("states no hours with their power" if name == "energy_mwh" else
                         "states no energy or hours with an intensity that is not worked out from its own carbon")  # fmt: skip
    return told[name]


def _hours(model: str) -> float:
    """Device-hours of the plan that replays the run."""
    return _planned(next(words for pattern, words in RUNS if re.search(pattern, model)))


@cache
def _planned(words: tuple[str, ...]) -> float:
    plan = load(words)
    return expected(plan, pace(plan))["run.gpu_hours"]
