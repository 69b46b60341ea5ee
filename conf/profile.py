"""A profile: measured rates of one machine, fitted by `foretold analysis calibrate`, named by a plan.

name: …            machine: …        created: …
parameters:
  matmul.forward.rate: {value: 8.1e10, unit: FLOP/s, standard_error: 1.2e9}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Refused


@dataclass(frozen=True)
class Parameter:
    """A fitted number with its unit and one standard error (0 where it is a single measurement)."""

    value: float
    unit: str
    standard_error: float = 0.0


@dataclass(frozen=True)
class Profile:
    name: str
    machine: str
    created: str
    precision: str
    ranks: int
    parameters: dict[str, Parameter]


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises Refused for a file that is none.
    """
    from omegaconf import OmegaConf

    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
        parameters = {name: Parameter(float(p["value"]), p["unit"], float(p["standard_error"])) for name, p in found["parameters"].items()}
        head = {name: found[name] for name in ("name", "machine", "created", "precision", "ranks")}
    except Exception as error:  # YAML, its shape, or its numbers
        text = " ".join(str(error).split())
        raise Refused(f"profile={path} is no profile ({text}); make one with: foretold analysis calibrate") from error
    return Profile(**head, parameters=parameters)


def profile_yaml(profile: Profile) -> str:
    lines = [f"{name}: {getattr(profile, name)!r}" for name in ("name", "machine", "created", "precision", "ranks")]
    lines.append("parameters:")
    for name, p in profile.parameters.items():
        lines.append(f"  {name}: {{value: {p.value!r}, unit: {p.unit}, standard_error: {p.standard_error!r}}}")
    return "\n".join(lines) + "\n"
