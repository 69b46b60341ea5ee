"""Nodes of a plan: dataclasses whose quantities become SI floats and that nothing can change afterwards.

Plain `frozen=True` is no use here: OmegaConf turns it into a read-only node that refuses nested overrides.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from conf.duration import Duration
from conf.errors import nearest
from conf.units import read, spell, unit_of

POSITIVE, NOT_NEGATIVE, SHARE = "above 0", "not negative", "a share from 0 to 1"


def say(means: str, default: Any = MISSING, must: Any = None) -> Any:
    """A field with its meaning, and what must hold for its value: POSITIVE, NOT_NEGATIVE, SHARE, or a tuple of choices."""
    metadata = {"means": means, "must": must}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Node:
    """A group of the plan. Text such as "400 Gbit/s" becomes a float on construction; then the node is whole."""

    def __post_init__(self) -> None:
        template = any(getattr(self, name) == MISSING for name in self.__dataclass_fields__)  # for Hydra, which wants the text
        for name, annotation in () if template else hints(type(self)).items():
            unit, value = unit_of(annotation), getattr(self, name)
            if unit and isinstance(value, str):
                object.__setattr__(self, name, _quantity(annotation, value))
            elif varies(annotation) and isinstance(value, int | float):
                object.__setattr__(self, name, Duration(float(value)))
        object.__setattr__(self, "_whole", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_whole"):
            what = "cannot change" if name in self.__dataclass_fields__ else f"has no {name!r} to set;"
            raise AttributeError(f"{type(self).__name__} {what} {name if 'cannot' in what else nearest(name, self.__dataclass_fields__)}")
        object.__setattr__(self, name, value)

    def but(self, **changes: Any) -> Self:
        """A copy with other values; a nested key is written with its dots: `plan.but(**{"cluster.nodes": 4})`."""
        here: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            first, _, rest = key.partition(".")
            if first not in self.__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__} has no {first!r}; {nearest(first, self.__dataclass_fields__)}")
            if rest:
                nested.setdefault(first, {})[rest] = value
            else:
                here[first] = value
        here |= {name: getattr(self, name).but(**inner) for name, inner in nested.items()}
        return dataclasses.replace(self, **here)


def varies(annotation: Any) -> bool:
    """Whether a field holds a duration that may vary."""
    return Duration in getattr(annotation, "__metadata__", ()) or any(varies(a) for a in get_args(annotation) if not isinstance(a, str))


def _quantity(annotation: Any, text: str) -> "float | Duration":
    """The number, or the duration, that a quantity's text says."""
    unit = unit_of(annotation)
    assert unit is not None
    return Duration.read(text) if varies(annotation) else read(text, unit)


def hints(kind: type[Node]) -> dict[str, Any]:
    """The types of a node's fields, units kept."""
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind, include_extras=True)
    return _HINTS[kind]


_HINTS: dict[Any, dict[str, Any]] = {}


def build(kind: type[Node], values: Any, at: str, problems: list[str]) -> Any:
    """A node from plain values, with every problem added to `problems` under its full key."""
    if not isinstance(values, dict):
        problems.append(f"{at}={values!r} is not a group; it has the keys {', '.join(hints(kind))}")
        return None
    known, result = hints(kind), {}
    for name in values.keys() - known.keys():
        problems.append(f"{at}.{name}={values[name]!r} is not a key of {at or 'the plan'}; {nearest(str(name), known)}".lstrip("."))
    for name, annotation in known.items():
        key, declared = f"{at}.{name}".lstrip("."), kind.__dataclass_fields__[name]
        given = name in values and values[name] != MISSING
        default = declared.default_factory() if declared.default_factory in (dict, list) else declared.default
        if not given and isinstance(annotation, type) and issubclass(annotation, Node):
            result[name] = build(annotation, {}, key, problems)
        elif not given and default not in (MISSING, dataclasses.MISSING):
            result[name] = default
        elif not given:
            means = kind.__dataclass_fields__[name].metadata.get("means", "")
            problems.append(f"{key} is missing ({means}); set {key}=…")
        else:
            result[name] = build_value(annotation, values[name], key, problems)
    return kind(**result) if len(result) == len(known) and not problems else None


def leaves(node: Node, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every value of a node with its full key and its field, groups in groups and tables of groups included."""
    for name, field_ in node.__dataclass_fields__.items():
        value, key = getattr(node, name), prefix + name
        inner = {key: value} if isinstance(value, Node) else {}
        if isinstance(value, dict):
            inner = {f"{key}.{k}": v for k, v in value.items() if isinstance(v, Node)}
        if not inner:
            yield key, value, field_
        for at, child in inner.items():
            yield from leaves(child, f"{at}.")


def build_value(annotation: Any, value: Any, key: str, problems: list[str]) -> Any:
    """A value of a field's type from what YAML or the command line gives."""
    if get_origin(annotation) in (Union, UnionType):
        options = get_args(annotation)
        if value is None and NoneType in options:
            return None
        annotation = next(o for o in options if o is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return build(annotation, value, key, problems)
    try:
        return _plain(annotation, value, key, problems)
    except (ValueError, TypeError) as error:
        problems.append(f"{key}={value!r}: {error}" if str(value) not in str(error) else f"{key}: {error}")
        return None


def _plain(annotation: Any, value: Any, key: str, problems: list[str]) -> Any:
    unit, origin = unit_of(annotation), get_origin(annotation)
    if unit:
        return _quantity(annotation, str(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError("expected a table, such as {name: value}")
        inner = get_args(annotation)[1]
        return {str(k): build_value(inner, v, f"{key}.{k}", problems) for k, v in value.items()}
    if origin is list:
        if not isinstance(value, list | tuple):
            raise TypeError("expected a list, such as ['a','b']")
        return [build_value(get_args(annotation)[0], v, f"{key}[{i}]", problems) for i, v in enumerate(value)]
    if annotation is bool and not isinstance(value, bool):
        raise TypeError("expected true or false")
    if annotation is int:
        return _whole_number(value)
    if value is None:
        raise TypeError("it may not be null")
    return annotation(value)


def _whole_number(value: Any) -> int:
    try:
        whole = int(value)
    except (ValueError, TypeError):
        whole = None
    if whole is None or isinstance(value, bool) or float(value) != whole:
        raise TypeError("expected a whole number, such as 2048")
    return whole


def plain(node: Any) -> Any:
    """The node as plain values that `build` accepts again: quantities spelt with their unit, exactly."""
    if isinstance(node, Duration):
        return node.spelt()
    if not isinstance(node, Node):
        if isinstance(node, dict):
            return {k: plain(v) for k, v in node.items()}
        return [plain(v) for v in node] if isinstance(node, list) else node
    return {name: _spelt(annotation, getattr(node, name)) for name, annotation in hints(type(node)).items()}


def _spelt(annotation: Any, value: Any) -> Any:
    unit = unit_of(annotation) if get_origin(annotation) not in (dict, list) else None
    return spell(value, unit) if unit and isinstance(value, float) else plain(value)
