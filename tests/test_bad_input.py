"""A user's mistake, or a machine's: one clear line, status 2, nothing half-written."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conf.program import main
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["simm"], "simm is no verb; did you mean sim?"),
        (["sim", "replicas=none"], "replicas=none is no whole number above 0; write for example replicas=20"),
        (["sim", "json=yes"], "json=yes is neither true nor false"),
        (["sim", "model=nanno"], "model=nanno is no model; did you mean nano?"),
        (["sim", "cluster.nodse=3"], "cluster.nodse=3 is not a key of cluster; did you mean nodes?"),
        (["sim", "+cluster.nodse=3"], "cluster.nodse=3 is not a key of cluster; did you mean nodes?"),
        (["sim", "failures=llama3", "failures.causes.gpu.rate='-1 1/d'"], "gpu.rate=-1.1574074074074073e-05 must be above 0"),
        (["sim", "failures=llama3", "failures.causes.gpu.rate='0 1/d'"], "failures.causes.gpu.rate=0.0 must be above 0"),
        (["sim", "failures=llama3", "failures.causes.gpu.shape=0"], "failures.causes.gpu.shape=0.0 must be above 0"),
        (["sim", "failures=llama3", "failures.causes.gpu.how=explode"], "how=explode is not known"),
        (["sim", "failures.detect='2 min normal'"], "'2 min normal' is no duration; write '2 min', '2 min exponential' or"),
        (["sim", "failures.detect='-2 min'"], "failures.detect=-120.0 must not be negative"),
        (["sim", "failures.detect='2 min lognormal -1'"], "the sigma of a duration must not be negative"),
        (["sim", "failures.infant=0.5"], "failures.infant=0.5 would make new machines the better ones; it must be 1 or more"),
        (["sim", "failures=llama3", "failures.causes.hang.shape=2"], "shape=2.0 is a machine's age; what strikes the job has none"),
        (["sim", "cluster.spares=40"], "cluster.spares=40 exceeds cluster.nodes=1; lower it, or raise cluster.nodes"),
        (["sim", "failures=mature", "checkpoint.every=5000"], "checkpoint.every=5000 is longer than the run, train.steps=1000; lower it"),
        (["sim", "experiment=llama3_405b", "checkpoint.every=2000000"], "longer than train.stop_after=54 d; lower it, or set 0"),
        (["sim", "failures.restart=replica"], "failures.restart=replica needs replicas of whole servers"),
        (["sim", "checkpoint.local_every=10"], "needs disks in the servers; set cluster.local_bandwidth, as in '10 GB/s'"),
        (["sim", "gpu.memory=80"], "gpu.memory: '80' has no unit; expected B, as in '80 B'"),
        (["sim", "failures.script=[kill rank=0 step=3]"], "cannot be read; text with blanks, commas or signs needs quotes of its own"),
        (["sim", "failures.script=kill"], "failures.script='kill': expected a list, such as ['a','b']"),
        (["sim", "--help", "gpus"], "gpus is no group; did you mean gpu?"),
        (["real", "only=extrct"], "only=extrct is no stage; did you mean extract?"),
        (["real", "model.positions=alibi"], "model.positions=alibi: real cannot execute it, sim predicts it"),
        (["real", "start=nowhere"], "start=nowhere is no folder"),
        (["real", "trace=5"], "trace=5 is no range of steps; write for example trace=20-22"),
        (["real", "export=out"], "holds no checkpoint (step-*/manifest.json) and no config.json; name a run's folder"),
        (["real", "gpu=h200_sxm", "train.precision=bf16"], "gpu.kind=cuda asks for 2 GPUs, this machine has 0"),
        (["real", "cluster.gpus_per_node=64", "train.global_batch=512"], "the plan has 64 ranks on cluster.cores_per_node=2"),
        (["real", "data.path=/nowhere"], "data.path=/nowhere does not exist"),
        (["analysis", "compar"], "did you mean compare?"),
        (["analysis", "compare"], "foretold sim"),
        (["analysis", "report"], "foretold sim"),
        (["analysis", "calibrate"], "runs=runs holds no measurement of a machine; make one with: foretold real only=kernels,network"),
    ],
)  # fmt: skip
def test_commands(foretold, args, part, tmp_path):
    status, out, err = foretold(*args)
    assert status == 2 and part in one_line(err) and "Traceback" not in out
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("summary.json"))


def test_a_profile_that_is_none(foretold, tmp_path):
    for content in ("", "name: x", "parameters: {a: 1}", "\tnot yaml: ["):
        (tmp_path / "profile.yaml").write_text(content)
        status, _, err = foretold("sim", "profile=profile.yaml")
        assert status == 2 and "profile=profile.yaml is no profile" in one_line(err)


@pytest.mark.parametrize("content", [None, "", "   \n\t\n"])
def test_an_empty_corpus(foretold, tmp_path, content):
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "a.txt").write_text(content)
    status, _, err = foretold("real", "data.path=in", *TINY)
    expected = "gave no document: its files are empty" if content and content.strip(" ") else "holds no text"
    assert status == 2 and expected in one_line(err)


def test_a_corpus_that_cannot_be_read(foretold, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    status, _, err = foretold("real", "data.path=a.parquet", *TINY)
    assert status == 2 and "gave no document: none of its 1 files could be read" in one_line(err)


def test_a_corpus_without_the_text_column(foretold, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    status, _, err = foretold("real", "data.path=a.jsonl", *TINY)
    assert status == 2 and "has a line without text; it has body; set data.text_field=…" in one_line(err)


def test_a_corpus_smaller_than_one_batch(foretold, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"a few words, {i} of them")
    status, _, err = foretold("real", "data.path=*.txt", *TINY, "data.held_out=0.3")
    assert status == 2 and "the train split of data.path=*.txt has" in one_line(err) and "one batch needs 8" in err


def test_no_permission_to_write(foretold, tiny):
    for verb in ("sim", "real"):
        status, _, err = foretold(verb, *tiny, "runs=/sys/foretold")
        assert status == 2 and "/sys/foretold" in one_line(err) and "no permission to write; make the folder writable" in err


def limited(limit: int, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The program with files limited to so many bytes: how a full disk looks to one that writes."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from conf.program import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True, preexec_fn=limits, check=False)


def test_a_full_disk_in_a_data_stage(foretold, tiny, tmp_path):
    done = limited(20_000, "real", *tiny, cwd=tmp_path)
    assert done.returncode == 2 and "the disk is full; free some space and run the same command again" in one_line(done.stderr)
    status, _, err = foretold("real", *tiny)
    assert status == 0, err


def test_a_full_disk_in_a_checkpoint(tiny, tmp_path):
    """The checkpoint before stays whole, and the run goes on from it once there is space."""
    large = [*tiny, "model.hidden=96", "model.ffn=256", "model.layers=4"]
    done = limited(1_500_000, "real", *large, cwd=tmp_path)
    assert done.returncode == 2 and "the disk is full" in one_line(done.stderr)
    folder = next((tmp_path / "runs").glob("*/real/checkpoints"))
    assert not list(folder.glob("step-*")) and not list(folder.glob(".step-*"))


def test_every_help_teaches(capsys):
    for args in ([], ["--help"], ["sim", "--help"], ["real", "--help"], ["analysis", "--help"], ["sim", "--help", "mesh"]):
        assert main(args) == 0
        out = capsys.readouterr().out
        assert len(out.splitlines()) > 5 and all(len(line) <= 180 for line in out.splitlines())


def test_memory_that_runs_out(tiny, tmp_path):
    """A real process under a real limit: one line on what was foretold and what would help."""
    words = ["model.layers=32", "model.hidden=1024", "model.heads=16", "model.ffn=4096", "train.micro_batch=4", f"runs={tmp_path}"]
    arguments = [*tiny, *words, "cluster.gpus_per_node=1"]
    assert main(["real", "only=extract,dedup,tokens", *arguments]) == 0
    limited = f"import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT})); sys.argv = ['real', *sys.argv[1:]]; "
    code = limited + "from conf.program import run; run('real')"
    done = subprocess.run([sys.executable, "-c", code, "only=pretrain", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert (
        "rank 0 ran out of memory" in line
        and "nothing was foretold" in line
        and "set train.micro_batch=2 or train.recompute=selective" in line
    )


LIMIT = 1_300_000_000  # bytes of data: enough to start, too little for the weights
