"""Whether a step may count: a loss or a gradient norm that is no number, or far above those before it.

Far is told by what an outlier cannot move: the median of the last accepted steps and their median absolute deviation, of the loss
and of the logarithm of the norm. What is flagged never enters the window. Both values were summed over all ranks before, so
every rank finds the same verdict. Decisions are kept beside the record, so that a step that was passed over once is
passed over again when a restart walks the same ground.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan, Spikes
from conf.record import read

NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
STAGE = "pretrain"


class Window:
    """The last accepted values of one quantity."""

    def __init__(self, length: int) -> None:
        self.values: deque[float] = deque(maxlen=length)

    def height(self, value: float) -> float:
        """How far above the median a value is, in robust standard deviations; 0 while half of the window is empty."""
        if len(self.values) < (self.values.maxlen or 0) / 2 or not self.values:
            return 0.0
        middle = statistics.median(self.values)
        spread = NORMAL * statistics.median(abs(v - middle) for v in self.values)
        return (value - middle) / spread if spread else math.inf if value > middle else 0.0


class Judge:
    """Flags steps by their loss and gradient norm, in the order in which they come."""

    def __init__(self, rule: Spikes) -> None:
        self.threshold = rule.threshold
        self.loss, self.norm = Window(rule.window), Window(rule.window)

    def verdict(self, loss: float, norm: float) -> str | None:
        """Why a step must not count, or None; one that counts enters the window."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.4g} and gradient norm {norm:.4g} are no numbers"
        for window, value, name in ((self.loss, loss, f"loss {loss:.4g}"), (self.norm, _log(norm), f"gradient norm {norm:.4g}")):
            if (height := window.height(value)) > self.threshold:
                return f"{name} is {height:.0f} deviations above the median"
        self.accept(loss, norm)
        return None

    def accept(self, loss: float, norm: float) -> None:
        self.loss.values.append(loss)
        self.norm.values.append(_log(norm))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


@dataclass(frozen=True)
class Decision:
    """What was done about a step, the first being 1."""

    step: int
    answer: str
    why: str
    to: int = 0  # step at which a rollback went on


class Guard:
    """Answers what the judge flags, within the plan's budget."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.rule, self.folder = plan, plan.failures.spikes, folder
        self.file = folder / "decisions.json"
        self.decisions = [Decision(**entry) for entry in json.loads(self.file.read_text())] if self.file.is_file() else []
        self.judge = Judge(self.rule)

    @property
    def awake(self) -> bool:
        return self.rule.answer != "none"

    def resume(self, step: int) -> None:
        """Fill the window with the accepted steps before, as the record tells them."""
        self.judge = Judge(self.rule)
        if not self.awake:
            return
        told: dict[str, dict[int, float]] = {"loss": {}, "gradient_norm": {}}
        for row in read(self.folder, "ledger"):
            if (
                row["quantity"] in told
                and row["stage"] == STAGE
                and row["value"] is not None
                and step - self.rule.window < row["step"] <= step
            ):
                told[row["quantity"]][row["step"]] = row["value"]
        passed = {decision.step for decision in self.decisions}
        for at in sorted(told["loss"].keys() & told["gradient_norm"].keys() - passed):
            self.judge.accept(told["loss"][at], told["gradient_norm"][at])

    def samples(self, step: int) -> int:
        """Sequences passed over before `step` more than the plan's own order says."""
        batches = [self.rule.skip for decision in self.decisions if decision.answer == "rollback" and decision.to <= step]
        return sum(batches) * self.plan.train.global_batch

    def rate(self, step: int) -> float:
        """Factor of the learning rate."""
        return self.rule.cut ** sum(decision.answer == "lower" and decision.step <= step for decision in self.decisions)

    def answer(self, step: int, loss: float, norm: float) -> Decision | None:
        """What is to be done about a step, None where it counts.

        Raises Refused when the budget is spent.
        """
        for decision in self.decisions:
            if decision.step == step and decision.answer in ("skip", "lower"):
                return decision
        why = self.judge.verdict(loss, norm)
        if why is None:
            return None
        return self.within_budget(Decision(step, self.rule.answer, why, max(0, step - 1 - self.rule.rewind)))

    def within_budget(self, decision: Decision) -> Decision:
        if len(self.decisions) >= self.rule.budget:
            raise Refused(f"step {decision.step}: {decision.why}, and failures.spikes.budget={self.rule.budget} is spent; the run does "
                          f"not hold: lower train.learning_rate={self.plan.train.learning_rate}, or look at the devices")  # fmt: skip
        return decision

    def decide(self, decision: Decision, leads: bool) -> None:
        """Keep a decision; one rank writes it down."""
        if decision in self.decisions:
            return
        self.decisions.append(decision)
        if leads:
            write(self.file, json.dumps([asdict(decision) for decision in self.decisions], indent=1))
