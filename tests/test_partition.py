"""Two servers in namespaces of their own: the cable between them slow, lossy, cut (row 11 of the matrix), and one of them lost.

Needs root and `ip`. The kernel's token bucket makes the delay (a slow link with a queue) and the loss (a queue that overflows).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.record import read
from tests.lived import PLAN, ROOT

pytestmark = pytest.mark.slow
ENDS = ("10.99.7.1", "10.99.7.2")
STEPS = 60


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def cable() -> Iterator[list[str]]:
    """Names of two namespaces; the cable's end in each is called like it."""
    names = [f"ft{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None or any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("namespaces need root and ip")
    ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
    for name, address in zip(names, ENDS, strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
        ip("-n", name, "link", "set", name, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip(
            "netns", "exec", name, "sh", "-c", "echo 4 > /proc/sys/net/ipv4/tcp_retries2"
        )  # torchrun's agent waits for the kernel to give up
    yield names
    for name in names:
        ip("netns", "del", name)


def shape(name: str, *bucket: str) -> None:
    """A token bucket at one end."""
    done = subprocess.run(
        ["tc", "-n", name, "qdisc", "add", "dev", name, "root", "tbf", *bucket], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def dropped(name: str) -> int:
    told = subprocess.run(["tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", name], capture_output=True, text=True, check=True)
    return int(json.loads(told.stdout)[0]["drops"])


class Job:
    """One torchrun agent with one rank at each end."""

    def __init__(self, cable: list[str], corpus: Path, runs: Path, *words: str) -> None:
        self.cable, self.runs = cable, runs
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "cut", "--rdzv-backend", "c10d", "--max-restarts", "3",
                   "--rdzv-endpoint", f"{ENDS[0]}:29517", "--rdzv-conf"]  # fmt: skip
        plan = [*PLAN, "cluster.nodes=2", "cluster.gpus_per_node=1", f"train.steps={STEPS}", f"data.path={corpus}", f"runs={runs}", *words]
        self.meeting, self.plan = meeting, plan
        self.agents = [self.agent(end) for end in (0, 1)]

    def agent(self, end: int) -> subprocess.Popen[str]:
        """A server: a network and a /dev/shm of its own."""
        name, rendezvous = self.cable[end], f"is_host={end == 0},join_timeout=25,read_timeout=10"
        own = ["ip", "netns", "exec", name, "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *self.meeting,
            rendezvous,
            "--local-addr",
            ENDS[end],
            "-m",
            "real",
            *self.plan,
        ]
        more = {"GLOO_SOCKET_IFNAME": name, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen([*own, *run], cwd=ROOT, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def lose(self, end: int) -> None:
        """A server and all that it held in memory."""
        for pid in ip("netns", "pids", self.cable[end]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        self.agents[end].wait()

    def wait(self, seconds: float) -> list[int]:
        try:
            self.said = "\n".join(agent.communicate(timeout=seconds)[0] for agent in self.agents)
        finally:
            for agent in self.agents:
                agent.terminate()  # it ends its rank
        return [agent.returncode for agent in self.agents]

    def step(self) -> int:
        return max((row["step"] for row in self._rows("loss")), default=0)

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["value"] for row in self._rows("loss")}

    def _rows(self, quantity: str) -> list[dict]:
        folder = next(self.runs.glob("*/real"), None)
        return [row for row in read(folder, "ledger") if row["quantity"] == quantity] if folder else []


def test_a_slow_and_lossy_cable_changes_no_bit(cable, corpus, tmp_path):
    sound = Job(cable, corpus, tmp_path / "sound")
    assert sound.wait(120) == [0, 0], sound.said
    for name in cable:
        shape(name, "rate", "20mbit", "burst", "16kb", "limit", "24kb")
    bad = Job(cable, corpus, tmp_path / "bad")
    assert bad.wait(240) == [0, 0], bad.said
    assert sum(map(dropped, cable)) > 0
    assert bad.losses() == sound.losses() and len(bad.losses()) == STEPS


def test_a_cut_cable_stops_both_sides_and_loses_nothing(cable, corpus, tmp_path):
    """Neither side goes on alone, one has written, and when the cable is whole the same command ends with the same losses."""
    words = ("failures.start_timeout=8 s", "failures.timeout=4 s")
    sound = Job(cable, corpus, tmp_path / "sound", *words)
    assert sound.wait(120) == [0, 0], sound.said
    job = Job(cable, corpus, tmp_path / "cut", *words)
    while job.step() < 10 and all(agent.poll() is None for agent in job.agents):
        time.sleep(0.05)
    ip("-n", cable[1], "link", "set", cable[1], "down")
    cut, began = job.step(), time.monotonic()
    assert all(status not in (0, None) for status in job.wait(120)), job.said
    print(f"both ended {time.monotonic() - began:.0f} s after the cut")
    done = job.step()
    assert cut <= done < STEPS and done <= cut + 5
    ip("-n", cable[1], "link", "set", cable[1], "up")
    again = Job(cable, corpus, tmp_path / "cut", *words)
    assert again.wait(120) == [0, 0], again.said
    assert again.losses() == sound.losses() and len(again.losses()) == STEPS


def test_a_lost_server_is_replaced_and_its_neighbour_has_the_shards(cable, corpus, tmp_path):
    """Nothing was saved to disk: the new server gets what the other has kept of the lost one, and the run ends with the same losses."""
    words = ("checkpoint.every=1000", "checkpoint.memory_every=5", "failures.start_timeout=60 s")
    sound = Job(cable, corpus, tmp_path / "sound", *words)
    assert sound.wait(120) == [0, 0], sound.said
    job = Job(cable, corpus, tmp_path / "lost", *words)
    while job.step() < 20 and all(agent.poll() is None for agent in job.agents):
        time.sleep(0.05)
    job.lose(1)
    job.agents[1] = job.agent(1)
    assert job.wait(180) == [0, 0], job.said
    back = [event for event in read(next(job.runs.glob("*/real")), "events") if event["event"] == "restart"]
    assert back and min(event["step"] for event in back) >= 15 and "memory, step" in back[0]["detail"]
    assert job.losses() == sound.losses() and len(job.losses()) == STEPS
