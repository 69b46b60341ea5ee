"""A data stage: tasks that each turn named inputs into files, once.

A task is a baker with an order slip: the slip's key is the hash of the recipe and of the ingredients. He bakes aside,
puts the tray on the shelf whole, and pins the receipt. Whoever comes next morning bakes only slips without a receipt.
"""

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from socket import gethostname
from statistics import median
from typing import Any

from conf.errors import Refused
from conf.files import commit, refusal, write

Work = Callable[..., dict[str, Any]]  # (folder, name, *arguments) → counters, after writing its files into folder


@dataclass(frozen=True)
class Task:
    name: str
    work: Work
    arguments: tuple[Any, ...]
    inputs: tuple[str, ...]  # digests of what it reads


@dataclass
class Manifest:
    """What a finished stage left: its files with their digests, its counters, its cost."""

    folder: Path
    outputs: list[dict[str, Any]]
    counters: dict[str, float]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in a folder.

        Raises Refused when it is missing or broken.
        """
        path = folder / "manifest.json"
        try:
            found = json.loads(path.read_text())
            return cls(folder, found["outputs"], found["counters"], found["seconds"], found["facts"])
        except FileNotFoundError as error:
            raise Refused(f"{path} is missing: the stage has not run; run foretold real with only={folder.name}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path} is corrupt ({error}); delete it and run the same command again: it is made anew") from error

    def verified(self, output: Mapping[str, Any]) -> Path:
        """The path of an output after its size and digest agree with the receipt."""
        path = self.folder / str(output["path"])
        cure = f"delete {self.folder} and run the same command again: it is made anew"
        if not path.is_file():
            raise Refused(f"{path} is missing; {cure}")
        if path.stat().st_size != output["bytes"]:
            raise Refused(f"{path} has {path.stat().st_size} bytes, its receipt says {output['bytes']}: corrupt; {cure}")
        if sha256(path) != output["sha256"]:
            raise Refused(f"{path} has another sha256 than its receipt: corrupt; {cure}")
        return path

    def verified_twin(self, output: Mapping[str, Any], suffix: str) -> Path:
        """The verified file of the same name with another ending."""
        name = str(Path(output["path"]).with_suffix(suffix))
        twin = next((o for o in self.outputs if o["path"] == name), None)
        if twin is None:
            raise Refused(f"{self.folder / 'manifest.json'} names {output['path']} but not {name}; delete {self.folder} and run again")
        return self.verified(twin)

    def paths(self, suffix: str) -> list[dict[str, Any]]:
        return [o for o in self.outputs if o["path"].endswith(suffix)]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def workers(count: int, modules: Sequence[str] = ()) -> ProcessPoolExecutor:
    """Processes that start fresh (nothing of torch is carried along), with these modules imported."""
    import multiprocessing

    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_calm, initargs=(modules,))
    list(pool.map(_ready, range(count)))
    return pool


def _calm(modules: Sequence[str]) -> None:
    import importlib
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in modules:
        importlib.import_module(name)


def _ready(_: int) -> None:
    """Whoever answers has started."""


def run(folder: Path, tasks: Iterable[Task], config: Mapping[str, Any], pool: Executor,
        facts: Mapping[str, Any], progress: Callable[[float], None]) -> Manifest:  # fmt: skip
    """Run the tasks that have no valid receipt, then write the manifest."""
    began = time.perf_counter()
    receipts: dict[str, dict[str, Any]] = {}
    waiting = {}
    slips = [(key(task, folder.name, config), task) for task in tasks]
    for slip, task in slips:
        receipt = _receipt(folder, slip)
        if receipt:
            receipts[slip] = receipt
        else:
            waiting[pool.submit(_do, folder, slip, task)] = slip
    progress(len(receipts) / max(1, len(slips)))
    try:
        for future in as_completed(waiting):
            receipts[waiting[future]] = future.result()
            progress(len(receipts) / len(slips))
    except BrokenProcessPool as error:
        raise Refused(f"{folder.name}: a worker was killed, most likely because memory ran out; give the same command again, which goes on "
                      "after what has a receipt, with a smaller cluster.cores_per_node if it happens again") from error  # fmt: skip
    ordered = [receipts[slip] for slip, _ in slips]
    outputs = [o for receipt in ordered for o in receipt["outputs"]]
    counters: dict[str, float] = {"tasks": len(slips)}
    for receipt in ordered:
        for name, value in receipt["counters"].items():
            counters[name] = counters.get(name, 0) + value
    seconds = time.perf_counter() - began if waiting else _earlier_seconds(folder)
    told = dict(facts) | {"start_seconds": _start(ordered), "worker_memory": max((r["memory"] for r in ordered), default=0)}
    manifest = Manifest(folder, outputs, counters, seconds, told)
    content = {
        "stage": folder.name,
        "config": dict(config),
        "outputs": outputs,
        "counters": counters,
        "seconds": seconds,
        "facts": told,
    }
    write(folder / "manifest.json", json.dumps(content, indent=1))
    return manifest


def _start(receipts: Sequence[Mapping[str, Any]]) -> float:
    """By how much a worker's first task is longer than the later ones: libraries that start, files read for the first time."""
    first, later, known = list[float](), list[float](), set[str]()
    for receipt in sorted(receipts, key=lambda receipt: receipt["at"]):
        (later if receipt["worker"] in known else first).append(receipt["seconds"])
        known.add(receipt["worker"])
    return max(0.0, median(first) - median(later)) if later else 0.0


def key(task: Task, stage: str, config: Mapping[str, Any]) -> str:
    """Hash of recipe and ingredients."""
    slip = json.dumps([stage, task.name, config, task.inputs], sort_keys=True)
    return hashlib.blake2b(slip.encode(), digest_size=12).hexdigest()


def _receipt(folder: Path, slip: str) -> dict[str, Any] | None:
    try:
        receipt: dict[str, Any] = json.loads((folder / "receipts" / f"{slip}.json").read_text())
        whole = all((folder / o["path"]).stat().st_size == o["bytes"] for o in receipt["outputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no receipt, or a spoilt one: the task is done again
    return receipt if whole else None


def _earlier_seconds(folder: Path) -> float:
    try:
        return Manifest.read(folder).seconds
    except Refused:
        return 0.0


def _do(folder: Path, slip: str, task: Task) -> dict[str, Any]:
    """One task, in a worker: bake aside, shelve, pin the receipt."""
    at, began, cpu = time.time(), time.perf_counter(), _worked()
    aside = folder / f".{slip}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        counters = task.work(aside, task.name, *task.arguments)
        outputs = []
        for path in sorted(aside.iterdir()):
            size, digest = path.stat().st_size, sha256(path)
            commit(folder / path.name, lambda temporary, path=path: path.rename(temporary))
            outputs.append({"path": path.name, "bytes": size, "sha256": digest})
        aside.rmdir()
    except OSError as error:
        raise refusal(error, folder) from error
    receipt = {"key": slip, "task": task.name, "outputs": outputs, "counters": counters, "worker": f"{gethostname()}:{os.getpid()}",
               "at": at, "seconds": time.perf_counter() - began, "cpu_seconds": _worked() - cpu, "memory": _most()}  # fmt: skip
    write(folder / "receipts" / f"{slip}.json", json.dumps(receipt))
    return receipt


def _worked() -> float:
    """Processor seconds of this process and of its finished children, which read pages for it."""
    return sum(os.times()[:4])


def _most() -> int:
    """Bytes that this process has held at most, its libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
