"""Checkpoints: whole or absent, verified before they are trusted, readable on any mesh.

A checkpoint is written into a hidden folder, flushed, sealed with a manifest that holds the digest of every file, and
renamed. A folder without its manifest is a torn checkpoint and is never read. Torch's own metadata is a pickle, which
could run anything: it is read by an unpickler that knows the dozen classes it consists of and no other.
"""

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from conf.errors import Refused
from conf.files import refusal, write
from conf.plan import Checkpoint, Plan
from real.initial import canonical
from real.model import Decoder
from real.optim import Optimizer, local
from real.stage import sha256

# How a full disk shows: plainly, or as a file that torch's writer finds shorter than what it wrote.
ADAPTER = (".lora_A", ".lora_B")  # how names of adapters end
TUNED = (*ADAPTER, ".packed", "score.weight")  # and of all that no base has
SHORT = ("No space left", "File too large", "Disk quota", "unexpected pos")


class Writer:
    """Saves checkpoints into a folder; beside the training when the plan says so.

    `passing` hears of the places at which a crash would be worst: saving, sealing, saved.
    Then `save` only copies what is to be written to the host's memory, and a thread of each rank writes the copy while training goes
    on. The threads talk to each other over ranks of their own, on gloo.
    """

    def __init__(self, folder: Path, plan: Plan, passing: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.plan, self.passing = folder, plan, passing
        self.thread = ThreadPoolExecutor(1) if plan.checkpoint.asynchronous else None
        self.group = dist.new_group(backend="gloo") if self.thread and dist.is_initialized() else None
        self.pending: Future[tuple[int, int]] | None = None

    def save(self, tensors: dict[str, Tensor], step: int) -> list[tuple[int, int]]:
        """Save after `step` optimizer steps; all ranks call it. Returns the steps that became safe, with their bytes on disk.

        Raises Refused when the disk is full; the previous checkpoint is untouched.
        """
        done = self.finish()
        if self.thread is None:
            return [*done, self._write(tensors, step)]
        self.pending = self.thread.submit(self._write, {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, step)
        return done

    def finish(self) -> list[tuple[int, int]]:
        """Wait for what is being written."""
        pending, self.pending = self.pending, None
        return [pending.result()] if pending else []

    def poll(self) -> list[tuple[int, int]]:
        """What has become safe since the last look."""
        return self.finish() if self.pending and self.pending.done() else []

    def _write(self, tensors: dict[str, Tensor], step: int) -> tuple[int, int]:
        final, aside = self.folder / f"step-{step:08}", self.folder / f".step-{step:08}"
        first = rank() == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True, exist_ok=True)
        self._barrier()
        try:
            with _quiet():
                storage = _Storage(aside, self.passing)
                dcp.save(tensors, storage_writer=storage, process_group=self.group, no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:  # torch wraps what each rank met
            if not any(sign in str(error) for sign in SHORT):
                raise
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise refusal(OSError(errno.ENOSPC, ""), aside) from error
        self._barrier()
        if first:
            _seal(aside, self.plan, step)
        self.passing("sealing")
        if first:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            _forget(self.folder, self.plan.checkpoint)
        self._barrier()
        self.passing("saved")
        return step, sum(f.stat().st_size for f in final.iterdir())

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier(group=self.group)


class _Storage(dcp.FileSystemWriter):
    """Torch's own writer, which says when it begins."""

    def __init__(self, folder: Path, passing: Callable[[str], None]) -> None:
        super().__init__(folder)
        self.passing = passing

    def write_data(self, *arguments: Any, **named: Any) -> Any:
        self.passing("saving")
        return super().write_data(*arguments, **named)


def _seal(aside: Path, plan: Plan, step: int) -> None:
    files = sorted(p for p in aside.iterdir() if p.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    digests = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    facts = {"plan": plan.id, "step": step, "samples": plan.samples(step), "seed": plan.seed, "model": plan.model.name, "files": digests}
    write(aside / "manifest.json", json.dumps(facts, indent=1))


def _forget(folder: Path, rule: Checkpoint) -> None:
    """Keep the newest, and those at every so many steps for good."""
    for old in complete(folder)[: -rule.keep]:
        if not rule.keep_every or step_of(old) % rule.keep_every:
            shutil.rmtree(old, ignore_errors=True)


def step_of(path: Path) -> int:
    """Steps that a sealed checkpoint holds, by its name."""
    return int(path.name.split("-")[1])


def complete(folder: Path) -> list[Path]:
    """Sealed checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob("step-*/manifest.json"))


def check(path: Path, plan: Plan | None) -> tuple[str | None, dict[str, Any]]:
    """Why a checkpoint cannot be used, or None; and its manifest. Without a plan it may belong to any."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, owner = dict(manifest["files"]), manifest["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest is corrupt ({error})", {}
    if plan is not None and owner != plan.id:
        return f"it belongs to plan {owner}, this is plan {plan.id}; start from it with start={path}", manifest
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", manifest
        if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
            return f"{name} is corrupt: its digest differs from the manifest's", manifest
    return None, manifest


def find(place: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at a place that a person named, itself or the newest sound one below it, and its manifest.

    Raises Refused when there is none.
    """
    folders = [place] if (place / "manifest.json").is_file() and place.name.startswith("step-") else []
    folders = folders or sorted((p.parent for p in place.glob("**/step-*/manifest.json")), key=lambda p: (p.name, p.stat().st_mtime))
    reasons = []
    for path in reversed(folders):
        reason, manifest = check(path, None)
        if reason is None:
            return path, manifest
        reasons.append(f"start={path}: {reason}")
    raise Refused(*(reasons or [f"start={place} holds no checkpoint (step-*/manifest.json) and no config.json; name a run's folder"]))


class Reader(dcp.FileSystemReader):
    """Reads what `Writer` wrote, and nothing that could do harm."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """The classes that describe tensors on disk; a class for pickled bytes is not among them."""

    KNOWN: ClassVar = {
        "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
        "torch": ("Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "float8_e4m3fn"),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.KNOWN.get(module, ()):
            raise Refused(f"the checkpoint's .metadata names {module}.{name}, which none of ours does: do not trust it; delete it")
        return super().find_class(module, name)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    found = Reader(path).read_metadata().state_dict_metadata
    return {name: tuple(m.size) for name, m in found.items() if isinstance(m, TensorStorageMetadata)}


def read(into: dict[str, Tensor], path: Path, alone: bool = False) -> None:
    """Fill tensors from a checkpoint by their names; each rank its own parts, or `alone` without the others."""
    with _quiet():
        dcp.load(into, storage_reader=Reader(path), no_dist=alone or not dist.is_initialized())


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns that a process is alone; it is meant to be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def load(path: Path, parts: Sequence[Decoder], optimizer: Optimizer, step: int, prefix: str = "") -> None:
    """Fill model and optimizer, bit for bit, on this mesh, whichever mesh wrote them; `prefix` tells one model of several.

    Raises Refused when the checkpoint is of another model: it lists what differs.
    """

    restore(parts, optimizer, step, lambda wanted: _read_alike({prefix + name: tensor for name, tensor in wanted.items()}, path))


def load_model(path: Path, parts: Sequence[Decoder]) -> None:
    """Fill the model without its adapters, and no optimizer.

    Raises Refused as `load` does.
    """
    named = {canonical(part, name): p.detach() for part in parts for name, p in part.named_parameters()}
    named |= {name: b for part in parts for name, b in part.named_buffers() if name.endswith("correction_bias")}
    _read_alike({f"model.{name}": tensor for name, tensor in named.items() if not name.endswith(TUNED)}, path)


def whole(path: Path, name: str, shape: tuple[int, int]) -> Tensor:
    """One matrix of a checkpoint, on this rank alone.

    Raises Refused where it has another shape.
    """
    found = torch.empty(shape)
    _read_alike({f"model.{name}": found}, path, alone=True)
    return found


def _read_alike(wanted: dict[str, Tensor], path: Path, alone: bool = False) -> None:
    there = shapes(path)
    wrong = [
        f"{name}: {there.get(name, 'absent')} in the checkpoint, {tuple(tensor.shape)} in the plan"
        for name, tensor in wanted.items()
        if there.get(name) != tuple(tensor.shape)
    ]
    if wrong:
        shown = [line for line in wrong if line.startswith("model.")][:8] or wrong[:8]
        said = f"{path} is of another model or optimizer, {len(wrong)} tensors differ; start from one of the plan's model"
        raise Refused(said, *shown)
    read(wanted, path, alone)


def restore(parts: Sequence[Decoder], optimizer: Optimizer, step: int, reading: Callable[[dict[str, Tensor]], None]) -> None:
    """Let `reading` fill model and optimizer as they are after so many steps."""
    optimizer.begin()
    wanted = state(parts, optimizer)
    reading(wanted)
    for name, _, moments in optimizer.state():  # what is kept in 8 bits was read beside them
        for key, value in moments.items():
            if hasattr(value, "codes"):
                value.copy_(local(wanted[f"optimizer.{name}.{key}"]))
    for _, _, moments in optimizer.state():
        for key, value in moments.items():
            if key == "step":
                moments[key] = torch.full_like(value, float(step)) if isinstance(value, Tensor) else step


def state(parts: Sequence[Decoder], optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor that training changes, by name; shards of a parameter are DTensors, so that any mesh can read them."""
    found = {f"model.{canonical(part, name)}": p.detach() for part in parts for name, p in part.named_parameters() if p.requires_grad}
    found |= {f"model.{name}": b for part in parts for name, b in part.named_buffers() if name.endswith("correction_bias")}
    for name, parameter, moments in optimizer.state():
        found |= {f"optimizer.{name}.{key}": _like(value, parameter) for key, value in moments.items() if key != "step"}
    return found


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment, laid out over the ranks as its parameter is; one kept in 8 bits is written in fp32."""
    value = value.dequantize() if hasattr(value, "codes") else value
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
