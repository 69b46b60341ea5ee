"""The run as a Slurm job: the script's text, and the script run for real with stand-ins for Slurm's own commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.program import from_yaml
from conf.record import read
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
# Two servers that are both this machine.
STAND_INS = {
    "sbatch": """#!/bin/bash
[ "$1" = --parsable ] || exit 3
here=$(sed -n 's/^#SBATCH --chdir=//p' "$2")
log=$(sed -n 's/^#SBATCH --output=//p' "$2")
cpus=$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$2")
cd "$here" && SLURM_JOB_ID=4242 SLURM_NNODES=2 SLURM_JOB_NODELIST=both SLURM_CPUS_PER_TASK=$cpus bash "$2" > "${log//%j/4242}" 2>&1
echo "4242;cluster"
""",
    "srun": """#!/bin/bash
while [[ "$1" = --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
""",
    "scontrol": '#!/bin/bash\n[ "$1 $2 $3" = "show hostnames both" ] && printf "localhost\\nlocalhost\\n"\n',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for sbatch, srun and scontrol on the path."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)


def script(folder: Path) -> str:
    (path,) = folder.glob("runs/*/slurm.sh")
    subprocess.run(["bash", "-n", path], check=True)
    return path.read_text()


def test_the_script_is_the_plan(foretold, tmp_path):
    status, out, _ = foretold("real", "slurm=script", "cluster.nodes=2", "train.stop_after=1 h", "train.steps=null",
                              "train.schedule=constant", *(word for word in TINY if "steps" not in word))  # fmt: skip
    (home,) = tmp_path.glob("runs/*")
    assert status == 0 and f"script: {home}/slurm.sh" in out and f"sbatch {home}/slurm.sh" in out
    assert from_yaml(home / "plan.yaml").id == home.name and not (home / "real").exists()
    lines = script(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        f"#SBATCH --job-name=foretold-{home.name}",
        "#SBATCH --dependency=singleton",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --time=0-01:12:00",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@60",
        f"#SBATCH --chdir={tmp_path}",
        f"#SBATCH --output={home}/slurm-%j.log",
        "#SBATCH --open-mode=append",
    ]
    assert "##SBATCH --partition=NAME" in lines and "##SBATCH --account=NAME" in lines
    assert lines[-9:-5] == [
        f"srun --kill-on-bad-exit=1 {sys.executable} -m torch.distributed.run \\",
        '  --nnodes="$SLURM_NNODES" --nproc-per-node=2 \\',
        '  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \\',
        f"  -m real plan={home}/plan.yaml runs={home.parent}",
    ]


@pytest.mark.slow
def test_a_job_that_slurm_signals_saves_and_is_queued_again(tiny, tmp_path, slurm):
    """SIGTERM to every process of the job's step, as --signal=TERM@60 does near the end of its time."""
    requeued = tmp_path / "requeued"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text() + f'[ "$1" = requeue ] && echo "$2" > {requeued}\n')
    words = [f"runs={tmp_path / 'runs'}", "cluster.nodes=2", "cluster.gpus_per_node=1", *tiny, "train.steps=100000", "slurm=submit"]
    job = subprocess.Popen([sys.executable, "-m", "real", *words], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/*/real/checkpoints/step-*/manifest.json")) and job.poll() is None:
        time.sleep(0.05)
    agents = ["pgrep", "-s", str(job.pid), "-f", f"^{sys.executable} -m torch.distributed.run"]
    for agent in subprocess.run(agents, capture_output=True, text=True, check=True).stdout.split():
        os.kill(int(agent), signal.SIGTERM)
    job.communicate(timeout=90)
    (home,) = tmp_path.glob("runs/*")
    assert requeued.read_text() == "4242\n", (home / "slurm-4242.log").read_text()[-3000:]
    steps = [row["step"] for row in read(home / "real", "ledger") if row["quantity"] == "loss"]
    assert (home / "real" / "checkpoints" / f"step-{max(steps):08}").is_dir()


def test_gpus_and_the_time_foretold(foretold, tmp_path):
    words = ["gpu=h100_sxm", "cluster.gpus_per_node=8", "cluster.cores_per_node=96", "train.global_batch=16"]
    assert foretold("sim", *words)[0] == 0
    seconds = json.loads(next(tmp_path.glob("runs/*/sim/summary.json")).read_text())["quantities"]["run.wall_clock"]["value"]
    assert foretold("real", "slurm=script", "only=pretrain", *words)[0] == 0
    text = script(tmp_path)
    assert "#SBATCH --gpus-per-node=8" in text and "#SBATCH --cpus-per-task=96" in text and "only=pretrain" in text
    minutes = -int(-seconds * 1.2 // 60)
    assert f"# the time limit: as foretold, times 1.2\n#SBATCH --time=0-{minutes // 60:02}:{minutes % 60:02}:00\n" in text


def test_an_edited_script_is_kept(foretold, tmp_path):
    assert foretold("real", "slurm=script", *TINY)[0] == 0
    (path,) = tmp_path.glob("runs/*/slurm.sh")
    path.write_text(path.read_text().replace("##SBATCH --partition=NAME", "#SBATCH --partition=a100"))
    status, out, _ = foretold("real", "slurm=script", *TINY)
    assert status == 0 and f"kept: {path}, which differs from what this command writes; delete it for a new one" in out
    assert "#SBATCH --partition=a100" in path.read_text()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["slurm=submit"], "slurm=submit needs sbatch, which is not on this machine; run it on a login node, or slurm=script writes"),
        (["slurm=sumbit"], "slurm=sumbit is no way to run; did you mean submit?"),
        (["slurm=script", "fresh=true"], "fresh=true with slurm=script would begin afresh at every requeue; delete "),
        (["slurm=script", "model.positions=alibi"], "model.positions=alibi: real cannot execute it"),
        (["slurm=submit", "plan=none.yaml"], "none.yaml is no plan"),
    ],
)
def test_refusals(foretold, tmp_path, monkeypatch, args, part):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = foretold("real", *args)
    assert status == 2 and part in err and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.rglob("slurm.sh"))


def test_slurm_refuses(foretold, tmp_path, slurm):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    status, _, err = foretold("real", "slurm=submit", *TINY)
    assert status == 2 and "sbatch refused the script: sbatch: error: invalid account; edit " in err


@pytest.mark.slow
def test_the_script_trains(tiny, tmp_path, monkeypatch, capfd, slurm):
    """Two torchrun agents with one rank each, through the generated script.

    sbatch, srun and scontrol are stand-ins written in this file: they show that the script starts what it should, not
    that Slurm accepts it.
    """
    from conf.program import main

    monkeypatch.chdir(ROOT)
    words = [f"runs={tmp_path / 'runs'}", "cluster.nodes=2", "cluster.gpus_per_node=1", *tiny]
    assert main(["real", "slurm=submit", *words]) == 0
    (home,) = tmp_path.glob("runs/*")
    log = (home / "slurm-4242.log").read_text()
    assert f"job 4242; watch it with: tail -F {home}/slurm-4242.log" in capfd.readouterr().out
    assert (home / "real" / "summary.json").is_file(), log
    ledger = read(home / "real", "ledger")
    assert {row["rank"] for row in ledger if row["quantity"] == "step_time"} == {0, 1}
    assert sum(row["quantity"] == "loss" for row in ledger) == 8 and "Traceback" not in log
