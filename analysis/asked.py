"""What a person asks of a law and of a cluster: quantities, a plan without its size, a law from a file."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.chinchilla import NAMES
from analysis.known import Known
from analysis.ladder import Ladder
from conf.errors import Refused
from conf.plan import Plan
from conf.program import load
from conf.rules import meshless_problems
from conf.units import read

GPU_CLUSTER = ("data=prepared", "tokenizer=llama3", "model=llama3_8b", "train=large", "checkpoint=half_hour", "failures=llama3",
               "power=hgx", "train.compile=true", "train.seq_len=8192")  # fmt: skip
USUAL = (("gb200", "gb200"), ("gb300", "gb300"), ("h100", "h100_sxm"), ("b200", "b200"), ("b300", "b300"), ("a100", "a100_80"))


def quantity(options: Mapping[str, str], name: str, unit: str, default: float) -> float:
    if not options[name]:
        return default
    try:
        value = read(options[name], unit)
    except ValueError as error:
        raise Refused(f"{name}={options[name]}: {error}") from error
    if not value > 0:
        raise Refused(f"{name}={options[name]} must be more than 0")
    return value


def share_of(options: Mapping[str, str], name: str, none: bool = False) -> float:
    """A share above 0, or with `none` from 0 to less than 1."""
    text = options[name]
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value < 1 if none else 0 < value <= 1):
        raise Refused(f"{name}={text} is no share between 0 and 1; write for example {name}=0.01 or {name}=1%")
    return value


def base_of(words: Sequence[str]) -> Plan:
    """The plan with everything but its size; on a cluster of GPUs, with what large runs have in common."""
    named = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    cluster = named.get("cluster", "laptop")
    common = [] if cluster == "laptop" else [*GPU_CLUSTER, *([] if "gpu" in named else [f"gpu={_usual(cluster)}"])]
    return load([*(word for word in common if word.partition("=")[0] not in named), *words], rules=meshless_problems)


def _usual(cluster: str) -> str:
    found = next((gpu for part, gpu in USUAL if part in cluster), None)
    if found is None:
        raise Refused(f"cluster={cluster} does not say its device; add gpu=…, as in gpu=h100_sxm")
    return found


def law_of(path: str, base: Plan) -> Known:
    """A law from a fit's JSON file, or fitted here to runs (a CSV file or a folder of real's); without either the plan's, or Chinchilla's.

    Raises Refused where the file is none of these.
    """
    if not path:
        law = base.law if base.law.name != "none" else load(["law=chinchilla"]).law
        return Known(np.array([law.irreducible, law.A, law.B, law.alpha, law.beta]))
    if path.endswith(".csv") or Path(path).is_dir():
        return Known.of(Ladder.read(path))
    try:
        told = json.loads(Path(path).read_text())
        return Known(np.array([float(told["parameters"][name]) for name in NAMES]), reach=float(told["range"]["flop"][1]))
    except FileNotFoundError as error:
        raise Refused(f"law={path} does not exist; make it with: foretold analysis scaling data=runs.csv json=true > {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"law={path} has no parameters {', '.join(NAMES)}; it must be what analysis scaling json=true prints") from error
