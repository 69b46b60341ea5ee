"""The record of a run: what was observed, what happened, where the time went.

One folder a run. While it lives, each rank appends JSON lines; at the close they are sealed into Parquet. Readers
take both and drop a torn last line, so the record of a crashed run stays readable.

    plan.yaml       the resolved plan
    ledger          rows of at [s], stage, quantity, value, unit, step, rank
    events          rows of at [s], stage, event, step, rank, detail (JSON)
    trace.json      spans, for Perfetto
    summary.json    {"plan", "program", "quantities": {"<stage>.<quantity>": {"value", "unit", "low", "high"}}}
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import Refused
from conf.files import commit, refusal, write
from conf.units import read as read_quantity

# The states a rank can be in, exclusive: their sum is ranks × wall clock, in both worlds.
STATES = ("init", "compute", "communication", "bubble", "data", "optimizer", "evaluate", "checkpoint", "detect", "abort",
          "diagnose", "reallocate", "load", "replay", "paused", "generate", "score", "logprob", "sync", "queue", "idle")  # fmt: skip

AGES = 9  # ages of samples that are told apart: 0 to 8 updates
# quantity: (unit, meaning); the same name means the same in every stage
QUANTITIES: dict[str, tuple[str, str]] = {
    "step_time": ("s", "wall clock of one optimizer step, median"),
    "tokens_per_s": ("token/s", "tokens processed a second, all ranks"),
    "tokens_per_s_per_gpu": ("token/s", "tokens processed a second and device"),
    "mfu": ("1", "model FLOPs utilisation, PaLM convention (full attention), of the peak at the plan's precision"),
    "peak_memory": ("B", "most memory a rank held above its start"),
    "memory_activations": ("B", "of the peak, kept from forward to backward"),
    "memory_working": ("B", "of the peak, held by a block's backward pass, what it recomputes included"),
    "memory_logits": ("B", "of the peak, logits with their loss"),
    "memory_experts": ("B", "of the peak, rows on their way to experts and back"),
    "memory_messages": ("B", "of the peak, what pipeline stages receive into"),
    "memory_gathered": ("B", "of the peak, unsharded copies of parameters"),
    "memory_gradients": ("B", "of the peak, unsharded gradients and buffers of their reduction"),
    "memory_state": ("B", "of the peak, weights and moments, and gradients that are reduced"),
    "reserved_memory": ("B", "most memory that the allocator of a GPU held, in use or not"),
    "final_loss": ("nat", "held-out loss a token at the end"),
    "loss": ("nat", "training loss a token of one step"),
    "gradient_norm": ("1", "global gradient norm of one step, before clipping"),
    "learning_rate": ("1", "learning rate of one step"),
    "held_out_loss": ("nat", "held-out loss a token"),
    "held_out_bits_per_byte": ("bit/B", "held-out loss in bits a byte of text"),
    "bigram_bits_per_byte": ("bit/B", "the same of an interpolated bigram trained on the tokens that the model saw"),
    "parameters": ("count", "parameters of the model"),
    "checkpoint_bytes": ("B", "size of one checkpoint"),
    "checkpoint_interval": ("s", "training from one checkpoint to the next"),
    "best_interval": ("s", "the same, where it would waste least"),
    "wall_clock": ("s", "time from start to end"),
    "goodput": ("1", "useful tokens over those of an undisturbed run in the same time"),
    "ettr": ("1", "effective training time ratio: time in steps that counted over wall clock of pre-training"),
    "interruptions": ("count", "times the job stopped and came back"),
    "interruptions_unexpected": ("count", "of these, not planned"),
    "lost": ("s", "wall clock on the way back up and over old ground"),
    "tokens": ("token", "tokens trained on"),
    "reward": ("1", "mean reward of completions, of the last ten steps"),
    "held_out_reward": ("1", "mean reward of completions of prompts that were never trained on, at the end"),
    "accuracy": ("1", "share of pairs whose chosen answer is preferred, of the last ten steps"),
    "held_out_accuracy": ("1", "the same of pairs whose questions were never trained on, at the end"),
    "held_out_error": ("1", "its standard error, answers to one question taken together"),
    "longer_wins": ("1", "share of those pairs whose chosen answer is the longer one"),
    "margin": ("1", "mean advantage of chosen over rejected answers in a step"),
    "kl": ("nat", "divergence from the reference a token, of the last ten steps"),
    "clipped": ("1", "share of tokens whose gradient the clip stopped in a step"),
    "completion_tokens": ("token", "mean tokens of a completion, of the last ten steps"),
    "staleness": ("count", "most updates of the weights between the start of a sample of this step and its training"),
    "failed": ("count", "completions whose reward function failed"),
    "value_loss": ("1", "loss of the critic in a step"),
    "cores": ("count", "cores that work in a data stage"),
    "worker_memory": ("B", "most memory that a worker of the data stages has held so far, its libraries included"),
    "supply": ("1", "tokens that the data stages make a second, over those that training takes"),
    "flops": ("FLOP", "model FLOPs of the tokens trained on, as MFU counts them"),
    "gpu_hours": ("h", "device-hours held, spares included"),
    "energy": ("J", "energy at the building's meter"),
    "energy_devices": ("J", "of this, the job's devices alone, before the building's overhead"),
    "energy_spares": ("J", "of this, idle spare servers"),
    "energy_hosts": ("J", "of this, the servers without their devices"),
    "energy_network": ("J", "of this, switches between servers, and storage"),
    "energy_overhead": ("J", "of this, cooling and supply of the building (PUE)"),
    "energy_steps": ("J", "energy of new steps; the rest went into checkpoints, faults, replays and waiting"),
    "energy_paused": ("J", "of the energy, what paused servers drew"),
    "cost_paused": ("USD", "of the cost, devices held while the job was paused"),
    "mean_power": ("W", "mean power at the building's meter"),
    "peak_to_mean": ("1", "highest over mean power"),
    "ramp": ("W/s", "largest change of power from one second to the next"),
    "swing": ("W", "amplitude of power at the frequency of steps, all ranks in step and the parts of a step in a row"),
    "swing_frequency": ("1/s", "one over the step time"),
    "cost_devices": ("USD", "of the cost, devices: rent, or wear of owned ones"),
    "cost_electricity": ("USD", "of the cost, electricity of owned devices"),
    "cost_storage": ("USD", "of the cost, checkpoints and corpus in storage"),
    "cost_egress": ("USD", "of the cost, data taken out"),
    "carbon_location": ("gCO2e", "operational carbon of the grid's hourly mix"),
    "carbon_saved": ("1", "share that waiting for a cleaner grid was expected to save, without what waiting itself draws"),
    "delay": ("s", "time that the start waited for a cleaner grid"),
    "carbon_market": ("gCO2e", "operational carbon after contracts"),
    "carbon_embodied": ("gCO2e", "share of the carbon of making the devices"),
    "water": ("L", "water used on site and for generation"),
    "cost": ("USD", "device-hours at the plan's price"),
    "peak_power": ("W", "highest power at the building's meter"),
    "pages": ("count", "pages that the crawl kept"),
    "pages_per_s": ("1/s", "pages that the crawl kept, a second"),
    "documents": ("count", "documents that left the stage"),
    "documents_per_s": ("1/s", "documents that entered the stage, a second"),
    "bytes": ("B", "bytes of text that entered the stage"),
    "read": ("B", "bytes that the stage read"),
    "shuffle_bytes": ("B", "bytes that went from worker to worker"),
    "removed_fraction": ("1", "share of documents removed"),
    "power": ("W", "power at the building's meter"),
    "seconds": ("s", "wall clock of the stage"),
    "substring_seconds": ("s", "of these, finding and cutting passages that stand elsewhere too"),
    "tokenizer_seconds": ("s", "of these, training the tokenizer"),
    "generate_time": ("s", "of a step, generation, mean over all ranks; the like of other states add up to the step"),
    "score_time": ("s", "of a step, rewards, values and log-probabilities of the reference, mean over all ranks"),
    "logprob_time": ("s", "of a step, the policy's log-probabilities of its samples, mean over all ranks"),
    "train_time": ("s", "of a step, updates with their traffic, bubbles and optimizer, mean over all ranks"),
    "sync_time": ("s", "of a step, new weights on their way to generators, mean over all ranks"),
    "queue_time": ("s", "of a step, trainers that wait for samples, mean over all ranks"),
    "idle_time": ("s", "of a step, waiting for another role, mean over all ranks"),
    "generator_utilisation": ("1", "share of the time in which those that generate do"),
    "trainer_utilisation": ("1", "share of the time in which those that train do, log-probabilities included"),
    "trainer_memory": ("B", "most memory of a rank that trains"),
    "generator_memory": ("B", "most memory of a rank that generates"),
    "scorer_memory": ("B", "most memory of a rank that holds reference and reward model, by them"),
    "tail": ("1", "share of generation in which an engine has less than a tenth of its completions left"),
    "staleness_mean": ("count", "updates of the weights between a sample's start and its training, mean"),
    "staleness_max": ("count", "the same, most"),
    **{f"stale_{age}": ("1", f"share of samples whose training began {age} updates of the weights after them") for age in range(AGES)},
    "stale_more": ("1", f"the same, {AGES} or more"),
    "discarded": ("1", "share of samples that were thrown away because they were too old"),
    "preempted": ("1", "times that a sample gave way in a full cache, a sample"),
    "sync_bytes": ("B", "bytes that a generator is sent in a sync"),
    "sync_seconds": ("s", "wall clock of a sync"),
    "seconds_per_thousand": ("s", "wall clock of a thousand steps"),
    "cost_per_thousand": ("USD", "device-hours of a thousand steps at the plan's price"),
    "energy_per_thousand": ("J", "energy of a thousand steps at the building's meter"),
    **{state: ("s", f"rank-seconds in state {state}") for state in STATES},
}


class Value(NamedTuple):
    """A number with its 10th and 90th percentile, where there is a distribution."""

    value: float
    low: float | None = None
    high: float | None = None

    def between(self, low: float, high: float) -> "Value":
        """The same with a band that reaches to so many times its value, or that widens the band it has."""
        least, most = (self.value if end is None else end for end in (self.low, self.high))
        return Value(self.value, low * least, high * most)


def read_fact(text: str, unit: str) -> tuple[str, float]:
    """A published value: its relation (=, < or >) and the number in `unit`; plain numbers are counts and shares.

    Raises ValueError with a line that a user can act on.

    >>> read_fact("> 0.9", "1"), read_fact("1.08e6 h", "h")
    (('>', 0.9), ('=', 1080000.0))
    """
    relation, rest = (text[0], text[1:]) if text[:1] in ("<", ">") else ("=", text)
    plain = unit in ("1", "count", "nat", "bit/B")
    return relation, float(rest) if plain else read_quantity(rest, unit)


class Record:
    """Writes the record of one rank; `live` appends every line to the disk when `flush` is called."""

    def __init__(self, folder: Path, rank: int | None = 0, live: bool = True, began: float = 0.0) -> None:
        self.folder, self.rank, self.live = folder, rank, live
        self.zero = time.perf_counter() - began
        self.lines: dict[str, list[str]] = defaultdict(list)
        if live:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise refusal(error, folder) from error
            self._part_from_torn_lines()

    def _part_from_torn_lines(self) -> None:
        """A crash may have left half a line: what follows starts on a line of its own."""
        for path in self.folder.glob(f"*.rank{self.rank}.jsonl"):
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                with path.open("a") as out:
                    out.write("\n")

    def now(self) -> float:
        """Seconds since the run began, earlier attempts included."""
        return time.perf_counter() - self.zero

    def observe(self, stage: str, quantity: str, value: float, step: int | None = None, at: float | None = None) -> None:
        """One row of the ledger; the quantity must be a known one."""
        unit = QUANTITIES[quantity][0]
        told = value if math.isfinite(value) else None  # JSON knows no NaN
        row = {"at": self.now() if at is None else at, "stage": stage, "quantity": quantity, "value": told, "unit": unit}
        self._append("ledger", row | {"step": step, "rank": self.rank})

    def event(self, stage: str, event: str, step: int | None = None, at: float | None = None, **detail: Any) -> None:
        row = {"at": self.now() if at is None else at, "stage": stage, "event": event, "step": step, "rank": self.rank}
        self._append("events", row | {"detail": json.dumps(detail)})

    def span(self, name: str, start: float, stop: float, stage: str, step: int | None = None, lane: str = "") -> None:
        """A bar in the trace."""
        where: dict[str, Any] = {"pid": stage, "tid": lane or f"rank {self.rank}"}
        bar = {"name": name, "ph": "X", "ts": round(start * 1e6, 1), "dur": round((stop - start) * 1e6, 1)}
        self._append("spans", bar | where | ({"args": {"step": step}} if step is not None else {}))

    @contextmanager
    def during(self, name: str, stage: str) -> Iterator[None]:
        start = self.now()
        yield
        self.span(name, start, self.now(), stage)

    def _append(self, file: str, row: Mapping[str, Any]) -> None:
        self.lines[file].append(json.dumps(row))

    def flush(self) -> None:
        """Append what was said since the last flush, whole lines only."""
        if not self.live:
            return
        for file, lines in self.lines.items():
            if lines:
                path = self.folder / f"{file}.rank{self.rank}.jsonl"
                try:
                    with path.open("a") as out:
                        out.write("\n".join(lines) + "\n")
                except OSError as error:
                    raise refusal(error, path) from error
                lines.clear()


def seal(folder: Path, records: Iterable[Record] = ()) -> None:
    """Gather the JSON lines of all ranks into ledger.parquet, events.parquet and trace.json."""
    said = {file: _lines(folder, file) + [line for r in records if not r.live for line in r.lines[file]] for file in _FILES}
    for file in ("ledger", "events"):
        _seal_table(folder / f"{file}.parquet", said[file], _COLUMNS[file])
    bars = [json.dumps(bar) for bar in _earlier_bars(folder)] + said["spans"]
    write(folder / "trace.json", '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(bars) + "\n]}\n")
    for path in folder.glob("*.rank*.jsonl"):
        path.unlink()


_FILES = ("ledger", "events", "spans")
_PLACE = {"step": "int64", "rank": "int64"}
_COLUMNS = {
    "ledger": {"at": "double", "stage": "string", "quantity": "string", "value": "double", "unit": "string", **_PLACE},
    "events": {"at": "double", "stage": "string", "event": "string", **_PLACE, "detail": "string"},
}


def _seal_table(path: Path, lines: list[str], columns: dict[str, str]) -> None:
    """JSON lines to Parquet, after the rows that are there already, in the order of time."""
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    text = pa.py_buffer("\n".join(lines).encode())
    rows = pa.json.read_json(pa.BufferReader(text), parse_options=options).select(list(columns)) if lines else schema.empty_table()
    if path.is_file():
        rows = pa.concat_tables([pq.read_table(path), rows])
    commit(path, lambda temporary: pq.write_table(rows.sort_by("at"), temporary))


def _earlier_bars(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trace.json"
    return list(json.loads(path.read_text())["traceEvents"]) if path.is_file() else []


def _lines(folder: Path, file: str) -> list[str]:
    """Lines of all ranks, without one that a crash tore."""
    lines = []
    for path in sorted(folder.glob(f"{file}.rank*.jsonl")):
        lines += [line for line in path.read_text(errors="replace").splitlines() if _whole(line)]
    return lines


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def read(folder: Path, file: str) -> list[dict[str, Any]]:
    """All rows of "ledger" or "events", sealed or still being written."""
    rows: list[dict[str, Any]] = []
    path = folder / f"{file}.parquet"
    if path.is_file():
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise Refused(f"{path} is no readable Parquet file ({error}); delete the folder {folder} and run again") from error
    return rows + [json.loads(line) for line in _lines(folder, file)]


def read_all(folder: Path, file: str) -> list[dict[str, Any]]:
    """All rows, with those of replicas that keep a record of their own."""
    return [row for part in (folder, *sorted(folder.glob("replica*"))) for row in read(part, file)]


def summarise(folder: Path, plan_id: str, program: str, quantities: Mapping[str, float | Value]) -> dict[str, Any]:
    """Write summary.json and return it. A value that is not finite is left out: it was not measured."""
    told = {}
    for name, value in quantities.items():
        v = value if isinstance(value, Value) else Value(value)
        if math.isfinite(v.value):
            told[name] = {"value": v.value, "unit": QUANTITIES[name.split(".")[1]][0], "low": v.low, "high": v.high}
    summary = {"plan": plan_id, "program": program, "quantities": told}
    write(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run, or None when there is none.

    Raises Refused for a file that is not a summary.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
        summary["quantities"], summary["plan"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is no summary of a run ({error}); delete it and run again") from error
    return dict(summary)


def state_totals(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Rank-seconds by state over a ledger."""
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["quantity"] in STATES:
            totals[row["quantity"]] += row["value"]
    return dict(totals)
