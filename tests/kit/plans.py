"""What is compared: one configuration a line, each a plan that conf accepts, and the order in which they tell most for their time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil
from typing import NamedTuple

from conf.plan import Plan
from conf.program import load, vary

SIZES = {
    "nano": "model=nano",
    "125m": "model=llama_1b model.layers=12 model.hidden=768 model.heads=12 model.kv_heads=12 model.ffn=2048",
    "350m": "model=llama_1b model.layers=24 model.hidden=1024 model.heads=16 model.kv_heads=16 model.ffn=2816",
    "1b": "model=llama_1b",
    "3b": "model=llama3_2_3b",
    "8b": "model=llama3_8b",
    "8b/6": "model=llama3_8b model.layers=6",  # layers of the 8B class, so few that three models fit beside each other
    "moe": "model=qwen3_30b_a3b model.layers=8 model.hidden=1024 model.heads=16 model.kv_heads=4 model.head=64 model.ffn=2816 "
           "model.moe.experts=32 model.moe.top_k=4 model.moe.ffn=704",
}  # fmt: skip

# size, tokens of a sequence, sequences of a micro-batch × micro-batches of a step, precision, recompute, and what else there is:
# compile · adamw8bit · lora, qlora (fine-tuning) · dpo, grpo (alignment) · beside (then baselines in turns with it).
TABLE = """
125m   1024   32x1  bf16  none
125m   2048   16x2  bf16  none       compile
350m   2048    8x2  bf16  none
350m   2048    8x2  bf16  none       compile
350m   2048    8x2  fp8   none       compile
350m   8192    2x2  bf16  full
1b     1024   16x1  bf16  none
1b     2048    8x2  bf16  none
1b     2048    8x2  bf16  none       compile
1b     2048    8x2  bf16  selective
1b     2048    8x2  bf16  full
1b     2048    8x2  fp8   none       compile
1b     2048    8x2  bf16  none       adamw8bit
1b     4096    4x2  bf16  none       compile
1b     4096    4x2  bf16  selective
1b     8192    2x2  bf16  none
1b     8192    2x4  bf16  none       compile beside
1b    16384    1x2  bf16  none       compile
1b    16384    1x2  bf16  full
1b    32768    1x1  bf16  selective
1b    32768    1x1  bf16  full
3b     2048    4x2  bf16  none
3b     2048    8x2  bf16  full
3b     4096    2x2  bf16  selective  compile
3b     4096    2x2  fp8   none       compile
3b     8192    1x2  bf16  none       compile
8b/6   8192    1x4  bf16  none       compile beside
8b/6   8192    1x4  fp8   none       compile
8b/6   2048    4x2  bf16  none
8b     2048    2x2  bf16  none       lora
8b     2048    2x2  bf16  full       lora compile
8b     2048    2x2  bf16  none       qlora
8b     4096    1x2  bf16  full       qlora
3b     2048    4x1  bf16  none       lora
8b     2048    2x2  bf16  full       adamw8bit
8b     4096    1x2  bf16  selective  adamw8bit compile
moe    2048    8x1  bf16  none
moe    2048    8x1  bf16  none       compile
moe    4096    4x1  bf16  selective
350m   1024    8x2  bf16  none       dpo
1b      512    8x2  bf16  none       dpo
350m    512   16x2  bf16  none       grpo
1b      256   16x2  bf16  none       grpo
"""
BASE = "experiment=h200"
WARM = 2  # steps before the measured ones: memory is taken, kernels are chosen and compiled
SPELL = 2.0  # seconds that measured steps are to take together, since energy is counted in steps of a tenth of one
LEAST, MOST = 5, 25  # measured steps
GROUP = 8  # completions of a prompt
COMPILE = 15.0  # seconds until a block has been compiled, once for all that are alike; a guess
WHOLE = 60.0  # seconds until all of transformers' model has been; a guess
BEGIN = 4.0  # seconds to build, warm up and tidy away anything; a guess
DRAWN = 1e9  # parameters drawn and moved in a second; a guess
FIGURES = 10  # words that a row with baselines is worth: it tells figures that no other does


class Row(NamedTuple):
    """A configuration: what it is called, the words that make its plan, and whether baselines run beside it."""

    name: str
    words: tuple[str, ...]
    beside: bool = False


def rows(table: str = TABLE, base: str = BASE) -> list[Row]:
    """The configurations of a table."""
    return [_row(line.split(), base) for line in table.strip().splitlines()]


def _row(said: Sequence[str], base: str) -> Row:
    size, seq_len, batch, precision, recompute, *more = said
    micro, times = map(int, batch.split("x"))
    words = [*base.split(), *SIZES[size].split(), f"train.precision={precision}", f"train.recompute={recompute}"]
    words += [f"train.compile={str('compile' in more).lower()}", *(["train.optimizer=adamw8bit"] if "adamw8bit" in more else [])]
    if method := next((name for name in more if name in ("lora", "qlora")), None):
        words += [f"finetune={method}", "finetune.data=digits", "finetune.steps=30", *_batch("finetune", int(seq_len), micro, times)]
    elif method := next((name for name in more if name in ("dpo", "grpo")), None):
        words += _aligned(method, int(seq_len), micro, times)
    else:
        words += _batch("train", int(seq_len), micro, times)
    return Row(" ".join(said), tuple(words), "beside" in more)


def _batch(node: str, seq_len: int, micro: int, times: int) -> list[str]:
    return [f"{node}.seq_len={seq_len}", f"{node}.micro_batch={micro}", f"{node}.global_batch={micro * times}"]


def _aligned(method: str, longest: int, micro: int, times: int) -> list[str]:
    """Half of each sequence is prompt; completions of a model that knows nothing do not end before their limit."""
    count = micro * times
    words = [f"align={method}", "align.data=digits", "align.template=bare", "align.held_out=0", f"align.micro_batch={micro}"]
    words += [f"align.prompt_tokens={longest // 2}", f"align.new_tokens={longest // 2}", "align.learning_rate=1e-5", "align.steps=30"]
    if method == "dpo":
        return [*words, f"align.prompts={count // 2}"]
    rollouts = [f"align.prompts={count // GROUP}", f"align.group={GROUP}", f"align.slots={count}", f"align.mean_tokens={longest // 2}"]
    return [*words, *rollouts, "align.sigma=0", "align.reward=digits"]


@cache
def _loaded(groups: tuple[str, ...]) -> Plan:
    return load(groups)


def plan_of(row: Row, profile: str = "") -> Plan:
    """Its plan; groups are composed once for all rows that choose the same ones."""
    groups = tuple(word for word in row.words if "." not in word.split("=")[0])
    keys = dict(word.split("=", 1) for word in row.words if word not in groups)
    return vary(_loaded(groups), keys | ({"profile": profile} if profile else {}))


def steps_of(step_time: float) -> int:
    """Steps to measure."""
    return max(LEAST, min(MOST, ceil(SPELL / max(step_time, 1e-6))))


def seconds(row: Row, plan: Plan, parameters: float, step_time: float) -> float:
    """What executing it is expected to take; each baseline is built, compiled and run about as long as ours."""
    once = COMPILE * plan.train.compile + parameters / DRAWN + (WARM + steps_of(step_time)) * step_time
    return BEGIN + (3 * once + WHOLE * plan.train.compile if row.beside else once)


def ordered(found: Sequence[Row], costs: Mapping[str, float]) -> list[Row]:
    """Most informative first: again and again the row whose words have been seen least, for its time.

    A row tells 1 / (1 + n) of each of its words that n rows before it had.
    """
    left, seen, told = list(found), Counter[tuple[int, str]](), list[Row]()

    def worth(row: Row) -> float:
        return sum((FIGURES if word == "beside" else 1) / (1 + seen[place, word]) for place, word in _traits(row)) / costs[row.name]

    while left:
        best = max(left, key=worth)
        left.remove(best)
        told.append(best)
        seen.update(_traits(best))
    return told


def _traits(row: Row) -> list[tuple[int, str]]:
    """What it shows: size, length, precision and recompute by their place, the rest by name."""
    size, seq_len, _, precision, recompute, *more = row.name.split()
    return [*enumerate((size, seq_len, precision, recompute)), *((9, name) for name in more)]
