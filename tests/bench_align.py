"""Every placement of an alignment, foretold before it is run: `python -m tests.bench placements`.

For 2, 3 and 4 ranks of this machine: a calibration, then `laptop_grpo` from a model fine-tuned before, the reference on ranks of its own in
split_ref, in each placement. Ratios of foretold to measured step times, stages beside each other, and whether the same placement wins.
"""

import json
import tempfile
from pathlib import Path

from tests.bench import foretold

PLACEMENTS = {
    "colocated": (),
    "split_ref": ("align.reference=model", "align.beta=0.02"),
    "disaggregated": (),
    "async": (),
}
PARTS = ("generate", "score", "logprob", "train", "sync", "queue", "idle")
PLAN = ["experiment=laptop_grpo", "align.steps=20", "train.evaluate_sequences=0"]
BASE = ["align=none", "train.steps=20", "train.warmup=2", "finetune.steps=60", "data.limit=3 MB"]


def placements() -> None:
    folder = Path(tempfile.mkdtemp())
    foretold("real", *PLAN, *BASE, cwd=folder)
    foretold("real", *PLAN, *BASE, "export=tuned", cwd=folder)
    for ranks in (2, 3, 4):
        own = [*PLAN, "finetune=none", f"cluster.gpus_per_node={ranks}"]
        foretold("real", "only=kernels,network", *own, f"runs=measured{ranks}", cwd=folder)
        foretold("analysis", "calibrate", f"runs=measured{ranks}", f"out=profile{ranks}.yaml", cwd=folder)
        print(f"\n{ranks} ranks: foretold, measured [ms]\n{'':15}" + "".join(f"{name:>14}" for name in ("step", *PARTS)))
        order = {}
        for placement, words in PLACEMENTS.items():
            plan = [*own, f"profile=profile{ranks}.yaml", f"align.placement={placement}", *words]
            pair = [_told(verb, plan, folder) for verb in ("sim", "real")]
            order[placement] = [told["step"] for told in pair]
            cells = "".join(f"{'/'.join(f'{told[name] * 1e3:.0f}' for told in pair):>14}" for name in ("step", *PARTS))
            print(f"{placement:15}{cells}   {pair[0]['step'] / pair[1]['step'] - 1:+.0%}", flush=True)
        best = [min(order, key=lambda name: order[name][side]) for side in (0, 1)]
        print(f"quickest: foretold {best[0]}, measured {best[1]}")


def _told(verb: str, plan: list[str], folder: Path) -> dict[str, float]:
    """Seconds of a step and of its parts, means over all ranks."""
    words = ["only=align", "start=tuned", "fresh=true"] if verb == "real" else []
    told = json.loads(foretold(verb, "json=true", *plan, *words, cwd=folder))["quantities"]
    return {name: told.get(f"align.{name}_time", {"value": 0.0})["value"] for name in ("step", *PARTS)}
