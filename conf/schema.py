"""The schema table: every key of the plan with its unit, default, meaning, rule and source.

One table feeds help, documents, completion, messages and the report. Values and sources are those of the YAML files: the
comment beside a number, or else the file's `source`.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from conf.node import Node, hints
from conf.plan import Fact, Plan
from conf.units import unit_of

HERE = Path(__file__).parent
_COMMENT = re.compile(r"^(?P<indent> *)(?P<key>[\w.-]+):(?P<rest>.*)$")


class Row(NamedTuple):
    name: str  # group.key
    kind: Any  # its type
    unit: str | None
    default: Any  # as the YAML file of the default plan spells it
    means: str
    must: Any
    source: str
    noted: bool  # whether the source stands beside this very number


def groups() -> dict[str, type[Node]]:
    """The groups of the plan by name."""
    return {n: t for n, t in hints(Plan).items() if isinstance(t, type) and issubclass(t, Node) and t is not Fact}


def choices(group: str) -> list[str]:
    """The options of a group: the files in its folder."""
    return sorted(path.stem for path in (HERE / group).glob("*.yaml"))


def keys(kind: type[Node] = Plan, prefix: str = "") -> dict[str, tuple[Any, str, Any]]:
    """Every key of the plan with its type, meaning and rule."""
    table: dict[str, tuple[Any, str, Any]] = {}
    for name, annotation in hints(kind).items():
        if isinstance(annotation, type) and issubclass(annotation, Node):
            table |= keys(annotation, f"{prefix}{name}.")
        else:
            metadata = kind.__dataclass_fields__[name].metadata
            table[prefix + name] = (annotation, metadata["means"], metadata["must"])
    return table


def defaults() -> dict[str, str]:
    """The option that the default plan takes of every group."""
    listed = yaml.safe_load((HERE / "plan.yaml").read_text())["defaults"]
    return {k: str(v) for item in listed if isinstance(item, dict) for k, v in item.items() if " " not in k}


@cache
def rows(group: str, option: str) -> tuple[Row, ...]:
    """The rows of one group as one of its options fills them; keys left out show their default."""
    path = HERE / group / f"{option}.yaml"
    values, notes = yaml.safe_load(path.read_text()), comments(path)
    found = []
    for name, (kind, means, must) in keys(groups()[group], f"{group}.").items():
        inner = name.removeprefix(f"{group}.")
        value = _dig(values, inner.split("."))
        if value is _ABSENT:
            value = default_of(groups()[group], inner)
        found.append(Row(name, kind, unit_of(kind), value, means, must, notes.get(inner, str(values.get("source", ""))), inner in notes))
    return tuple(found)


_ABSENT = object()


def _dig(values: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return _ABSENT
        values = values[part]
    return values


def default_of(kind: type[Node], path: str) -> Any:
    """A key's default as its field declares it."""
    first, _, rest = path.partition(".")
    if rest:
        return default_of(hints(kind)[first], rest)
    field = kind.__dataclass_fields__[first]
    return field.default if field.default is not None else None


def comments(path: Path) -> dict[str, str]:
    """The comment beside each key of a YAML file, nested keys with their dots.

    >>> comments(HERE / "gpu" / "h100_sxm.yaml")["bf16_peak"]
    'dense; data sheet'
    """
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = _COMMENT.match(line)
        if not match:
            continue
        indent = len(match["indent"])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, match["key"]))
        _, mark, note = match["rest"].partition(" #")
        if mark:
            found[".".join(key for _, key in stack)] = note.strip()
    return found
