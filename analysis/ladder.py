"""Runs of different sizes as a scaling law is fitted to them: a table of parameters, tokens and losses, and what these count."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from conf.arithmetic import active_parameters, parameters, table_parameters
from conf.errors import Refused
from conf.plan import Plan
from conf.program import from_yaml
from conf.record import read_summary

COLUMNS = {"params": ("params", "N"), "tokens": ("tokens", "D"), "loss": ("loss", "L"), "flop": ("flop", "C"),
           "weight": ("weight",), "group": ("group",), "total": ("total_params",), "unique": ("unique_tokens", "U")}  # fmt: skip
CONVENTIONS = {"params_count": "which parameters are counted (total, or without embeddings)", "loss_unit": "nat or bit, a token or a byte",
               "tokenizer": "the tokenizer"}  # fmt: skip
OTHER_COUNTS = ("params_no_embed", "params_with_embed", "params_total")  # a convention moves an exponent more than any detail of a fit
NEEDED = ("params", "tokens", "loss")


@dataclass(frozen=True)
class Ladder:
    """Runs, each with its parameters N (active), tokens D, loss, compute C [FLOP], weight, group, all parameters (of a mixture's experts
    too) and unique tokens; arrays (n,). `counts` are other countings of N that were given, by column."""

    params: NDArray[np.float64]
    tokens: NDArray[np.float64]
    loss: NDArray[np.float64]
    flop: NDArray[np.float64]
    weight: NDArray[np.float64]
    group: NDArray[Any]
    total: NDArray[np.float64]
    unique: NDArray[np.float64]
    counts: dict[str, NDArray[np.float64]]
    conventions: dict[str, str]

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep: NDArray[Any]) -> "Ladder":
        kept = {name: values[keep] for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return replace(self, **kept, counts={name: values[keep] for name, values in self.counts.items()})

    def without_worst(self, drop: int) -> "Ladder":
        """Without the runs of the highest losses.

        Raises Refused where no run would be left.
        """
        if drop >= len(self):
            raise Refused(f"drop={drop} leaves none of the {len(self)} runs; drop fewer")
        return self.where(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - drop]))

    @classmethod
    def read(cls, path: str) -> "Ladder":
        """The runs in a CSV file, or those that `real` made below a folder.

        Raises Refused where a column or a number is missing, a loss is not positive, or conventions are mixed.
        """
        if Path(path).is_dir():
            return cls.of(executed(Path(path)), path)
        try:
            frame = pd.read_csv(Path(path))
        except FileNotFoundError as error:
            raise Refused(f"data={path} does not exist; name a CSV file of runs with columns {', '.join(NEEDED)}") from error
        except (ValueError, OSError) as error:
            raise Refused(f"data={path} is no CSV table of runs: {str(error).splitlines()[0]}") from error
        return cls.of(frame, path)

    @classmethod
    def of(cls, frame: pd.DataFrame, name: str = "table") -> "Ladder":
        names = {what: next((n for n in spellings if n in frame.columns), None) for what, spellings in COLUMNS.items()}
        for what in NEEDED:
            if names[what] is None and not (what == "tokens" and names["flop"]):
                told = ", ".join(map(str, frame.columns[:12]))
                raise Refused(
                    f"data={name} has no column {' or '.join(COLUMNS[what])}; it has {told}; rename the one that holds {_MEANS[what]}"
                )
        numbers = {what: _numbers(frame, n, name) for what, n in names.items() if n and what != "group"}
        if "tokens" not in numbers:
            numbers["tokens"] = numbers["flop"] / 6 / numbers["params"]
        flop = numbers.get("flop", 6 * numbers["params"] * numbers["tokens"])  # floats: as integers 6 N D overflows at 9.2e18
        weight = numbers.get("weight", np.ones(len(frame)))
        group = frame[names["group"]].to_numpy() if names["group"] else numbers["params"]
        counted = {"flop": "as given" if "flop" in numbers else "6 N D"}
        params, tokens = numbers["params"], numbers["tokens"]
        total, unique = numbers.get("total", params), np.minimum(tokens, numbers.get("unique", tokens))
        if (total < params).any():
            row = int(np.argmax(total < params))
            raise Refused(
                f"data={name}: total_params {total[row]:g} is less than params {params[row]:g} in row {row + 1}; all are at least those"
            )
        counts = {column: _numbers(frame, column, name) for column in OTHER_COUNTS if column in frame.columns}
        return cls(params, tokens, numbers["loss"], flop, weight, group, total, unique, counts, counted | _conventions(frame, name))


def executed(runs: Path) -> pd.DataFrame:
    """The runs of `real` that reached their last step and were judged: size, tokens, held-out loss a token, and what was counted.

    Raises Refused where there are none.
    """
    rows = []
    for folder in sorted(path.parent for path in runs.glob("*/real/summary.json")):
        told, plan = read_summary(folder), from_yaml(folder / "plan.yaml")
        values = {name: quantity["value"] for name, quantity in told["quantities"].items()} if told else {}
        if {"pretrain.final_loss", "pretrain.parameters", "run.tokens"} <= set(values) and values["run.tokens"] >= _whole(plan):
            idle = parameters(plan.model) - active_parameters(plan.model)
            visited = values["pretrain.parameters"] - idle
            counted = {
                "params_count": "all that a token visits",
                "loss_unit": "nat a token",
                "tokenizer": f"{plan.tokenizer.name} of {plan.tokenizer.vocab}",
            }
            sizes = {"params": visited, "total_params": visited + idle, "params_no_embed": visited - table_parameters(plan.model),
                     "tokens": values["run.tokens"], "loss": values["pretrain.final_loss"]}  # fmt: skip
            rows.append(sizes | counted)
    if not rows:
        raise Refused(f"data={runs} holds no finished run with a held-out loss; make some, as with: foretold real -m model.layers=2,4,8")
    return pd.DataFrame(rows)


def _whole(plan: Plan) -> float:
    """Tokens of all of a plan's steps."""
    return plan.samples(plan.train.steps) * plan.train.seq_len if plan.train.steps else 0.0


_MEANS = {"params": "parameters", "tokens": "training tokens", "loss": "the loss at the end"}


def _numbers(frame: pd.DataFrame, column: str, name: str) -> NDArray[np.float64]:
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(wrong):
        told = frame[column].iloc[wrong[0]]
        raise Refused(
            f"data={name}: {column} is {told} in row {wrong[0] + 1} of {len(frame)}; a positive number is needed; mend or remove the row"
        )
    return values


def _conventions(frame: pd.DataFrame, name: str) -> dict[str, str]:
    """What the numbers count, where columns say so: nothing is guessed."""
    told = {}
    for column, means in CONVENTIONS.items():
        values = sorted(frame[column].astype(str).unique()) if column in frame.columns else ["not said"]
        if len(values) > 1:
            raise Refused(f"data={name} mixes {column}: {', '.join(values)}; {means} must be the same in all rows: fit them apart")
        told[column] = values[0]
    return told
