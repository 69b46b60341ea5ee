"""Sweeps: overrides with several values make many points, and Hydra deals them out to whatever launcher is asked for.

Hydra never sees the plans, only the points' numbers: each is composed by `load` where it runs. So a bad point is told in a
line like any bad plan, and costs the others nothing.
"""

import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from conf.errors import Refused, nearest

LAUNCHERS = {  # Hydra's launchers: (plugin, the extra that brings it)
    "basic": ("hydra", ""),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "sweep"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
}
# Points keep their own records; Hydra is to leave no folders, files or lines behind.
SILENT = ("hydra.sweep.subdir=.", "hydra.output_subdir=null", "hydra/hydra_logging=none", "hydra/job_logging=none")


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The points of a sweep in Hydra's grammar: every combination of `a=1,2`, `b=range(1,5)`, `c=choice(x,y)`.

    Raises Refused for what Hydra cannot read.

    >>> expand(["a=1,2", "b=x"])
    [['a=1', 'b=x'], ['a=2', 'b=x']]
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        (points,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise Refused(f"-m: {' '.join(str(error).split()).partition(' See https')[0]}") from error
    return [list(point) for point in points]


def bare(value: str) -> str:
    r"""A value without what Hydra's grammar puts around it.

    >>> bare("10\\ gCO2e/kWh"), bare("'2 h'")
    ('10 gCO2e/kWh', '2 h')
    """
    if value[:1] in ("'", '"') and value[:1] == value[-1:]:
        value = value[1:-1]
    return re.sub(r"\\(.)", r"\1", value)


def varied(points: Sequence[Sequence[str]]) -> list[str]:
    """Names of the overrides that differ between points."""
    names = dict.fromkeys(word.partition("=")[0] for point in points for word in point)
    return [name for name in names if len({word for point in points for word in point if word.partition("=")[0] == name}) > 1]


def deal(points: Sequence[Sequence[str]], task: Callable[[int, list[str]], None], settings: Sequence[str], folder: str) -> None:
    """Run `task(number, overrides)` for every point through Hydra's multirun; `settings` are its own (hydra/launcher=joblib).

    Raises Refused when the launcher is not installed. The task must not raise.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    for setting in settings:
        _installed(setting)
    every = [list(point) for point in points]

    def point(config: dict[str, int]) -> None:
        whole = GlobalHydra.instance()
        running, whole.hydra = whole.hydra, None  # the point composes its plan with a Hydra of its own
        try:
            task(config["point"], every[config["point"]])
        finally:
            whole.hydra = running

    kept = sys.argv
    sys.argv = ["foretold", "--multirun", f"+point=range({len(every)})", f"hydra.sweep.dir='{folder}'", *SILENT, *settings]
    try:
        hydra.main(version_base="1.3", config_path=None)(point)()
    finally:
        sys.argv = kept


def _installed(setting: str) -> None:
    name, _, launcher = setting.partition("=")
    if name != "hydra/launcher":
        return
    if launcher not in LAUNCHERS:
        raise Refused(f"{setting} is no launcher; {nearest(launcher, LAUNCHERS)}")
    plugin, extra = LAUNCHERS[launcher]
    try:
        there = find_spec(plugin) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise Refused(f"{setting} is not installed; pip install 'foretold[{extra}]', or leave it out to sweep in order")
