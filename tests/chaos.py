"""`make chaos`: runs under random faults, each from a seed that replays it, held against the unbroken run of the same mesh.

    python -m tests.chaos                 40 runs, about 200 faults
    python -m tests.chaos runs=4 seed=17  four runs from seed 17 on

What must hold: no run is lost; none hangs longer than its timeout and one look; the weights end bit for bit as without faults;
each accepted step saw the same samples once; at most one interval of work is lost, or what a spoilt checkpoint held; and once
there was a checkpoint there is always a sound one.
"""

import contextlib
import io
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.conftest import WORDS
from tests.lived import KEEP, STEPS, Lived, prepare, script

EVERY = 4
MESHES = {"fsdp": (), "ddp": ("mesh.dp_replicate=2",), "tensor": ("mesh.tp=2",), "pipeline": ("mesh.pp=2", "train.micro_batch=2")}
SAVES = {"plain": (), "memory": ("checkpoint.memory_every=2",), "beside": ("checkpoint.asynchronous=true",)}
PHASES = ("data", "forward", "backward", "communication", "optimizer", "saving", "sealing", "saved")
KINDS = ("kill",) * 6 + ("stop", "sleep", "exit", "slow", "clock", "slowdisk", "truncate", "alter", "broken")
SPOILT = ("truncate", "alter")


def faults(seed: int) -> list[str]:
    """Five faults at five steps; those of a save strike where there is one.

    Checkpoints are spoilt from the second on and fewer than are kept: where no sound one is left a run is rightly refused.
    """
    dice = random.Random(seed)
    entries: list[str] = []
    for step in sorted(dice.sample(range(2, STEPS), 5)):
        kind, rank = dice.choice(KINDS), dice.randrange(2)
        kind = "kill" if kind in SPOILT and sum(entry.startswith(SPOILT) for entry in entries) == KEEP - 1 else kind
        phase = dice.choice(PHASES) if kind in ("kill", "exit") else ""
        saves = phase in PHASES[5:] or kind in (*SPOILT, "slowdisk", "broken")
        at = max(EVERY * (1 + (kind in SPOILT)), step // EVERY * EVERY) if saves else step
        rank = 0 if phase == "sealing" or kind in SPOILT else rank
        more = {"sleep": " seconds=600", "slow": " factor=3 steps=3", "clock": f" seconds={dice.choice((-3600, 3600))}",
                "slowdisk": " seconds=0.2"}.get(kind, "")  # fmt: skip
        entries.append(f"{kind} rank={rank} step={at}{f' phase={phase}' if phase else ''}{more}")
    return entries


def wrong(run: Lived, whole: Lived, entries: list[str]) -> list[str]:
    """What does not hold of a run."""
    found = [] if run.same_as(whole) else ["weights differ"]
    found += [] if run.adds_up() else ["its states do not add up to its clock"]
    losses, usual = run.losses(), whole.losses()
    found += [f"step {step} saw other samples" for step in usual if losses.get(step, [None])[-1] != usual[step][0]]
    falls, seen, saves = run.events("failure"), run.events("detection"), run.events("checkpoint")
    spoilt = sum(entry.startswith(SPOILT) for entry in entries)
    for fall, noticed in zip(falls, seen, strict=True):
        late = noticed["at"] - fall["at"]
        limit = 1.0 if noticed["by"] == "exit" else 1.0 + 0.5
        found += [f"noticed after {late:.2f} s ({noticed['by']})"] if late > limit else []
        back = [event for event in run.events("restart") if event["at"] > noticed["at"]][:1]
        safe = [save["step"] for save in saves if save["at"] < fall["at"]]
        held = back[0]["step"] if back else 0
        found += [f"back to {held} from {fall['step']}"] if fall["step"] - held > EVERY * (2 + spoilt) else []
        found += ["no sound checkpoint was left"] if len(safe) > spoilt and not back else []
    return found


def recoveries(falls: list[float], back: list[float]) -> list[float]:
    """From each fall to the load before the next one; a fall before the first checkpoint, or in a load, has none."""
    pairs = zip(falls, [*falls[1:], math.inf], strict=True)
    return [min(found) - fall for fall, following in pairs if (found := [at for at in back if fall < at < following])]


def corpus(folder: Path) -> Path:
    dice = random.Random(7)
    for number in range(120):
        lines = (" ".join(dice.choices(WORDS, k=12)) for _ in range(dice.randint(20, 60)))
        (folder / f"{number:03}.txt").write_text("\n".join(lines))
    return folder


def campaign(first: int, count: int, folder: Path) -> int:
    """Runs from a seed on; prints a line each, and returns how many did not hold."""
    (folder / "corpus").mkdir()
    tokens, whole, bad = prepare(corpus(folder / "corpus"), folder / "prepared"), {}, 0
    totals: Counter[str] = Counter()
    print(f"{'seed':>5} {'mesh':9} {'saves':7} {'faults':>6} {'falls':>5} {'recovery':>9} {'seconds':>7}  what does not hold", flush=True)
    for seed in range(first, first + count):
        mesh, saves = list(MESHES)[seed % len(MESHES)], list(SAVES)[seed // len(MESHES) % len(SAVES)]
        if mesh not in whole:
            whole[mesh] = quietly(Lived(tokens, folder / f"whole-{mesh}", *MESHES[mesh]))
        entries, began = faults(seed), time.monotonic()
        run = Lived(tokens, folder / str(seed), *MESHES[mesh], *SAVES[saves], "failures.retries=9", script(*entries))
        try:
            quietly(run)
            found = wrong(run, whole[mesh], entries)
        except Exception as error:
            found = [f"lost: {error}"]
        fired, falls, back = run.events("injected"), run.events("failure"), run.events("restart")
        spans = recoveries([fall["at"] for fall in falls], [event["at"] for event in back])
        hangs = sum("no progress" in fall["cause"] for fall in falls)
        totals.update(runs=1, planned=len(entries), fired=len(fired), falls=len(falls), hangs=hangs)
        bad += bool(found)
        slowest, took = f"{max(spans, default=0):.2f} s", time.monotonic() - began
        what = "; ".join(found[:2]) + f"; replay with seed={seed} runs=1: {entries}" if found else "–"
        print(f"{seed:5} {mesh:9} {saves:7} {len(fired):6} {len(falls):5} {slowest:>9} {took:7.1f}  {what}", flush=True)
    print(f"{totals['runs']} runs, {totals['fired']} of {totals['planned']} faults fired, {totals['falls']} falls")
    print(f"({totals['hangs']} hangs), {bad} runs in which something does not hold")
    return bad


def quietly(run: Lived) -> Lived:
    with contextlib.redirect_stdout(io.StringIO()):
        return run.live()


def main(words: list[str]) -> int:
    options = {"runs": "40", "seed": "0"} | dict(word.split("=") for word in words)
    with tempfile.TemporaryDirectory() as folder:
        return min(1, campaign(int(options["seed"]), int(options["runs"]), Path(folder)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
