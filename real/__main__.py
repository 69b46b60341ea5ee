"""`foretold real`: execute a plan, or parts of it, or measure this machine."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from conf.arithmetic import parameters
from conf.errors import Refused, nearest
from conf.files import write
from conf.plan import Plan
from conf.program import explain, flag, load, run, split
from conf.record import read_summary
from conf.units import show
from real.heartbeat import STOPPED, Stopped
from real.life import ALIGNED, DATA, STAGES, TUNED, Life
from real.place import Place, place

USAGE = """
foretold real [options] [group=option] [key=value]   execute a plan

  foretold real                                  the default plan: this machine's Python library, eight hundred thousand parameters
  foretold real data.path='corpus/**/*.txt'      your own text
  foretold real only=extract,dedup,tokens        some stages
  foretold real only=crawl crawl.seeds=[https://example.org/]   pages of the web, politely; with data.path=crawl as the corpus
  foretold real only=kernels,network             time this machine's operations, for `foretold analysis calibrate`
  foretold real dry=true experiment=llama3_8b    what every rank would hold and send, without a GPU
  foretold real -m model.layers=2,4 train.steps=500,1000        every combination, one after the other
  foretold real start=runs/p0a1b2c3d4 mesh.tp=2  go on from another plan's checkpoint, on another mesh
  foretold real finetune=lora finetune.data=chats.jsonl          adapters on the model that pre-training, or start=FOLDER, leaves
  foretold real only=align start=runs/p0a1b2c3d4 align=dpo align.data=pairs.jsonl      preferences; align=grpo: rewards
  foretold real verify=true                      whether every file of the data stages is what its receipt says
  foretold real export=model                     the newest checkpoint as a Hugging Face model
  torchrun --nproc-per-node 2 -m real            ranks started by torchrun
  foretold real slurm=submit cluster.nodes=2     as a job under Slurm; slurm=script writes its script and stops

A run that was cut goes on where it stopped when the same command is given again.
"""
OPTIONS = {
    "only": ("all", f"stages to run, with commas: {', '.join(STAGES)}; or kernels, network to time this machine"),
    "plan": ("", "file of a plan that another command wrote; overrides still apply"),
    "slurm": ("no", "no = here; script = write runs/<id>/slurm.sh, to read and edit; submit = hand it to Slurm too"),
    "fresh": ("false", "delete this plan's earlier run first"),
    "start": ("", "begin from this run or checkpoint of any mesh, or from this folder in Hugging Face's layout"),
    "export": ("", "write the newest checkpoint's model into this folder in Hugging Face's layout, and stop"),
    "trace": ("", "steps that torch's profiler watches, as in trace=20-22; one profile.rankN.json.gz a rank opens in Perfetto"),
    "verify": ("false", "read every file of the data stages, compare it with its receipt, and stop"),
    "lineage": ("", "say which page a token of the stream came from, as in lineage=123 or lineage=held_out:123, and stop"),
    "dry": ("false", "build everything on fake devices, say what each rank holds and sends, and stop"),
    "runs": ("runs", "folder of the records"),
    "json": ("false", "print summary.json and nothing else"),
}
MEASURES = ("kernels", "network")
AGAIN = 75  # exit status of a run that SIGTERM or SIGUSR1 ended after a save: EX_TEMPFAIL of sysexits.h, "try again later"


def main(args: list[str]) -> int:
    if "--help" in args or "-h" in args:
        about = args[-1] if args[-1] not in ("--help", "-h") else ""
        print(explain("real", USAGE, OPTIONS, about))
        return 0
    if multirun := {"-m", "--multirun"} & set(args):
        from real.sweep import sweep

        words = [arg for arg in args if arg not in multirun]
        overrides = split(words, OPTIONS)[1]
        return sweep(overrides, [word for word in words if word not in overrides])
    if "RANK" not in os.environ:
        return _main(args)
    from real.cluster import together

    return together(lambda: _main(args))


def _main(args: list[str]) -> int:
    options, overrides = split(args, OPTIONS)
    quiet, fresh, only = flag(options, "json"), flag(options, "fresh"), _parts(options["only"])
    plan = load(overrides, options["plan"])
    again = [f"plan={options['plan']}"] * bool(options["plan"]) + overrides
    measure = bool(set(only) & set(MEASURES))
    home = Path(options["runs"]).resolve() / plan.id
    folder = home / ("measure" if measure else "real")
    if options["export"]:
        return _export(plan, folder, Path(options["export"]), options)
    if flag(options, "dry"):
        return _dry(plan, home, quiet)
    if flag(options, "verify") or options["lineage"]:
        return _look(plan, folder, options)
    source, traced = _source(options["start"]), _steps(options["trace"])
    if options["slurm"] != "no":
        return _slurm(plan, home, options)
    mine = _place(plan, only)
    part, folder = (mine.plan, mine.folder(folder)) if mine else (plan, folder)
    _check(part, only)
    if not _leads():
        from real.cluster import follow

        return follow()
    if fresh:
        from real import tiers

        tiers.release(plan, folder)
        shutil.rmtree(folder, ignore_errors=True)
    with _quiet(quiet):
        try:
            told = _run(plan, folder, only, source, traced, mine)
        except (KeyboardInterrupt, Stopped) as why:
            words = shlex.join(["foretold", "real", *again])
            print(f"\nstopped; the record so far is in {folder}; go on with: {words}", file=sys.stderr)
            if isinstance(why, KeyboardInterrupt):
                return 130
            write(folder / STOPPED, words)
            return AGAIN
        _result(plan, told, folder, again)
    if quiet:
        print((folder / "summary.json").read_text())
    return 0


def _parts(asked: str) -> list[str]:
    if asked == "all":
        return list(STAGES)
    parts = asked.split(",")
    for part in parts:
        if part not in (*STAGES, *MEASURES):
            raise Refused(f"only={part} is no stage; {nearest(part, (*STAGES, *MEASURES))}")
    return parts


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """With json=true what a person reads goes to standard error, also from the ranks."""
    if not quiet:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _leads() -> bool:
    """Whether this process holds the record: it is alone, or torchrun's first rank."""
    return int(os.environ.get("RANK", "0")) == 0


def _check(plan: Plan, only: Sequence[str]) -> None:
    if list(only) == ["finetune"] and plan.finetune.method == "none":
        raise Refused("only=finetune, but finetune.method=none; choose one, as in finetune=lora finetune.data=chats.jsonl")
    if list(only) == ["align"] and plan.align.method == "none":
        raise Refused("only=align, but align.method=none; choose one, as in align=dpo align.data=pairs.jsonl")
    if set(only) - set(DATA):
        from real import cluster
        from real.parallel import refuse_unbuilt

        refuse_unbuilt(plan)
        cluster.check(plan)


def _place(plan: Plan, only: Sequence[str]) -> Place | None:
    """Which replica this command is, where replicas restart alone."""
    if plan.failures.restart != "replica" or "pretrain" not in only:
        return None
    return place(plan)


def _slurm(plan: Plan, home: Path, options: Mapping[str, str]) -> int:
    """Hand the run to Slurm; what it is to do is checked here, what it runs on is not here."""
    from real import slurm
    from real.parallel import refuse_unbuilt

    refuse_unbuilt(plan)
    slurm.main(plan, home, options)
    return 0


def _source(asked: str) -> Path | None:
    if asked and not Path(asked).is_dir():
        raise Refused(f"start={asked} is no folder; name a run, a checkpoint, or a Hugging Face model")
    return Path(asked).resolve() if asked else None


def _steps(asked: str) -> tuple[int, int] | None:
    if not asked:
        return None
    first, _, last = asked.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise Refused(f"trace={asked} is no range of steps; write for example trace=20-22")
    return int(first), int(last)


def _export(plan: Plan, folder: Path, target: Path, options: Mapping[str, str]) -> int:
    from real import align, checkpoint, finetune, huggingface

    if plan.align.method != "none" and "align" in _parts(options["only"]):
        path, size = align.export(folder / ALIGNED, plan, target)
        print(f"{path.name} of {path.parent.parent} is in {target}: {huggingface.family(plan.model)}, {show(size, 'B')}")
        return 0
    if plan.finetune.method != "none" and "finetune" in _parts(options["only"]):
        path, size = finetune.export(folder / TUNED, plan, target)
        print(f"{path.name} of {path.parent.parent} is in {target}: {huggingface.family(plan.model)}, {show(size, 'B')}")
        return 0
    path, _ = checkpoint.find(_source(options["start"]) or folder)
    tokenizer = next((p / "tokens" / "tokenizer.json" for p in path.parents if (p / "tokens").is_dir()), None)
    size = huggingface.export(path, plan.model, plan.train.seq_len, target, tokenizer)
    print(f"{path.name} of {path.parent.parent} is in {target}: {huggingface.family(plan.model)}, {show(size, 'B')}")
    return 0


def _dry(plan: Plan, home: Path, quiet: bool) -> int:
    from real import dry
    from real.parallel import refuse_unbuilt

    refuse_unbuilt(plan)
    told = dry.build(plan, read_summary(home / "sim"))
    print(json.dumps(told, indent=1) if quiet else dry.page(plan, told))
    return 0


def _look(plan: Plan, folder: Path, options: Mapping[str, str]) -> int:
    """What a run's files say of themselves."""
    from real.lineage import page_of, verify

    if options["lineage"]:
        page, place = page_of(folder, plan, options["lineage"])
        told = page._asdict() | {"text": page.text[:200], "token": place}
        print(json.dumps(told, ensure_ascii=False, indent=1) if flag(options, "json") else "\n".join(f"{k:9} {v}" for k, v in told.items()))
        return 0
    for checked in verify(folder):
        print(f"{checked.stage:24} {checked.files:7,} files {show(checked.bytes, 'B'):>10}  as their receipts say")
    return 0


def _run(plan: Plan, folder: Path, only: Sequence[str], source: Path | None, traced: tuple[int, int] | None,
         mine: Place | None = None) -> dict[str, Any]:  # fmt: skip
    """The stages, in the order of a life."""
    _foresee(plan, only)
    _announce(plan, folder, only)
    (folder / STOPPED).unlink(missing_ok=True)
    life = Life(plan, folder, _say, source, traced, mine)
    if mine and mine.number:
        life.join(folder.parent)
    elif set(only) & set(DATA):
        life.data([name for name in DATA if name in only])
    if set(only) & set(MEASURES):
        life.measure([name for name in MEASURES if name in only])
    if "pretrain" in only:
        life.pretrain()
    if "finetune" in only and plan.finetune.method != "none":
        life.finetune()
    if "align" in only and plan.align.method != "none":
        life.align()
    return life.close()


def _foresee(plan: Plan, only: Sequence[str]) -> None:
    """Raises Refused now for what a stage would refuse only behind a long training."""
    from real import chats, digits, jsonl, pairs, prompts

    tune, align = plan.finetune, plan.align
    if "finetune" in only and tune.method != "none":
        chats.Template(tune.template)
        if tune.data != digits.NAME:
            jsonl.named(tune, chats.HOLDS)
    if "align" in only and align.method != "none":
        chats.Template(align.template, "align")
        if align.data != digits.NAME:
            jsonl.named(align, (prompts if align.rollouts else pairs).HOLDS)


def _say(text: str) -> None:
    """A line; one that starts with a carriage return is passing, and shows only on a terminal."""
    if not text.startswith("\r"):
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)
    elif sys.stdout.isatty():
        print(f"\r\033[K{text[1:]}", end="", flush=True)


def _announce(plan: Plan, folder: Path, only: Sequence[str]) -> None:
    """Every derived number before the first second is spent."""
    tune, align = plan.finetune, plan.align
    axes = " × ".join(f"{name} {size}" for name, size in plan.axes.items() if size > 1) or "one rank"
    lines = [f"plan {plan.id}: {plan.model.name}, {round(parameters(plan.model)):,} parameters, on {plan.ranks} × {plan.gpu.name} ({axes})"]
    if "pretrain" in only:
        steps = f"{plan.train.steps:,} steps" if plan.train.steps else f"for {show(plan.train.stop_after, 's')}"
        batch = f"{plan.train.global_batch} sequences × {plan.train.seq_len} = {plan.tokens_per_step:,} tokens"
        many = "micro-batch" if plan.accumulation == 1 else "micro-batches"
        lines.append(f"{steps} of {batch}, {plan.accumulation} {many} of {plan.train.micro_batch} a rank")
    if "finetune" in only and tune.method != "none":
        lines.append(f"fine-tuning ({tune.method}): {tune.steps:,} steps of {tune.global_batch} sequences × {tune.seq_len}")
    if "align" in only and align.method != "none":
        batch = f"{align.prompts} prompts × {align.group} completions" if align.rollouts else f"{align.prompts} pairs"
        trainers, *others = plan.roles
        apart = [f"{len(ranks)} to {verb}" for ranks, verb in zip(others, ("generate", "score"), strict=True) if ranks != trainers]
        roles = ", ".join([f"{len(trainers)} ranks to train", *apart])
        lines.append(f"alignment ({align.method}): {align.steps:,} steps of {batch}, {align.placement}: {roles}")
    print("\n".join(lines) + f"; record in {folder}", flush=True)


def _result(plan: Plan, told: dict[str, Any], folder: Path, again: Sequence[str]) -> None:
    quantities = told["quantities"]
    shown = {n: show(q["value"], q["unit"]) for n, q in quantities.items() if not n.startswith("state.")}
    print()
    for name, text in shown.items():
        print(f"  {name:34} {text}")
    print(f"\nrecord: {folder}")
    if folder.name == "measure":
        print("next: foretold analysis calibrate")
    else:
        foretold = read_summary(folder.parent / "sim") is not None
        print("next:", "foretold analysis compare" if foretold else shlex.join(["foretold", "sim", *again]))


if __name__ == "__main__":
    run("real")
