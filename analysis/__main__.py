"""`foretold analysis ACTION [options]`: each action is a module of the same name, loaded only when asked for."""

import importlib
from collections.abc import Sequence

from conf.errors import Refused, nearest
from conf.program import Options, run, split

ACTIONS = {
    "compare": "print a plan's prediction beside its measurement",
    "calibrate": "fit the rates of a machine to what was measured on it",
    "experiments": "predict the published runs, beside what was published",
    "published": "predict a table of published measurements, and tell the errors",
    "caps": "fit the law of power caps to measured curves of throughput under caps",
    "check": "tell whether a claim of energy and carbon multiplies",
    "size": "the best model that money, time or energy buys on a cluster, as a plan",
    "design": "which small runs to make before a large one, as commands",
    "scaling": "fit a scaling law to runs of different sizes, and divide a budget by it",
    "fit": "fit the physical parameters of GPU families to tables of published measurements",
    "reliability": "published failures and effective times, beside what other sources say of them",
    "sweep": "draw the points of a sweep",
    "report": "write both, with figures and assumptions, as one HTML page",
}
USAGE = """foretold analysis ACTION [options]

  foretold analysis compare                 the newest plan under runs, predicted beside measured
  foretold analysis report plan=p0123abcd   the same as a page for a browser, with figures
"""


def main(args: Sequence[str]) -> int:
    """Run one action with its options.

    Raises Refused for an unknown action or option.
    """
    wants_help = not args or any(arg in ("-h", "--help") for arg in args)
    words = [arg for arg in args if arg not in ("-h", "--help")]
    action, given = (words[0], words[1:]) if words else ("", [])
    if action and action not in ACTIONS:
        raise Refused(f"{action} is no action of analysis; {nearest(action, ACTIONS)}")
    if wants_help:
        print(_help_of(action) if action else _help())
        return 0
    module = importlib.import_module(f"analysis.{action}")
    options, strange = split(given, module.OPTIONS)
    takes_plan = getattr(module, "PLAN_WORDS", False)
    if strange and not takes_plan:
        name = strange[0].partition("=")[0]
        raise Refused(f"{strange[0]} is no option of analysis {action}; {nearest(name, module.OPTIONS)} (written name=value)")
    return int(getattr(module, action)(options, *([strange] if takes_plan else [])))


def _help() -> str:
    lines = [USAGE, "actions (foretold analysis ACTION --help shows its options)"]
    return "\n".join(lines + [f"  {name:12} {means}" for name, means in ACTIONS.items()])


def _help_of(action: str) -> str:
    options: Options = importlib.import_module(f"analysis.{action}").OPTIONS
    lines = [f"foretold analysis {action} [options]: {ACTIONS[action]}", "", "options"]
    return "\n".join(lines + [f"  {name + '=' + default:22} {means}" for name, (default, means) in options.items()])


if __name__ == "__main__":
    run("analysis")
