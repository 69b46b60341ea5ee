"""Ranks: started here, or found running under torchrun.

Under torchrun the first rank leads: it alone holds the record and works on the data, then gives out what all ranks
do together. The others follow: they wait for that, on any number of servers, for as long as it takes.
"""

import ctypes
import faulthandler
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.rendezvous import rendezvous

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from real.heartbeat import Pulse

Work = Callable[..., Any]  # (plan, *arguments), on every rank
CROWD = 8  # most ranks that share a core
POLL = 0.05  # seconds between two looks at the ranks
PEERS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")  # what gloo says of a lost rank
SILENT = "Timed out waiting"  # and of one that it hears nothing from
LOST = 4  # exit status of such a rank
ASKING = timedelta(seconds=10)  # for an answer from the others when something is wrong
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
    except Exception as error:
        if _first_in_trouble():
            if any(sign in str(error) for sign in (*PEERS, SILENT)):
                cure = "where torchrun does not start the ranks again, the same command goes on from the last checkpoint"
                raise Refused(f"rank {rank()} lost its peers ({str(error).rpartition('] ')[2]}); {cure}") from error
            raise
    finally:
        if rank() == 0:
            _give(status)
    return status


def _first_in_trouble() -> bool:
    """Whether no other rank has told of trouble; so too where the others cannot be asked."""
    try:
        held = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=ASKING)
        return _of_this_start(held).add("trouble", 1) == 1
    except RuntimeError:
        return True


def follow() -> int:
    """Do what the first rank gives out, until it gives its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would see it only after the wait
    store, number = table(), 0
    while True:
        number += 1
        store.wait([f"work {number}"], LONG)
        given = pickle.loads(store.get(f"work {number}"))
        if isinstance(given, int):
            return given
        _rank(*given)


def _give(what: int | tuple[Plan, Work, tuple[Any, ...]]) -> None:
    """To the ranks that follow: work, or the exit status of them all."""
    store = table()
    store.set(f"work {store.add('given', 1)}", pickle.dumps(what))


@cache
def table() -> dist.Store:
    """The table of names and values in which ranks find each other."""
    store, _, _ = next(rendezvous("env://"))
    return _of_this_start(store)


def _of_this_start(store: dist.Store) -> dist.Store:
    """Torchrun's agent keeps one table through all its restarts; told not to share it, each start has its own, and restarts are
    counted differently by servers that came later."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if kept else ''}", store)


class Crew:
    """Ranks that run on this machine, started together and ended together.

    Those on CPU are forked from this process, which has imported what they need: two start in a tenth of a second instead of
    eight. The table in which they find each other lives here and is new for every crew, so nothing of an earlier one is in it.
    It starts after the forks, on a socket that was open before: a fork must not copy what its threads have locked.
    """

    def __init__(self, plan: Plan, devices: Sequence[int], pulse: Pulse, folder: Path, work: Work, *arguments: Any) -> None:
        import torch._dynamo  # before the fork

        torch.set_num_threads(1)
        self.pulse, self.complaint = pulse, folder / "refused.json"
        self.complaint.unlink(missing_ok=True)
        joined = "TORCHFT_LIGHTHOUSE" in os.environ  # replicas on other servers look into the table too
        door = socket.create_server(("" if joined else "localhost", 0), backlog=plan.ranks + 1)
        port = door.getsockname()[1]
        context = multiprocessing.get_context("fork" if plan.gpu.kind == "cpu" else "spawn")
        self.processes = [
            context.Process(target=_child, args=(number, device, os.getpid(), port, plan, self.complaint, work, arguments), daemon=True)
            for number, device in enumerate(devices)
        ]
        for process in self.processes:
            process.start()
        self.store: dist.Store | None = dist.TCPStore(
            "localhost", port, None, is_master=True, wait_for_workers=False, master_listen_fd=door.detach()
        )

    def ended(self) -> dict[int, int]:
        """Status of each rank that has ended; minus a signal's number for one that was killed."""
        return {number: process.exitcode for number, process in enumerate(self.processes) if process.exitcode is not None}

    def refused(self) -> Refused | None:
        """What a rank has refused."""
        return Refused(*json.loads(self.complaint.read_text())) if self.complaint.is_file() else None

    def signal(self, number: int, which: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.processes[number].pid or 0, which)

    def places(self) -> list[str]:
        """Where each rank is, as its innermost line of Python says when asked; empty for one that does not answer."""
        for number in range(len(self.processes)):
            _stack(self.complaint.parent, number).write_text("")
            self.signal(number, signal.SIGUSR2)
        time.sleep(4 * POLL)
        told = (_stack(self.complaint.parent, number).read_text() for number in range(len(self.processes)))
        return [next((line.strip() for line in text.splitlines() if line.startswith("  File ")), "") for text in told]

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join()
        for stack in (_stack(self.complaint.parent, number) for number in range(len(self.processes))):
            if stack.is_file() and not stack.stat().st_size:
                stack.unlink()
        self.store = None


def _stack(folder: Path, number: int) -> Path:
    """Where a rank writes its stack of calls when it gets SIGUSR2, even while it waits in a collective."""
    return folder / f"stack.rank{number}.txt"


def launch(plan: Plan, folder: Path, work: Work, *arguments: Any) -> Any:
    """Run `work(plan, *arguments)` on every rank and wait; a rank that fails ends them all. Under torchrun, returns what it does here.

    Raises Refused with what a rank refused.
    """
    if under_torchrun():
        _give((plan, work, arguments))
        return _rank(plan, work, arguments)
    crew = Crew(plan, range(plan.ranks), Pulse(plan.ranks), folder, work, *arguments)
    try:
        while not any(ended := crew.ended().values()) and len(ended) < plan.ranks:
            time.sleep(POLL)
    finally:
        crew.end()
    if failed := {number: status for number, status in crew.ended().items() if status}:
        raise crew.refused() or Refused(f"rank {min(failed)} ended with {ending(failed[min(failed)])}; its output is above")
    return None


def ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _child(number: int, device: int, parent: int, port: int, plan: Plan, complaint: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    """A rank that was started here: what it refuses reaches the parent through a file, and without the parent it ends."""
    _die_with(parent)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent hears it too, and asks all ranks to end after the same step
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, _stack(complaint.parent, number).open("a"), all_threads=False)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(device), "WORLD_SIZE": str(plan.ranks), "LOCAL_WORLD_SIZE": str(plan.ranks),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    try:
        _rank(plan, work, arguments, watched=True)
    except Refused as refused:
        if not complaint.is_file():
            write(complaint, json.dumps(refused.problems))
        sys.exit(2)
    except (Exception, CheckpointException) as error:
        if _of_others(error):  # whoever fell first tells why
            print(f"rank {number} lost its peers", file=sys.stderr)
            sys.exit(LOST)
        traceback.print_exc()
        sys.exit(1)


def _of_others(error: BaseException) -> bool:
    """Whether it is other ranks that fell: gloo's words for a lost peer, or a checkpoint that failed elsewhere."""
    if isinstance(error, CheckpointException) and dist.is_initialized() and dist.get_rank() not in error.failures:
        return True
    return any(sign in str(error) for sign in PEERS)


def _die_with(parent: int) -> None:
    """Let Linux kill this process when its parent dies, however that dies."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


_groups = itertools.count()  # process groups that this process has begun: one for each work that is given out


def _rank(plan: Plan, work: Work, arguments: tuple[Any, ...], watched: bool = False) -> Any:
    """One rank's life: device, process group, work, tidy end; `watched` by whoever started it."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # lines are flushed step by step: nothing is lost
    if plan.gpu.kind == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    if plan.gpu.kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_float32_matmul_precision("high")
    if plan.ranks > 1 or plan.train.precision != "fp32":  # lower precision is FSDP's, on one rank too
        meet(plan, "group", rank(), plan.ranks, watched)
    told = work(plan, *arguments)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return told


def meet(plan: Plan, name: str, index: int, size: int, watched: bool = True) -> None:
    """Begin this process's group: of all ranks, or of those that hold one role."""
    backend = "cpu:gloo,cuda:nccl" if plan.gpu.kind == "cuda" else "gloo"
    held = dist.PrefixStore(f"{name} {next(_groups)}", table())  # nothing of an earlier one is in it
    dist.init_process_group(backend, store=held, rank=index, world_size=size, timeout=patience(plan, watched))


def patience(plan: Plan, watched: bool = True) -> timedelta:
    """How long a rank waits for others; whoever watches is sooner."""
    return timedelta(seconds=(2 if watched else 1) * plan.failures.start_timeout)


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
