"""A model's life, executed: extract → dedup → tokens → pretrain, each stage from where it stopped."""

import glob
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from conf.arithmetic import flops_per_token, tuned_flops_per_token
from conf.corpus import SHARD, files
from conf.errors import Refused
from conf.files import sweep, write
from conf.plan import Plan
from conf.program import to_yaml
from conf.record import STATES, Record, Value, read, read_all, read_summary, seal, summarise
from conf.units import show
from real import dedup, extract, packing, stage, substring, tokens
from real.engine import engine
from real.heartbeat import Stopped, clock
from real.place import Place, join
from real.shards import trained
from real.stage import Manifest
from real.summary import aligned, summary

Summing = Callable[[Plan, Any, Any], dict[str, float | Value]]  # of the ledger and the events
DATA = ("crawl", "extract", "dedup", "tokens")
STAGES = (*DATA, "pretrain", "finetune", "align")
TUNED, ALIGNED = "finetune", "align"  # folders of their records, in that of the run
NO_CORPUS = "data.path=null: real needs a corpus; name a file, folder or glob, or data=python"


class Life:
    """One run of a plan in its folder; an earlier attempt's clock goes on where its ledger ends."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None], source: Path | None = None,
                 traced: tuple[int, int] | None = None, place: Place | None = None) -> None:  # fmt: skip
        self.plan, self.folder, self.say, self.source, self.traced, self.place = plan, folder, say, source, traced, place
        self.part = place.plan if place else plan  # what is executed here
        self.born = time.time()
        earlier = read(folder, "ledger") if folder.is_dir() else []
        before = max((row["at"] for row in earlier), default=0.0)
        self.furthest = max((row["step"] or 0 for row in earlier if row["quantity"] == "step_time"), default=0)
        self.epoch = clock(self.part) - before
        self.record = Record(folder, rank=None, began=before)
        write(folder / "plan.yaml", to_yaml(plan))
        if plan.profile:
            write(folder / "profile.yaml", Path(plan.profile).read_bytes())
        later = place is not None and place.number > 0  # whose start is none of the run
        self.record.event("replica" if later else "run", "start", furthest=self.furthest)

    def crawl(self) -> None:
        """Fetch pages of the web; politeness makes it wait, so that one process is enough."""
        try:
            from real.crawl import crawl
        except ImportError as error:
            raise Refused(f"crawl.seeds needs {error.name}, which is not installed; pip install 'foretold[data]'") from error
        self._book("crawl", lambda: crawl(self.folder / "crawl", self.plan.crawl, self.progress("crawl")))

    def data(self, names: Collection[str]) -> None:
        """The data stages: the crawl, if there are seeds, and then the others on one pool of workers."""
        if "crawl" in names and self.plan.crawl.seeds:
            self.crawl()
        elif "crawl" in names and set(names) != set(DATA):
            raise Refused("crawl.seeds=[] names no address; say where the crawl begins with crawl.seeds=[https://example.org/]")
        names = [name for name in names if name != "crawl"]
        if not names:
            return
        if self.plan.data.path is None:
            raise Refused(NO_CORPUS)
        began = self.record.now()
        if "extract" in names:
            self.read = self._corpus()
            self.found = files(self.read.data)
            self.choices = extract.config(self.read, self.found)  # refused before a worker is started
        with engine(self.plan) as pool:
            self.spend("init", "run", began)
            try:
                for name in names:
                    self._stage(name, pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _stage(self, name: str, pool: Executor) -> None:
        self._book(name, lambda: {"extract": self._extract, "dedup": self._dedup, "tokens": self._tokens}[name](pool))

    def _book(self, name: str, work: Callable[[], Manifest]) -> None:
        began = self.record.now()
        self.record.event(name, "start")
        self.record.flush()
        manifest = work()
        self.spend("data", name, began)
        for quantity, value in measured(name, manifest).items():
            self.record.observe(name, quantity, value)
        self.record.event(name, "end", **manifest.counters)
        self.record.flush()
        self.say(told(name, manifest))

    def spend(self, state: str, where: str, began: float) -> None:
        """Book the time since `began` for all ranks: the data stages run before the ranks exist."""
        now = self.record.now()
        self.record.observe(where, state, (now - began) * self.part.ranks)
        self.record.span(where, began, now, where, lane="job")

    def _spend_rest(self, stage: str, launched: float) -> None:
        """What the ranks did not book themselves since they were started: their way out."""
        rows = read(self.folder, "ledger")
        booked = sum(row["value"] for row in rows if row["stage"] == stage and row["at"] >= launched and row["quantity"] in STATES)
        self.record.observe(stage, "idle", max(0.0, (self.record.now() - launched) * self.part.ranks - booked))

    def progress(self, name: str) -> Callable[[float], None]:
        began, before = time.monotonic(), list[float]()

        def show_share(share: float) -> None:
            """What was done before this command began tells nothing of its pace: the first share is where it stood."""
            before.append(share)
            spent, done = time.monotonic() - began, share - before[0]
            left = f", {show(spent * (1 - share) / done, 's')} left" if done > 0 and share < 1 else ""
            self.say(f"\r{name} {share:.0%}{left}")

        return show_share

    def _corpus(self) -> Plan:
        """The plan with the run's own crawl as its corpus, where that is asked for."""
        if self.plan.data.path != "crawl":
            return self.plan
        Manifest.read(self.folder / "crawl")
        return self.plan.but(**{"data.path": glob.escape(str(self.folder / "crawl")) + "/*.warc.gz"})

    def _extract(self, pool: Executor) -> Manifest:
        facts = {"path": self.plan.data.path, "tasks_of": SHARD}
        work = extract.tasks(self.read, self.found)
        done = stage.run(self.folder / "extract", work, self.choices, pool, facts, self.progress("extract"))
        if not done.counters.get("documents"):
            unread = int(done.counters.get("unreadable", 0))
            why = f"none of its {unread} files could be read" if unread else "its files are empty"
            why = f"data.filter={self.plan.data.filter} refused all of it" if done.counters.get("refused") else why
            raise Refused(f"data.path={self.plan.data.path} gave no document: {why}; see {self.folder / 'extract'}")
        return done

    def _dedup(self, pool: Executor) -> Manifest:
        folder, began = self.folder / "dedup", time.perf_counter()
        extracted = Manifest.read(self.folder / "extract")
        data = self.plan.data
        config, how = dedup.config(data.dedup, data.dedup_within, data.keep), data.dedup
        root = data.path if data.dedup_within == "folder" and data.path != "crawl" else None  # a crawl is one snapshot
        hashed = stage.run(folder / "hashes", dedup.hash_tasks(extracted, root), config, pool, {}, lambda _: None)
        near, groups, moved, paired = None, dict[str, int](), [hashed], list[Manifest]()
        if how == "minhash":
            banded = stage.run(
                folder / "bands", dedup.band_tasks(extracted, root, data.keep), config, pool, {}, self.progress("dedup, signatures")
            )
            paired.append(stage.run(folder / "pairs", dedup.pair_tasks(banded), config, pool, {}, self.progress("dedup, pairs")))
            near, groups = dedup.near_duplicates(paired[0])
            moved.append(banded)
        length = self.plan.data.substrings
        whole = folder / "whole" if length else folder
        repeated = stage.run(folder / "repeats", dedup.repeat_tasks(hashed), config, pool, {}, lambda _: None)
        kept = stage.run(whole, dedup.keep_tasks(extracted, repeated, near), config, pool, config, self.progress("dedup"))
        searching = time.perf_counter()
        done = substring.remove(folder, kept, length, pool, self.progress("dedup, substrings")) if length else kept
        done.facts |= {"substring_seconds": time.perf_counter() - searching} if length else {}
        done.counters |= groups
        done.counters["shuffle_bytes"] = sum(output["bytes"] for manifest in moved for output in manifest.outputs)
        done.facts["worker_memory"] = max(part.facts["worker_memory"] for part in (*moved, *paired, repeated, kept, done))
        return self._timed(done, began)

    def _tokens(self, pool: Executor) -> Manifest:
        folder, began = self.folder / "tokens", time.perf_counter()
        documents = Manifest.read(self.folder / "dedup")
        self.say("\rtokens: training the tokenizer")
        tokenizer = tokens.train_tokenizer(folder, documents, self.plan)
        facts = {"tokenizer": tokenizer.name, "sha256": stage.sha256(tokenizer), "tokenizer_seconds": time.perf_counter() - began}
        done = stage.run(
            folder, tokens.tasks(documents, tokenizer, self.plan), tokens.config(self.plan), pool, facts, self.progress("tokens")
        )
        if self.plan.train.packing == "best_fit":
            config, shown = packing.config(self.plan), self.progress("tokens, packing")
            work = packing.tasks(done, trained(self.plan.data.weights), self.plan.train.seq_len)
            packs = stage.run(folder / "packs", work, config, pool, {}, shown)
            done.counters |= packs.counters
        return self._timed(done, began)

    @staticmethod
    def _timed(manifest: Manifest, began: float) -> Manifest:
        manifest.seconds = max(manifest.seconds, time.perf_counter() - began)
        return manifest

    def pretrain(self) -> None:
        if self.plan.data.path is None:
            raise Refused(NO_CORPUS)
        told = read_summary(self.folder.parent / "sim")
        quantities = told["quantities"] if told else {}
        foretold = {n: quantities[f"pretrain.{n}"]["value"] for n in ("step_time", "peak_memory") if f"pretrain.{n}" in quantities}
        self.train(foretold, source=self.source)
        if script := self.plan.failures.script:
            from real.failures import unfired

            missed = unfired(self.plan, self.folder)
            told = f"; not: {', '.join(missed)}" if missed else ""
            self.say(f"{len(script) - len(missed)} of {len(script)} planned faults struck{told}")

    def train(self, foretold: dict[str, float], **how: Path | None) -> None:
        """The loop of optimizer steps, watched."""
        from real.pretrain import Start, pretrain

        self.record.event("pretrain", "start")
        launched = self.record.now()
        start = Start(self.folder, self.epoch, launched, launched, self.furthest, foretold, traced=self.traced, whole=self.plan,
                      replica=self.place.number if self.place else None, **how)  # fmt: skip
        self.supervise(pretrain, start)

    def supervise(self, work: Callable[..., bool], start: Any) -> None:
        """`work` on every rank, which are watched, until it is done.

        Raises Stopped when a signal asked for an end.
        """
        from real.cluster import under_torchrun
        from real.recovery import Supervisor

        if not under_torchrun():
            Supervisor(self.part, self.folder, self.record, self.say).run(work, start)
        elif not self._launch(work, start):
            raise Stopped
        self._spend_rest("pretrain", start.launched)

    def finetune(self) -> None:
        """Fine-tuning is training, of the plan's `tuned` twin and in a record of its own below this one."""
        from real import finetune

        inner = Life(self.plan.tuned, self.folder / TUNED, self.say, traced=self.traced)
        finetune.run(inner, self.folder, self.source)
        inner.close()

    def align(self) -> None:
        """Alignment has a record of its own, as fine-tuning has."""
        from real import align

        inner = Life(self.plan.but(**{"failures.script": []}), self.folder / ALIGNED, self.say, traced=self.traced)
        align.run(inner, self.folder, self.source)
        inner.close(aligned)

    def join(self, home: Path) -> None:
        """A later replica uses what the first has prepared."""
        began = self.record.now()
        join(home, self.folder, self.say, self.plan.failures.start_timeout)
        self.spend("idle", "run", began)

    def measure(self, names: Collection[str]) -> None:
        """Time this machine's operations and collectives into kernels.csv and network.csv."""
        from real.measure import measure

        self._launch(measure, self.folder, tuple(names), self.epoch, self.record.now())

    def _launch(self, work: Callable[..., Any], *arguments: Any) -> Any:
        from real.cluster import launch

        self.record.flush()
        return launch(self.part, self.folder, work, *arguments)

    def close(self, summed: Summing = summary) -> dict[str, Any]:
        """Seal the record and sum it up."""
        self.record.event("run", "end")
        self.record.flush()
        seal(self.folder)
        sweep(self.folder, self.born)
        first = self.place is None or self.place.number == 0
        rows, events = (read_all(self.folder, file) for file in ("ledger", "events"))
        quantities = summed(self.plan if first else self.part, rows, events)
        later = _tuned(self.folder / TUNED, self.plan) | _quantities(self.folder / ALIGNED)
        return summarise(self.folder, self.plan.id, "real", quantities | later)


def _quantities(folder: Path) -> dict[str, float | Value]:
    """What a record's summary says."""
    summed = read_summary(folder)
    return {name: Value(q["value"], q["low"], q["high"]) for name, q in summed["quantities"].items()} if summed else {}


def _tuned(folder: Path, plan: Plan) -> dict[str, float | Value]:
    """Quantities of the fine-tuning, by its own name; MFU counts the FLOPs of what was trained."""
    found = _quantities(folder)
    if not found:
        return {}
    told: dict[str, float | Value] = {n.replace("pretrain.", "finetune."): value for n, value in found.items() if n.startswith("pretrain.")}
    if plan.finetune.adapters and "pretrain.mfu" in found:
        ways = flops_per_token(plan.model, plan.finetune.seq_len), found["pretrain.parameters"].value
        told["finetune.mfu"] = found["pretrain.mfu"].value * tuned_flops_per_token(plan.model, plan.finetune.seq_len, ways[1]) / ways[0]
    metered = {"finetune.energy": found["run.energy"]} if "run.energy" in found else {}
    return told | metered | {"finetune.seconds": found["run.wall_clock"], "finetune.cost": found["run.cost"]}


def measured(name: str, manifest: Manifest) -> dict[str, float]:
    """What a data stage says of itself."""
    c, seconds = manifest.counters, max(manifest.seconds, 1e-9)
    if name == "crawl":
        return {"seconds": seconds, "pages": c["pages"], "bytes": c["bytes"], "pages_per_s": c["pages"] / seconds}
    if name == "extract":
        return {
            "seconds": seconds,
            "read": c["read"],
            "bytes": c["bytes"],
            "documents": c["documents"],
            "documents_per_s": c["documents"] / seconds,
            "worker_memory": manifest.facts["worker_memory"],
        }
    if name == "dedup":
        return {"seconds": seconds, "read": c["read"], "documents": c["documents"], "documents_per_s": c["documents_in"] / seconds,
                "shuffle_bytes": c["shuffle_bytes"], "worker_memory": manifest.facts["worker_memory"],
                "removed_fraction": c["removed"] / max(1, c["documents_in"]),
                **{name: value for name, value in manifest.facts.items() if name == "substring_seconds"}}  # fmt: skip
    count = c["train_tokens"] + c["held_out_tokens"]
    return {"seconds": seconds, "bytes": c["bytes"], "tokens": count, "tokens_per_s": count / seconds,
            "tokenizer_seconds": manifest.facts["tokenizer_seconds"], "worker_memory": manifest.facts["worker_memory"]}  # fmt: skip


def told(name: str, manifest: Manifest) -> str:
    c = manifest.counters
    if name == "crawl":
        left = ", ".join(f"{n:,.0f} {name.replace('_', ' ')}" for name, n in c.items() if n and name not in ("pages", "bytes", "hosts"))
        found = f"{c['pages']:,.0f} pages of {c['hosts']:,.0f} hosts, {c['bytes'] / 1e6:,.1f} MB"
        return f"crawl: {found} in {manifest.seconds:.1f} s; {left or 'nothing left out'}"
    if name == "extract":
        spoilt = f", {c['unreadable']:,.0f} unreadable" if c["unreadable"] else ""
        found = f"{c['files']:,.0f} files, {c['documents']:,.0f} documents, {c['bytes'] / 1e6:,.1f} MB"
        rules = sorted(((name.removeprefix("refused: "), n) for name, n in c.items() if name.startswith("refused: ")), key=lambda r: -r[1])
        refused = f", {c['refused']:,.0f} refused ({', '.join(f'{name} {n:,.0f}' for name, n in rules[:4])})" if rules else ""
        return f"extract: {found} in {manifest.seconds:.1f} s{spoilt}{refused}"
    if name == "dedup":
        near = c["removed"] - c["removed_exact"] - c.get("emptied", 0)
        nearly = f" ({near:,.0f} of them nearly the same as another)" if near else ""
        cut = f", {c['words_removed']:,.0f} of {c['words']:,.0f} words cut out of {c['touched']:,.0f}" if "touched" in c else ""
        return f"dedup: {c['documents']:,.0f} documents stay, {c['removed']:,.0f} removed{nearly}{cut} in {manifest.seconds:.1f} s"
    packs = f", in {c['packs']:,.0f} sequences that are {c['tokens'] / c['room']:.2%} full" if "packs" in c else ""
    return f"tokens: {c['train_tokens']:,.0f} for training{packs}, {c['held_out_tokens']:,.0f} held out in {manifest.seconds:.1f} s"
