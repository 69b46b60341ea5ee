"""Benchmarks: `make bench`. Ratios within one run; the tables go to LOG.md.

python -m tests.bench prediction    ten laptop plans, each foretold before it is run
python -m tests.bench placements    every placement of an alignment, foretold before it is run (tests/bench_align.py)
python -m tests.bench bookkeeping   the trainer against the same loop without its record
python -m tests.bench sim           how long a prediction takes, Python's start included
python -m tests.bench data pays     the data stages beside datatrove's, and whether cleaning pays (tests/bench_data.py, bench_pays.py)
python -m tests.bench scaling       the bootstrap of a law beside a loop of scipy's (tests/bench_scaling.py)
python -m tests.bench step accuracy the step model: its speed, and its errors on sources left out (tests/bench_step.py)
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Plans that differ in width, depth, sequence, batch and ranks.
PLANS = [
    "hidden=128 heads=4 ffn=352 layers=4 seq_len=256 micro_batch=4 global_batch=8 gpus_per_node=2",
    "hidden=192 heads=6 ffn=512 layers=4 seq_len=256 micro_batch=8 global_batch=16 gpus_per_node=2",
    "hidden=256 heads=8 ffn=704 layers=2 seq_len=128 micro_batch=8 global_batch=16 gpus_per_node=2",
    "hidden=96 heads=6 ffn=256 layers=8 seq_len=256 micro_batch=4 global_batch=16 gpus_per_node=2",
    "hidden=384 heads=6 ffn=1024 layers=3 seq_len=256 micro_batch=2 global_batch=4 gpus_per_node=2",
    "hidden=128 heads=4 ffn=352 layers=6 seq_len=512 micro_batch=2 global_batch=8 gpus_per_node=2",
    "hidden=192 heads=6 ffn=512 layers=6 seq_len=128 micro_batch=4 global_batch=32 gpus_per_node=2",
    "hidden=128 heads=4 ffn=512 layers=4 seq_len=256 micro_batch=8 global_batch=8 gpus_per_node=1",
    "hidden=256 heads=8 ffn=704 layers=4 seq_len=256 micro_batch=4 global_batch=8 gpus_per_node=1",
    "hidden=320 heads=10 ffn=768 layers=3 seq_len=128 micro_batch=4 global_batch=8 gpus_per_node=2",
]
GROUPS = {"seq_len": "train", "micro_batch": "train", "global_batch": "train", "gpus_per_node": "cluster"}
BRIEF = "model.kv_heads=2 train.steps=25 train.warmup=5 train.evaluate_every=0 train.evaluate_sequences=0 checkpoint.every=0"
LITTLE = "data.limit=3 MB"


def foretold(*args: str, cwd: Path) -> str:
    """Standard output of a command."""
    command = [sys.executable, "-c", "import sys; from conf.program import main; sys.exit(main(sys.argv[1:]))", *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def prediction() -> None:
    """Calibrate once for each number of ranks, then predict each plan before it is run."""
    folder = Path(tempfile.mkdtemp())
    for ranks in (1, 2):
        measured = f"runs=measured{ranks}"
        foretold("real", "only=kernels,network", f"cluster.gpus_per_node={ranks}", measured, cwd=folder)
        foretold("analysis", "calibrate", measured, f"out=profile{ranks}.yaml", cwd=folder)
    print(f"{'plan':>4} {'predicted':>10} {'measured':>10} {'error':>7}   plan")
    errors = []
    for number, words in enumerate(PLANS, 1):
        ranks = 1 if "gpus_per_node=1" in words else 2
        own = [f"{GROUPS.get(word.split('=')[0], 'model')}.{word}" for word in words.split()]
        plan = [*own, *BRIEF.split(), LITTLE, f"profile=profile{ranks}.yaml"]
        value = {}
        for verb in ("sim", "real"):
            value[verb] = json.loads(foretold(verb, "json=true", *plan, cwd=folder))["quantities"]["pretrain.step_time"]["value"]
        errors.append(value["sim"] / value["real"] - 1)
        shown = words.replace("_per_node", "").replace("_batch", "").replace("_len", "")
        print(f"{number:>4} {value['sim'] * 1e3:>8.0f}ms {value['real'] * 1e3:>8.0f}ms {errors[-1]:>+7.1%}   {shown}", flush=True)
    inside = sum(abs(e) <= 0.2 for e in errors)
    typical = statistics.median(map(abs, errors))
    print(f"within 20%: {inside} of {len(errors)}; mean absolute error {statistics.fmean(map(abs, errors)):.1%}, median {typical:.1%}")


def bookkeeping() -> None:
    """Tokens a second of the trainer over those of the same loop without timeline, record and progress; steps interleaved."""
    folder = Path(tempfile.mkdtemp())
    overrides = ["cluster.gpus_per_node=1", "model.hidden=128", "model.heads=4", "train.global_batch=4", "train.micro_batch=4", LITTLE]
    foretold("real", "only=extract,dedup,tokens", *overrides, cwd=folder)
    print("\n".join(_interleaved(overrides, next(folder.glob("runs/*/real")))))


def _interleaved(overrides: list[str], run: Path, pairs: int = 150) -> list[str]:
    import torch

    from conf.program import load
    from conf.record import Record
    from real import optim, pretrain
    from real.cluster import keep_memory
    from real.data import Tokens
    from real.loss import loss_sum
    from real.progress import Progress
    from real.timeline import Timeline
    from real.trainer import Trainer

    torch.set_num_threads(1)
    keep_memory()
    plan = load(overrides)
    timeline, record, progress = Timeline(), Record(run), Progress(plan, 0.3, 0)
    trainer = Trainer(plan, Tokens(run / "tokens", "train", plan.train.seq_len), timeline)
    model, batches = trainer.parts[0], trainer.batches
    adam = torch.optim.AdamW(model.parameters(), betas=(plan.train.beta1, plan.train.beta2), eps=plan.train.epsilon, fused=True)

    def kept(step: int) -> None:
        loss, norm, _ = trainer.step(step)
        seconds = pretrain.book(record, timeline, step + 1)
        pretrain.tell(plan, record, step + 1, seconds, loss, norm)
        progress.step(step + 1, loss, seconds)
        record.flush()

    def bare(step: int) -> None:
        for group in adam.param_groups:
            group["lr"] = optim.learning_rate(plan.train, step)
        for batch in batches.step(step).split(plan.train.micro_batch):
            loss = loss_sum(model(batch.inputs), batch.targets) / plan.tokens_per_step
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.train.clip)
        adam.step()
        adam.zero_grad(set_to_none=True)
        float(loss.detach())

    times: dict[str, list[float]] = {"kept": [], "bare": []}
    for step in range(2 * pairs):
        name, work = (("kept", kept), ("bare", bare))[(step + step // 2) % 2]  # A B B A: drift cancels
        began = time.perf_counter()
        work(step)
        times[name].append(time.perf_counter() - began)
    kept_time, bare_time = (statistics.median(times[name][5:]) for name in ("kept", "bare"))
    return [
        f"step with record {kept_time * 1e3:.2f} ms, bare {bare_time * 1e3:.2f} ms:"
        f" {bare_time / kept_time:.4f} of its tokens/s (asked: at least 0.98)"
    ]


def trainers() -> None:
    """Tokens a second of this trainer, of a plain loop and of Hugging Face's Trainer: one model, batch and thread, in turns."""
    folder = Path(tempfile.mkdtemp())
    overrides = ["cluster.gpus_per_node=1", "model.hidden=128", "model.heads=4", "train.global_batch=4", "train.micro_batch=4", LITTLE]
    foretold("real", "only=extract,dedup,tokens", *overrides, cwd=folder)
    print(_beside(overrides, next(folder.glob("runs/*/real"))))


def _beside(overrides: list[str], run: Path, rounds: int = 8, steps: int = 25) -> str:
    import torch
    import transformers

    from conf.program import load
    from conf.record import Record
    from real import huggingface, pretrain
    from real.cluster import keep_memory
    from real.data import Tokens
    from real.loss import loss_sum
    from real.timeline import Timeline
    from real.trainer import Trainer

    torch.set_num_threads(1)
    keep_memory()
    plan = load(overrides)
    timeline, record = Timeline(), Record(run)
    ours = Trainer(plan, Tokens(run / "tokens", "train", plan.train.seq_len), timeline)
    told = huggingface.config(plan.model, plan.train.seq_len) | {"use_cache": False}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**told))
    plain = Trainer(plan, ours.tokens, timeline).parts[0]
    adam = torch.optim.AdamW(plain.parameters(), fused=True)
    batches = [ours.batches.step(step) for step in range(steps)]
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch.inputs]
    times: dict[str, list[float]] = {"ours": [], "plain": [], "theirs": []}

    def run_ours() -> None:
        for step in range(steps):
            began = time.perf_counter()
            loss, norm, _ = ours.step(step)
            pretrain.tell(plan, record, step + 1, pretrain.book(record, timeline, step + 1), loss, norm)
            record.flush()
            times["ours"].append(time.perf_counter() - began)

    def run_plain() -> None:
        for batch in batches:
            began = time.perf_counter()
            loss = loss_sum(plain(batch.inputs), batch.targets) / plan.tokens_per_step
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), plan.train.clip)
            adam.step()
            adam.zero_grad(set_to_none=True)
            float(loss.detach())
            times["plain"].append(time.perf_counter() - began)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            now = time.perf_counter()
            if hasattr(self, "began"):
                times["theirs"].append(now - self.began)
            self.began = now

    settings = transformers.TrainingArguments(
        output_dir=str(run / "hf"), per_device_train_batch_size=4, max_steps=steps + 1, use_cpu=True, report_to=[], save_strategy="no",
        optim="adamw_torch_fused", logging_steps=10_000, disable_tqdm=True, max_grad_norm=plan.train.clip, seed=0)  # fmt: skip
    for turn in range(rounds):
        runs = [run_ours, run_plain, lambda: transformers.Trainer(theirs, settings, train_dataset=rows, callbacks=[Watch()]).train()]
        for work in runs[turn % 3 :] + runs[: turn % 3]:
            work()
    mine, bare, other = (statistics.median(times[name]) for name in ("ours", "plain", "theirs"))
    rates = " ".join(f"{name} {plan.tokens_per_step / seconds:,.0f}" for name, seconds in zip(times, (mine, bare, other), strict=True))
    asked = "asked: at least 0.98 and 1.1"
    return f"tokens/s: {rates}; {bare / mine:.3f} of the plain loop, {other / mine:.3f} of Hugging Face's Trainer ({asked})"


def saving() -> None:
    """Time that a checkpoint takes from training, at once and beside it; saves in turns on one rank, 20 million parameters."""
    import torch

    from conf.program import load
    from real import checkpoint
    from real.optim import Optimizer
    from real.trainer import laid_out

    torch.set_num_threads(1)
    times: dict[bool, list[float]] = {False: [], True: []}
    plan = load(["cluster.gpus_per_node=1", "model.hidden=512", "model.heads=8", "model.ffn=1408", "model.layers=6"])
    from real.initial import initialise
    from real.timeline import Timeline

    model = laid_out(plan, None, Timeline(), None).to_empty(device="cpu")
    model.tie()
    initialise(model, 0)
    optimizer = Optimizer([model], plan.train)
    optimizer.begin()
    for turn in range(8):
        beside = turn % 2 == 1
        writer = checkpoint.Writer(Path(tempfile.mkdtemp()), plan.but(checkpoint=plan.checkpoint.but(asynchronous=beside)))
        began = time.perf_counter()
        writer.save(checkpoint.state([model], optimizer), turn)
        times[beside].append(time.perf_counter() - began)
        writer.finish()
    whole, aside = statistics.median(times[False]), statistics.median(times[True][1:])
    print(f"a checkpoint takes {whole * 1e3:.0f} ms, beside training {aside * 1e3:.1f} ms: {aside / whole:.1%} (asked: at most 5%)")


def sim() -> None:
    """Seconds of `foretold sim json=true` for 16,384 GPUs and 54 days."""
    folder = Path(tempfile.mkdtemp())
    times = []
    for _ in range(5):
        began = time.perf_counter()
        foretold("sim", "json=true", "experiment=llama3_405b", cwd=folder)
        times.append(time.perf_counter() - began)
    print(f"16,384 GPUs, 54 days: median {statistics.median(times):.2f} s, slowest {max(times):.2f} s of {len(times)} (asked: at most 3)")


if __name__ == "__main__":
    from tests.bench_align import placements
    from tests.bench_data import data
    from tests.bench_life import forms, life
    from tests.bench_pays import pays
    from tests.bench_scaling import scaling
    from tests.bench_step import accuracy, step

    benches = (sim, life, forms, step, accuracy, bookkeeping, trainers, saving, prediction, placements, data, pays, scaling)
    every = {bench.__name__: bench for bench in benches}
    for name in sys.argv[1:] or every:
        print(f"\n== {name}")
        every[name]()
