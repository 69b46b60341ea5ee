"""Slurm: the run as a job, through a script that one can read and edit.

Nothing of the run is hidden in the job: beside the script lies the plan, and the script starts torchrun on every server.
"""

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from conf.errors import Refused, nearest
from conf.files import write
from conf.plan import Plan
from conf.program import to_yaml
from conf.record import read_summary
from real.heartbeat import STOPPED

WAYS = ("no", "script", "submit")
MARGIN = 1.2  # the time limit over the time foretold
SCRIPT = """\
#!/bin/bash
# Written by `foretold real slurm=script`; yours to edit: slurm=submit hands in this file as it stands.
#SBATCH --job-name=foretold-{id}
#SBATCH --dependency=singleton
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cores}
{gpus}
{time}
#SBATCH --requeue
#SBATCH --signal=TERM@{grace}
#SBATCH --chdir={here}
#SBATCH --output={log}
#SBATCH --open-mode=append
##SBATCH --partition=NAME
##SBATCH --account=NAME

# One torchrun a server, one rank a device. The same command again, or a requeue, goes on from the last checkpoint.
export OMP_NUM_THREADS=1 SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

srun --kill-on-bad-exit=1 {python} -m torch.distributed.run \\
  --nnodes="$SLURM_NNODES" --nproc-per-node={ranks} \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \\
  -m real {arguments}
status=$?

# Slurm's signal came before the end, and the run has saved: into the queue again, to go on from there.
if [ -e {stopped} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
"""


def main(plan: Plan, home: Path, options: Mapping[str, str]) -> None:
    """Write the script, submit it if asked, and say where everything is."""
    way = options["slurm"]
    if way not in WAYS:
        raise Refused(f"slurm={way} is no way to run; {nearest(way, WAYS)}")
    if options["fresh"].lower() == "true":
        raise Refused(f"fresh=true with slurm={way} would begin afresh at every requeue; delete {home}/real instead")
    if way == "submit" and shutil.which("sbatch") is None:
        raise Refused("slurm=submit needs sbatch, which is not on this machine; run it on a login node, or slurm=script writes the script")
    path, kept = prepare(plan, home, options)
    job = submit(path) if way == "submit" else None
    if options["json"].lower() == "true":
        print(json.dumps({"plan": plan.id, "script": str(path), "kept": kept, "job": job}))
        return
    print(f"kept: {path}, which differs from what this command writes; delete it for a new one" if kept else f"script: {path}")
    if job is None:
        print(f"next: read it, then sbatch {path}")
    else:
        print(f"job {job}; watch it with: tail -F {home}/slurm-{job}.log")


def prepare(plan: Plan, home: Path, options: Mapping[str, str]) -> tuple[Path, bool]:
    """Plan and script in the run's folder; a script that differs from what would be written is kept."""
    write(home / "plan.yaml", to_yaml(plan))
    path, text = home / "slurm.sh", script(plan, home, options)
    kept = path.is_file() and path.read_text() != text
    if not kept:
        write(path, text)
    return path, kept


def script(plan: Plan, home: Path, options: Mapping[str, str]) -> str:
    """The job as a batch script."""
    on_gpus, ranks = plan.gpu.kind == "cuda", plan.cluster.gpus_per_node
    words = [f"plan={home / 'plan.yaml'}", f"runs={home.parent}"] + [f"only={options['only']}"] * (options["only"] != "all")
    return SCRIPT.format(
        id=plan.id, nodes=plan.cluster.nodes, ranks=ranks,
        cores=plan.cluster.cores_per_node if on_gpus else max(ranks, plan.cluster.cores_per_node),
        gpus=f"#SBATCH --gpus-per-node={ranks}" if on_gpus else "# no GPUs: a rank is a CPU core",
        grace=math.ceil(plan.failures.grace), stopped=shlex.quote(str(home / "real" / STOPPED)), time=_limit(plan, home),
        here=shlex.quote(str(Path.cwd())), log=shlex.quote(f"{home}/slurm-%j.log"),
        python=shlex.quote(sys.executable), arguments=shlex.join(words),
    )  # fmt: skip


def _limit(plan: Plan, home: Path) -> str:
    """The time limit: the time foretold, or that after which the plan stops, with a margin."""
    told = read_summary(home / "sim")
    foretold = told["quantities"].get("run.wall_clock", {}).get("value") if told else None
    seconds, why = (foretold, "as foretold") if foretold else (plan.train.stop_after, "train.stop_after")
    if not seconds:
        return "# no time limit: foretold sim would foretell one; a job that is cut goes on when submitted again"
    minutes = math.ceil(seconds * MARGIN / 60)
    return f"# the time limit: {why}, times {MARGIN}\n#SBATCH --time={minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def submit(path: Path) -> str:
    """Hand the script to Slurm; returns the job's id.

    Raises Refused with what Slurm says.
    """
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Refused(f"sbatch refused the script: {why}; edit {path} and run the same command again")
    return done.stdout.strip().split(";")[0]
