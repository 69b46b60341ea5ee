"""The program: `foretold VERB [options] [group=option] [key=value]`.

A verb's own options are taken out first; what is left overrides the plan, which Hydra composes once.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from conf.errors import Refused, nearest
from conf.node import build, build_value, plain
from conf.plan import Plan
from conf.rules import problems as broken_rules
from conf.schema import choices, default_of, defaults, groups, keys, rows
from conf.units import unit_of

HERE = Path(__file__).parent
VERBS = {
    "sim": "predict a plan",
    "real": "execute a plan",
    "analysis": "compare prediction and measurement, calibrate, report",
}
HELP = """foretold: one plan, predicted, executed and compared

  foretold sim       [options] [group=option] [key=value]   predict a plan
  foretold real      [options] [group=option] [key=value]   execute it
  foretold analysis  compare | calibrate | report           put the two side by side

The same plan has the same id everywhere; its records lie in runs/<id>/sim and runs/<id>/real.
`eval "$(foretold completion)"` in ~/.bashrc completes verbs, groups, options and keys with TAB.
`foretold VERB --help` shows a verb's options and the plan's groups, `foretold VERB --help GROUP` the keys of a group.
"""
Options = Mapping[str, tuple[str, str]]  # name: (default, meaning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; a user's mistake ends in one line a problem and status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] in ("completion", "complete"):
        from conf.complete import SCRIPT, complete

        print(SCRIPT if args[0] == "completion" else "\n".join(complete(args[1:])))
        return 0
    verb = args.pop(0)
    try:
        if verb not in VERBS:
            raise Refused(f"{verb} is no verb; {nearest(verb, VERBS)}")
        return int(importlib.import_module(f"{verb}.__main__").main(args))
    except Refused as refused:
        for problem in refused.problems:
            print(f"foretold {verb}: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away
        return 0


def run(verb: str) -> None:
    """`python -m VERB`."""
    sys.exit(main([verb, *sys.argv[1:]]))


def split(args: Sequence[str], options: Options) -> tuple[dict[str, str], list[str]]:
    """The verb's own options with their defaults, and the overrides of the plan."""
    chosen, rest = {name: default for name, (default, _) in options.items()}, []
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and name in options:
            chosen[name] = value
        else:
            rest.append(arg)
    return chosen, rest


def flag(options: Mapping[str, str], name: str) -> bool:
    value = options[name].lower()
    if value not in ("true", "false"):
        raise Refused(f"{name}={options[name]} is neither true nor false; write {name}=true")
    return value == "true"


def count(options: Mapping[str, str], name: str) -> int:
    if not options[name].isdigit() or int(options[name]) < 1:
        raise Refused(f"{name}={options[name]} is no whole number above 0; write for example {name}=20")
    return int(options[name])


def load(overrides: Sequence[str], base: str = "", rules: Callable[[Plan], list[str]] = broken_rules) -> Plan:
    """The plan that the defaults, or the plan in the file `base`, and these overrides make.

    Raises Refused with every problem at once.
    """
    _no_sweep(overrides)
    found = _unknown_options(overrides)
    if found:
        raise Refused(*found)
    values = _overlay(Path(base), overrides) if base else _compose(overrides)
    plan = build(Plan, values, "", found)
    found += [] if plan is None else rules(plan)
    if found:
        raise Refused(*found)
    assert isinstance(plan, Plan)
    return plan


def vary(plan: Plan, changes: Mapping[str, str]) -> Plan:
    """The plan with other values of its keys, each given as on the command line; much faster than composing again.

    Raises Refused with every problem at once. Groups and tables (price.gpu_hours) are for `load`.
    """
    table, found, values = keys(), list[str](), dict[str, Any]()
    for name, text in changes.items():
        if name not in table:
            found.append(f"{name} is no key of the plan; {nearest(name, table)}")
            continue
        value = {"null": None, "true": True, "false": False}.get(text, text)
        values[name] = build_value(table[name][0], value, name, found)
    if found:
        raise Refused(*found)
    varied = plan.but(**values)
    if found := broken_rules(varied):
        raise Refused(*found)
    return varied


def to_yaml(plan: Plan) -> str:
    """The resolved plan, readable and exact."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(plain(plan)))


def from_yaml(path: Path) -> Plan:
    """The plan that `to_yaml` wrote.

    Raises Refused when the file is not a whole plan.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    found: list[str] = []
    try:
        plan = build(Plan, OmegaConf.to_container(OmegaConf.load(path)), "", found)
    except (OSError, ValueError, YAMLError) as error:
        raise Refused(f"{path} is no plan: {' '.join(str(error).split())}") from error
    if found or not isinstance(plan, Plan):
        raise Refused(*(f"{path}: {problem}" for problem in found))
    return plan


def _no_sweep(overrides: Sequence[str]) -> None:
    strange = [arg for arg in overrides if arg.startswith("-")]
    if strange:
        raise Refused(f"{strange[0]} is no option; options are written name=value, and --help lists them")
    bare = [arg for arg in overrides if "=" not in arg and not arg.startswith("~")]
    if bare:
        raise Refused(f"{bare[0]} is neither an option nor group=option nor key=value; see --help")


def _unknown_options(overrides: Sequence[str]) -> list[str]:
    found = []
    for name, _, value in (arg.lstrip("+").partition("=") for arg in overrides):
        if name in (*groups(), "experiment") and value not in choices(name):
            found.append(f"{name}={value} is no {name}; {nearest(value, choices(name))}")
    return found


def _overlay(path: Path, overrides: Sequence[str]) -> Any:
    """A plan file's values with a group replaced by another option, or a key by another value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = OmegaConf.create(plain(from_yaml(path)))
    for arg in overrides:
        name, _, text = arg.lstrip("+").partition("=")
        if arg.startswith("~"):
            raise Refused(f"{arg}: a key of plan={path} cannot be taken away; set it to null")
        if name == "experiment":
            raise Refused(f"experiment={text} is a plan of its own; leave out plan={path}, or choose single groups")
        value = OmegaConf.load(HERE / name / f"{text}.yaml") if name in groups() else OmegaConf.create(f"value: {text}").value
        try:
            OmegaConf.update(values, name, value, merge=False)
        except OmegaConfBaseException as error:
            raise Refused(f"{arg}: {' '.join(str(error).split())}") from error
    return OmegaConf.to_container(values)


def _compose(overrides: Sequence[str]) -> Any:
    """Plain values of the composed plan; a plan that Hydra refuses is composed without the schema, so that all its problems show."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    logging.getLogger("hydra").setLevel(logging.ERROR)
    safe = [_quoted(arg) for arg in overrides]
    with suppress(HydraException, OmegaConfBaseException, ValueError):
        return _changed(safe)
    store = ConfigStore.instance()
    with initialize_config_module("conf", version_base="1.3"):
        for schema, words in ((_typed(), safe), ({}, [_forced(arg) for arg in safe])):
            store.store(name="schema", node=schema)
            try:
                config = compose("plan", words)
                return OmegaConf.to_container(config, resolve=True)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                trouble = error
    raise Refused(*(_unreadable(safe) or [" ".join(str(trouble).split("\n")[0].split())]))


def _changed(overrides: Sequence[str]) -> Any:
    """Plain values of a choice of groups with some of its keys changed, as Hydra makes them, but the groups are composed once: that takes
    longest.

    Raises ValueError for what only Hydra understands, and Hydra's and OmegaConf's own errors."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from omegaconf import OmegaConf

    chosen = tuple(arg for arg in overrides if arg.lstrip("+").partition("=")[0] in (*groups(), "experiment"))
    config = deepcopy(_chosen(chosen))
    for override in OverridesParser.create().parse_overrides([arg for arg in overrides if arg not in chosen]):
        if override.type != OverrideType.CHANGE or override.is_sweep_override():
            raise ValueError(f"{override.input_line} is for Hydra itself")
        OmegaConf.update(config, override.key_or_group, override.value())
    return OmegaConf.to_container(config, resolve=True)


@lru_cache(64)
def _chosen(overrides: tuple[str, ...]) -> Any:
    """The plan that groups and experiments alone make."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=_typed())
    with initialize_config_module("conf", version_base="1.3"):
        return compose("plan", list(overrides))


def _unreadable(overrides: Sequence[str]) -> list[str]:
    """Overrides that Hydra's grammar does not allow."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found, parser = [], OverridesParser.create()
    for arg in overrides:
        try:
            parser.parse_override(arg)
        except HydraException:
            cure = "text with blanks, commas or signs needs quotes of its own inside the shell's, as in \"key=['a b','c=1']\""
            found.append(f"{arg} cannot be read; {cure}")
    return found


@cache
def _typed() -> Any:
    """The schema with defaults as they are written: a nested node has turned its own from "0 W" into a float already."""
    from omegaconf import MISSING, OmegaConf

    schema = OmegaConf.structured(Plan)
    for name, (annotation, _, _) in keys().items():
        if unit_of(annotation) and isinstance(text := default_of(Plan, name), str) and text != MISSING:
            OmegaConf.update(schema, name, text)
    return schema


_PATHS = ("data.path", "profile", "grid.hourly", "finetune.data", "finetune.template", "align.data", "align.template",
          "align.reward_model", "align.lengths")  # fmt: skip


def _quoted(arg: str) -> str:
    """Paths may hold commas, blanks and equals signs, which Hydra's grammar would read as its own."""
    name, equals, value = arg.partition("=")
    plain = name.lstrip("+") in _PATHS and value not in ("null", "python", "crawl", "plain", "chatml", "llama3")
    if equals and plain and value[:1] not in "'\"":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{name}='{escaped}'"
    return arg


def _forced(arg: str) -> str:
    name = arg.lstrip("+").partition("=")[0]
    return arg if name in (*groups(), "experiment") or arg.startswith("~") else "++" + arg.lstrip("+")


def explain(verb: str, usage: str, options: Options, about: str = "") -> str:
    """Help that teaches: options, groups with their choices, or the keys of one group with their values and meaning."""
    if about:
        return _explain_group(about)
    lines = [usage.strip(), "", "options"]
    lines += [f"  {name + '=' + default:22} {means}" for name, (default, means) in options.items()]
    lines += ["", f"groups (foretold {verb} --help GROUP shows its keys)"]
    for name in (*groups(), "experiment"):
        lines += wrap(", ".join(choices(name)), 140, initial_indent=f"  {name:12} ", subsequent_indent=" " * 15)
    lines += ["", "keys of the plan itself"]
    lines += [f"  {key:12} {row[1]}" for key, row in keys().items() if "." not in key]
    return "\n".join(lines)


def _explain_group(asked: str) -> str:
    """Keys of a group, as one of its options fills them: value, meaning, source."""
    group, _, option = asked.partition("=")
    if group not in groups():
        raise Refused(f"{group} is no group; {nearest(group, groups())}")
    option = option or defaults()[group]
    if option not in choices(group):
        raise Refused(f"{group}={option} is no {group}; {nearest(option, choices(group))}")
    lines = [*wrap(f"{group}: {', '.join(choices(group))}", 140), "", f"{group}={option}"]
    for row in rows(group, option):
        lines.append(f"  {row.name:28} {shorten(str(row.default), 34):36} {row.means}{_limits(row.must)}")
        if row.noted:
            lines.append(f"{'':68}↳ {shorten(row.source, 110)}")
    return "\n".join(lines)


def _limits(must: object) -> str:
    return f" [{must}]" if isinstance(must, str) else ""
