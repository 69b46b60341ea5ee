"""Ranks: started here through torch's elastic launcher, or found running under torchrun.

Under torchrun the first rank leads: it alone holds the record and works on the data, then gives out what all ranks
do together. The others follow: they wait for that, on any number of servers, for as long as it takes.
"""

import ctypes
import json
import logging
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan

Work = Callable[..., None]  # (plan, *arguments), on every rank
CROWD = 8  # most ranks that share a core
LONG = timedelta(days=365)  # data stages of a large corpus take days


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check(plan: Plan) -> None:
    """Whether this machine can hold the plan's ranks.

    Raises Refused with what is missing.
    """
    if under_torchrun():
        _check_torchrun(plan)
        return
    if plan.cluster.nodes > 1:
        cure = "use torchrun -m real on every server, or slurm=script"
        raise Refused(f"cluster.nodes={plan.cluster.nodes}: one process starts one server's ranks; {cure}")
    if plan.gpu.kind == "cuda":
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        what = f"gpu.kind=cuda asks for {plan.ranks} GPUs, this machine has {have}"
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        have = cores if plan.cluster.cores_per_node > cores else CROWD * cores  # a plan may say that ranks share cores
        what = f"the plan has {plan.ranks} ranks on cluster.cores_per_node={plan.cluster.cores_per_node}, this machine has {cores} cores"
    if plan.ranks > have:
        cure = f", or cluster.cores_per_node={cores} to share them" if CROWD * have >= plan.ranks > have else ""
        raise Refused(f"{what}; set cluster.gpus_per_node={max(1, have)}" + (cure if have else ", or gpu=cpu_core"))


def _check_torchrun(plan: Plan) -> None:
    started, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if started != plan.ranks:
        raise Refused(f"torchrun started {started} ranks, the plan has {plan.ranks}; change --nnodes, --nproc-per-node or the plan")
    if here != plan.cluster.gpus_per_node:
        cure = f"set cluster.nodes={started // here} cluster.gpus_per_node={here}, or change --nproc-per-node"
        raise Refused(f"torchrun started {here} ranks on this server, cluster.gpus_per_node={plan.cluster.gpus_per_node}; {cure}")


def together(life: Callable[[], int]) -> int:
    """A life under torchrun: the first rank that fails says why, the others end in silence with the same status."""
    status = 2
    try:
        status = life()
    except Exception:
        if _store().add("trouble", 1) == 1:
            raise
    finally:
        if rank() == 0:
            _give(status)
    return status


def follow(plan: Plan) -> int:
    """Do what the first rank gives out, until it gives its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would see it only after the wait
    store, number = _store(), 0
    while True:
        number += 1
        store.wait([f"work {number}"], LONG)
        given = pickle.loads(store.get(f"work {number}"))
        if isinstance(given, int):
            return given
        work, arguments = given
        _rank(plan, work, arguments)


def _give(what: int | tuple[Work, tuple[Any, ...]]) -> None:
    """To the ranks that follow: work, or the exit status of them all."""
    store = _store()
    store.set(f"work {store.add('given', 1)}", pickle.dumps(what))


def _store() -> dist.Store:
    """The table of names and values that torchrun's first agent keeps for its ranks."""
    store, _, _ = next(rendezvous("env://"))
    return store


def launch(plan: Plan, folder: Path, work: Work, *arguments: Any) -> None:
    """Run `work(plan, *arguments)` on every rank and wait.

    Raises Refused with what a rank refused. Ranks on CPU are forked from this process, which has imported what they
    need: two start in a tenth of a second instead of eight.
    """
    if under_torchrun():
        _give((work, arguments))
        return _rank(plan, work, arguments)
    for noisy in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # ranks print what befell them themselves
    complaint = folder / "refused.json"
    complaint.unlink(missing_ok=True)
    import torch._dynamo
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=plan.ranks, run_id=plan.id, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1, start_method="fork" if plan.gpu.kind == "cpu" else "spawn",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        elastic_launch(config, _child)(plan, complaint, work, arguments)
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped
    except ChildFailedError as error:
        if complaint.is_file():
            raise Refused(*json.loads(complaint.read_text())) from error
        number, failure = error.get_first_failure()
        cure = "its output is above; run the same command again to go on from the last checkpoint"
        raise Refused(f"rank {number} ended with {_ending(failure.exitcode)}; {cure}") from error


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _child(plan: Plan, complaint: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    """A rank that `launch` started: what it refuses reaches the parent through a file."""
    try:
        _rank(plan, work, arguments)
    except Refused as refused:
        if not complaint.is_file():
            write(complaint, json.dumps(refused.problems))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _rank(plan: Plan, work: Work, arguments: tuple[Any, ...]) -> None:
    """One rank's life: device, process group, work, tidy end."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # lines are flushed step by step: nothing is lost
    if plan.gpu.kind == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    if plan.gpu.kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_float32_matmul_precision("high")
    if plan.ranks > 1 or plan.train.precision != "fp32":  # lower precision is FSDP's, on one rank too
        backend = "cpu:gloo,cuda:nccl" if plan.gpu.kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    work(plan, *arguments)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def keep_memory() -> None:
    """Keep freed memory instead of giving it back to the kernel: page faults would double the time of large tensors."""
    trim_threshold, mmap_max = -1, -4  # names of glibc's mallopt
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def device(plan: Plan) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if plan.gpu.kind == "cuda" else torch.device("cpu")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
