"""`make gpu`: the first slice of the GPU kit, for one GPU, torch 2.11 or newer, no network, at most 9 minutes.

Tests; MFU beside a bare loop; calibration from measured operations; then one real plan of 1.2 billion parameters
foretold, executed, compared.
Each part that is done already is skipped when the command is given again.
"""

import subprocess
import sys
import time
from pathlib import Path

PLAN = ["experiment=h200", "data.limit=24 MB"]
PROFILE = "runs/gpu.yaml"


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("make gpu: this machine has no CUDA device; run it on one that has", file=sys.stderr)
        return 2
    began = time.monotonic()
    parts = [
        ([sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"], None),
        ([sys.executable, "-m", "tests.bench", "gpu"], None),
        (verb("real", "only=kernels,network", *PLAN), next(Path("runs").glob("*/measure/kernels.csv"), None)),
        (verb("analysis", "calibrate", f"out={PROFILE}"), None),
        (verb("sim", f"profile={PROFILE}", *PLAN), None),
        (verb("real", f"profile={PROFILE}", *PLAN), None),
        (verb("analysis", "compare"), None),
        (verb("analysis", "report"), None),
    ]
    for command, done in parts:
        print(f"\n== {time.monotonic() - began:.0f} s: {' '.join(command[1:])}", flush=True)
        if done is None and subprocess.run(command, check=False).returncode:
            return 1
    return 0


def verb(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", name, *words]


if __name__ == "__main__":
    sys.exit(main())
