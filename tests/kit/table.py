"""Predictions beside measurements: every row, also the bad ones, and the figures that are asked for."""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.files import write as put
from tests.kit.foretell import FORETOLD, MEASURED, UNDONE, read

Pair = Mapping[str, Any]  # what is foretold and measured of a row, the second under measured_…
COMPARED = {"step_time": ("step", 0.05, 0.10), "memory": ("peak memory", 0.03, 0.08), "energy": ("energy of a step", 0.08, None)}
COLUMNS = ("name", "status", "at", "plan", *(f"{side}{name}" for name in (*COMPARED, "mfu") for side in ("", "measured_")), "spread",
           "reserved", "watts", "steps", "finite", "falls", "seconds", "ours_tokens_per_s", "by_hand_tokens_per_s",
           "transformers_tokens_per_s", "by_hand_left_out", "transformers_left_out")  # fmt: skip


def pairs(folder: Path, profile: str = "") -> list[Pair]:
    """Every row with a prediction by this profile, in the order in which they were executed."""
    ended = {(row["name"], row["plan"]): row for row in read(folder / MEASURED) if row["status"] not in UNDONE}
    told = {(row["name"], row["plan"]): row for row in read(folder / FORETOLD) if row["profile"] == profile}
    order = [*(key for key in ended if key in told), *(key for key in told if key not in ended)]
    return [_joined(told[key], ended.get(key, {"status": "not executed"})) for key in order]


def _joined(told: Pair, found: Pair) -> Pair:
    both = {f"measured_{name}": found.get(name) for name in COMPARED}
    if "mfu" in told and "step_time" in found:  # of the same FLOPs and peak
        both["measured_mfu"] = told["mfu"] * told["step_time"] / found["step_time"]
    return {**told, **both, **{name: value for name, value in found.items() if name not in (*COMPARED, "at")}}


def error(pair: Pair, name: str) -> float | None:
    """Foretold over measured, less 1."""
    measured = pair[f"measured_{name}"]
    return pair[name] / measured - 1 if measured else None


def write(folder: Path, profile: str = "") -> str:
    """table.csv and table.md; returns the latter."""
    found = pairs(folder, profile)
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    put(folder / "table.csv", out.getvalue())
    text = markdown(found)
    put(folder / "table.md", text)
    return text


def markdown(found: Sequence[Pair]) -> str:
    head = ["configuration", "step, ms: foretold", "measured", "error", "memory, GB: foretold", "measured", "error", "reserved",
            "energy, J: foretold", "measured", "error", "MFU: foretold", "measured", "loss"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(_cells(pair))} |" for pair in found]
    return "\n".join([*lines, "", *(f"- {said}" for said in figures(found))]) + "\n"


def _cells(pair: Pair) -> Iterator[str]:
    yield pair["name"] if pair["status"] == "done" else f"{pair['name']}: **{pair['status']}**"
    for name, scale, digits in (("step_time", 1e3, 1), ("memory", 1e-9, 2), ("energy", 1.0, 0)):
        yield _number(pair[name], scale, digits)
        yield _number(pair[f"measured_{name}"], scale, digits)
        yield _share(error(pair, name))
        if name == "memory":
            yield _number(pair.get("reserved"), scale, digits)
    yield from (f"{pair[name]:.1%}" if pair.get(name) else "–" for name in ("mfu", "measured_mfu"))
    if pair["status"] != "done" or pair["finite"]:
        yield {None: "–", True: "falls", False: "does not fall"}[pair.get("falls")]
    else:
        yield "no number"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def figures(found: Sequence[Pair]) -> Iterator[str]:
    """What was asked, beside what came out; nothing is said of what was not measured."""
    done = [pair for pair in found if pair["status"] == "done"]
    yield f"{len(done)} of {len(found)} configurations executed (asked: at least 30)"
    for name, (words, middle, most) in COMPARED.items():
        errors = [abs(off) for pair in done if (off := error(pair, name)) is not None]
        if errors:
            worst = f", at most {most:.0%}" if most else ""
            yield (f"{words}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%} of {len(errors)} "
                   f"(asked: median {middle:.0%}{worst})")  # fmt: skip
    for words, asked, best in _mfu(done):
        yield f"MFU of {words}: at best {best:.1%} (asked: at least {asked:.0%})"
    by_name = {pair["name"]: pair for pair in done}
    for name, pair in by_name.items():
        twin = by_name.get(name.replace(" fp8 ", " bf16 ")) or by_name.get(name.replace(" fp8 ", " bf16 ") + " beside")
        if " fp8 " in name and twin:
            ratio = twin["measured_step_time"] / pair["measured_step_time"]
            yield f"fp8 over bf16, {name.replace(' fp8', '')}: {ratio:.3f} (asked: at least 1.2 on large ones)"
        for other, asked in (("by_hand", 1.0), ("transformers", 1.15)):
            if rate := pair.get(f"{other}_tokens_per_s"):
                ratio = pair["ours_tokens_per_s"] / rate
                yield f"{name}: {ratio:.3f} of the tokens/s of {other.replace('_', ' ')} (asked: at least {asked})"
            elif why := pair.get(f"{other}_left_out"):
                yield f"{name}: {other.replace('_', ' ')} left out: {why}"


def _mfu(done: Sequence[Pair]) -> Iterator[tuple[str, float, float]]:
    for words, asked, size, length in (("1b in bf16", 0.5, "1b", None), ("layers of 8b in bf16 at 8192", 0.45, "8b/6", "8192")):
        rows = [pair for pair in done if pair["name"].split()[0] == size and " bf16 " in pair["name"] and pair.get("measured_mfu")]
        rows = [pair for pair in rows if length is None or pair["name"].split()[1] == length]
        if rows:
            yield words, asked, max(pair["measured_mfu"] for pair in rows)
