"""Ranks: started here through torch's elastic launcher, or found running under torchrun."""

import ctypes
import json
import logging
import os
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

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan

Work = Callable[..., None]  # (plan, *arguments), on every rank


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check(plan: Plan) -> None:
    """Whether this machine can hold the plan's ranks.

    Raises Refused with what is missing.
    """
    if under_torchrun():
        if int(os.environ["WORLD_SIZE"]) != plan.ranks:
            raise Refused(
                f"torchrun started {os.environ['WORLD_SIZE']} ranks, the plan has {plan.ranks}; change --nproc-per-node or the plan"
            )
        return
    if plan.cluster.nodes > 1:
        raise Refused(f"cluster.nodes={plan.cluster.nodes}: one process starts one server's ranks; use torchrun -m real on every server")
    if plan.gpu.kind == "cuda":
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        what = f"gpu.kind=cuda asks for {plan.ranks} GPUs, this machine has {have}"
    else:
        have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        what = f"the plan has {plan.ranks} ranks, this machine has {have} cores for them"
    if plan.ranks > have:
        raise Refused(f"{what}; set cluster.gpus_per_node={max(1, have)}" + ("" if have else ", or gpu=cpu_core"))


def launch(plan: Plan, folder: Path, work: Work, *arguments: Any) -> None:
    """Run `work(plan, *arguments)` on every rank and wait.

    Raises Refused with what a rank refused. Ranks on CPU are forked from this process, which has imported what they
    need: two start in a tenth of a second instead of eight.
    """
    for noisy in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # ranks print what befell them themselves
    complaint = folder / "refused.json"
    complaint.unlink(missing_ok=True)
    if under_torchrun():
        return _rank(plan, complaint, work, arguments)
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
        elastic_launch(config, _rank)(plan, complaint, work, arguments)
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


def _rank(plan: Plan, complaint: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    """One rank's life: device, process group, work, tidy end."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # lines are flushed step by step: nothing is lost
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if plan.gpu.kind == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    if plan.gpu.kind == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    if plan.ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if plan.gpu.kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        work(plan, *arguments)
    except Refused as refused:
        if not complaint.is_file():
            write(complaint, json.dumps(refused.problems))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
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
