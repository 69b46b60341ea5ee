"""Published runs: every experiment predicted, beside what was published of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from conf.files import write
from conf.program import load
from conf.record import QUANTITIES, read_fact
from conf.schema import choices
from conf.units import show

OPTIONS = {
    "only": ("all", "experiments to predict, with commas"),
    "out": ("", "file for the table in Markdown, also printed"),
}
HEAD = ("experiment", "quantity", "predicted", "published", "ratio")
FACTOR = 1.5  # beyond it a miss is marked, and explained in LOG.md


class Row(NamedTuple):
    experiment: str
    quantity: str
    predicted: float
    relation: str  # = for a value, < or > for a bound
    published: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.published

    @property
    def hit(self) -> bool:
        """Within the factor; a bound may be missed by the factor too."""
        if self.relation == "<":
            return self.ratio <= FACTOR
        if self.relation == ">":
            return self.ratio >= 1 / FACTOR
        return 1 / FACTOR <= self.ratio <= FACTOR


def experiments(options: Mapping[str, str]) -> int:
    """Print the table, and write it when asked to."""
    names = choices("experiment") if options["only"] == "all" else options["only"].split(",")
    text = markdown(list(rows(names)))
    print(text, end="")
    if options["out"]:
        write(Path(options["out"]), text)
    return 0


def rows(names: list[str]) -> Iterator[Row]:
    """Of those of which something was published."""
    from sim.__main__ import predict

    with TemporaryDirectory() as folder:
        for name in names:
            plan = load([f"experiment={name}"])
            if not plan.published:
                continue
            told = predict(plan, Path(folder) / plan.id / "sim")["quantities"]
            for quantity, fact in plan.published.items():
                relation, published = read_fact(fact.value, QUANTITIES[quantity.split(".")[1]][0])
                yield Row(name, quantity, told[quantity]["value"], relation, published)


def markdown(found: list[Row]) -> str:
    """A table with one line a quantity, and how many are within the factor."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|--:|--:|--:|"]
    for row in found:
        unit = QUANTITIES[row.quantity.split(".")[1]][0]
        bound = "" if row.relation == "=" else row.relation + " "
        cells = (row.experiment, row.quantity, show(row.predicted, unit), bound + show(row.published, unit))
        lines.append(f"| {' | '.join(cells)} | {row.ratio:.2f}{'' if row.hit else ' ✗'} |")
    hits = sum(row.hit for row in found)
    return "\n".join([*lines, "", f"{hits} of {len(found)} within a factor of {FACTOR:g} (✗: not)."]) + "\n"
