"""What must hold for a plan as a whole; every broken rule is one line with its cure."""

import dataclasses
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conf import alignment, script
from conf.duration import Duration
from conf.errors import nearest
from conf.hourly import hour_of, hours_of
from conf.node import NOT_NEGATIVE, POSITIVE, SHARE, leaves
from conf.plan import SCHEDULES, Plan
from conf.record import QUANTITIES, STATES, read_fact
from conf.units import show


def get(plan: Any, key: str) -> Any:
    for part in key.split("."):
        plan = getattr(plan, part)
    return plan


def problems(plan: Plan) -> list[str]:
    """Every rule that the plan breaks, one line each: key and value, rule, cure."""
    return [*meshless_problems(plan), *_pipeline(plan), *_experts(plan), *_mesh(plan), *_replicas(plan), *_finetune(plan), *_align(plan)]


def meshless_problems(plan: Plan) -> list[str]:
    """The same for a plan whose mesh is still to be found."""
    return [*_values(plan), *_shapes(plan), *_crawl(plan), *_training(plan), *_failures(plan), *_world(plan), *_facts(plan)]


def _values(plan: Plan) -> Iterator[str]:
    for key, value, field in leaves(plan):
        must = field.metadata["must"]
        value = value.scale if isinstance(value, Duration) else value
        if value is None or must is None:
            continue
        if must == POSITIVE and not value > 0:
            yield f"{key}={value} must be above 0"
        if must == NOT_NEGATIVE and not value >= 0:
            yield f"{key}={value} must not be negative"
        if must == SHARE and not 0 <= value <= 1:
            yield f"{key}={value} is a share; it must lie between 0 and 1"
        if isinstance(must, tuple) and value not in must:
            yield f"{key}={value} is not known; {nearest(str(value), map(str, must))}"


def _divides(part: int, whole: int) -> bool:
    return part > 0 and whole % part == 0


def _shapes(plan: Plan) -> Iterator[str]:
    model, tp, pp, cp = plan.model, plan.mesh.tp, plan.mesh.pp, plan.mesh.cp
    rules = (
        *([] if model.head else [("model.heads", model.heads, "model.hidden", model.hidden)]),
        ("model.kv_heads", model.kv_heads, "model.heads", model.heads),
        ("mesh.tp", tp, "model.heads", model.heads),
        ("mesh.tp", tp, "model.kv_heads", model.kv_heads),
        ("mesh.tp", tp, "model.ffn", model.ffn),
        ("mesh.cp", cp, "train.seq_len", plan.train.seq_len),
        ("mesh.tp", tp, "train.seq_len / mesh.cp", plan.train.seq_len // max(1, cp)),
    )
    for part_key, part, whole_key, whole in rules:
        if part > 0 and not _divides(part, whole):
            yield f"{part_key}={part} must divide {whole_key}={whole}; {_near_divisors(part, whole, part_key)}"
    stages = pp * plan.mesh.vpp
    if stages > model.layers + 2:
        have = f"the model has {model.layers} layers"
        yield f"mesh.pp={pp} × mesh.vpp={plan.mesh.vpp} = {stages} stages, but {have}; lower mesh.pp or mesh.vpp"
    if model.positions == "learned" and (model.context or 0) < plan.train.seq_len:
        yield f"train.seq_len={plan.train.seq_len} exceeds the learned positions, model.context={model.context}; lower train.seq_len"
    if model.heads > 0 and model.positions == "rope" and not model.mla.kv_rank and model.head_dim % 2:
        odd = f"model.hidden={model.hidden} / model.heads={model.heads} gives an odd head of {model.head_dim}"
        yield f"{odd}; rotary embedding needs an even one; change model.heads"
    if model.vocab < plan.tokenizer.vocab:
        yield f"model.vocab={model.vocab} is smaller than tokenizer.vocab={plan.tokenizer.vocab}; set model.vocab={plan.tokenizer.vocab}"


def _pipeline(plan: Plan) -> Iterator[str]:
    model, mesh = plan.model, plan.mesh
    if mesh.pp == 1:
        if mesh.vpp > 1 or mesh.schedule != "auto":
            yield f"mesh.vpp={mesh.vpp}, mesh.schedule={mesh.schedule}: mesh.pp=1 is no pipeline; set mesh.vpp=1 mesh.schedule=auto"
        return
    wanted = SCHEDULES.get(mesh.pipeline, "1")
    if not (mesh.vpp >= 2 if wanted == "2+" else mesh.vpp == int(wanted)):
        fitting = [name for name, count in SCHEDULES.items() if count == ("1" if mesh.vpp == 1 else "2+")]
        yield f"mesh.schedule={mesh.pipeline} needs mesh.vpp={wanted.replace('2+', '2 or more')}, it is {mesh.vpp}; {fitting[-1]} takes it"
    stages = mesh.pp * mesh.vpp
    if mesh.vpp > 1 and model.layers % stages and (model.layers + 2) % stages:
        yield f"mesh.vpp={mesh.vpp} × mesh.pp={mesh.pp} = {stages} must divide the layers, {model.layers}, or these and 2; set mesh.vpp=1"
    least = {"dualpipev": 2 * mesh.pp}.get(mesh.pipeline, 1)
    share = plan.dp * plan.train.micro_batch
    for key in ("global_batch", "first_batch"):
        count = (getattr(plan.train, key) or plan.train.global_batch) // max(1, share)
        step = mesh.pp if mesh.pipeline in ("interleaved", "zero_bubble") and count > mesh.pp else 1
        if count < least or count % step:
            rule = f"a multiple of mesh.pp={mesh.pp}" if step > 1 else f"{least} or more"
            cure = f"set train.{key}={max(least, -(-count // step) * step) * share}"
            yield f"mesh.schedule={mesh.pipeline} needs {rule} micro-batches, train.{key} makes {count}; {cure}"
            return


def _experts(plan: Plan) -> Iterator[str]:
    moe, ep = plan.model.moe, plan.mesh.ep
    if not moe.experts:
        if ep > 1:
            yield f"mesh.ep={ep} spreads experts, but {plan.model.name} has none; set mesh.ep=1"
        return
    if not 0 < moe.top_k <= moe.experts or moe.ffn < 1:
        yield f"model.moe.experts={moe.experts} needs model.moe.top_k={moe.top_k} between 1 and it, and model.moe.ffn={moe.ffn} above 0"
    if moe.imbalance < 1:
        yield f"model.moe.imbalance={moe.imbalance} is below 1, but the fullest rank has the mean at least; set model.moe.imbalance=1"
    etp = plan.mesh.etp
    if etp > 0 and plan.mesh.tp % etp:
        yield f"mesh.etp={etp} must divide mesh.tp={plan.mesh.tp}; {_near_divisors(etp, plan.mesh.tp, 'mesh.etp')}"
        return
    group = plan.dp_shard * plan.mesh.cp * plan.mesh.tp // max(1, etp)
    for name, whole in (("model.moe.experts", moe.experts), ("mesh dp_shard × cp × tp" + " / etp" * (etp > 1), group)):
        if ep > 0 and whole % ep:
            yield f"mesh.ep={ep} must divide {name}={whole}; {_near_divisors(ep, whole, 'mesh.ep')}"


def _near_divisors(part: int, whole: int, key: str) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = max(d for d in divisors if d <= part)
    above = min((d for d in divisors if d >= part), default=whole)
    return f"set {key}={below}" + (f" or {above}" if above != below else "")


def _mesh(plan: Plan) -> Iterator[str]:
    sizes, mesh = plan.axes, plan.mesh
    product = " × ".join(f"{name} {size}" for name, size in sizes.items())
    if mesh.dp_shard < 1 and mesh.dp_shard != -1:
        yield f"mesh.dp_shard={mesh.dp_shard} must be above 0, or -1 for what is left"
    elif min(sizes.values()) > 0 and plan.ranks != plan.cluster.ranks:
        have = f"cluster.nodes={plan.cluster.nodes} × cluster.gpus_per_node={plan.cluster.gpus_per_node}"
        yield f"mesh {product} = {plan.ranks} ranks, but {have} = {plan.cluster.ranks}; set mesh.dp_shard=-1 to fill, or change an axis"
    if mesh.tp > plan.cluster.domain_ranks:
        limit = "cluster.domain" if plan.cluster.domain else "cluster.gpus_per_node"
        yield f"mesh.tp={mesh.tp} crosses servers; it must not exceed {limit}={plan.cluster.domain_ranks}"
    share = plan.dp * plan.train.micro_batch
    if share > 0 and plan.train.global_batch % share:
        rule = f"data-parallel ranks {plan.dp} × train.micro_batch={plan.train.micro_batch} = {share}"
        near = max(share, plan.train.global_batch // share * share)
        yield f"train.global_batch={plan.train.global_batch} is no multiple of {rule}; set train.global_batch={near}"
    elif plan.train.first_batch and (plan.train.first_batch % max(1, share) or plan.train.global_batch % plan.train.first_batch):
        rule = f"a multiple of {share} (data-parallel ranks × train.micro_batch) that divides train.global_batch={plan.train.global_batch}"
        yield f"train.first_batch={plan.train.first_batch} must be {rule}; set train.first_batch={share}, or null"


def _of_the_web(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", address)
    except ValueError:  # a port that is no number, an IPv6 address without its end
        return False


def _finetune(plan: Plan) -> Iterator[str]:
    """What its training breaks beside what pre-training does, under its own keys."""
    tune = plan.finetune
    if tune.method == "none":
        return
    if tune.adapters and not tune.targets:
        yield "finetune.targets=[] leaves nothing to train; name matrices, as in finetune.targets=[q_proj,v_proj]"
    if tune.adapters and plan.train.optimizer == "muon":
        yield "train.optimizer=muon is for whole matrices, finetune.method=lora trains none; set train.optimizer=adamw"
    twin = dataclasses.replace(plan.tuned, finetune=dataclasses.replace(tune, method="none"))
    before = set(problems(dataclasses.replace(plan, finetune=twin.finetune)))
    own = re.compile(r"train\.(steps|seq_len|global_batch|micro_batch|learning_rate|warmup)\b")
    yield from (own.sub(r"finetune.\1", line) for line in problems(twin) if line not in before)


_AS_ALIGN = {
    "train.global_batch": "align.prompts × completions / align.updates",
    "train.seq_len": "align.prompt_tokens + align.new_tokens",
    "train.steps": "align.steps × align.updates",
    **{f"train.{name}": f"align.{name}" for name in ("micro_batch", "learning_rate", "warmup")},
}


def _align(plan: Plan) -> Iterator[str]:
    """What the alignment breaks: its roles, its method, and its training, under its own keys."""
    if plan.align.method == "none":
        return
    if found := alignment.problems(plan.align, plan.ranks, plan.mesh.tp * plan.mesh.cp * plan.mesh.pp):
        yield from found
        return
    off = dataclasses.replace(plan.align, method="none")
    twin = dataclasses.replace(plan.aligned, align=off, finetune=dataclasses.replace(plan.finetune, method="none"))
    before = set(problems(dataclasses.replace(plan, align=off)))
    own = re.compile("|".join(rf"{re.escape(name)}\b" for name in _AS_ALIGN))
    yield from (own.sub(lambda found: _AS_ALIGN[found[0]], line) for line in problems(twin) if line not in before)


def _crawl(plan: Plan) -> Iterator[str]:
    for seed in plan.crawl.seeds:
        if not _of_the_web(seed):
            yield f"crawl.seeds: {seed!r} is no address of the web; write for example crawl.seeds=[https://example.org/]"
    if plan.data.path == "crawl" and not plan.crawl.seeds:
        yield "data.path=crawl needs crawl.seeds; write for example crawl.seeds=[https://example.org/]"
    if not re.fullmatch(r"[A-Za-z_-]+(/[^\r\n]*)?", plan.crawl.agent):
        yield f"crawl.agent={plan.crawl.agent!r} must be a name of letters, then / and anything; write for example crawl.agent=foretold/0.1"


def _training(plan: Plan) -> Iterator[str]:
    train = plan.train
    if train.steps is None and train.stop_after is None:
        yield "train.steps and train.stop_after are both null: the run would never end; set one"
    if train.steps is not None and train.steps < 1:
        yield f"train.steps={train.steps} must be above 0, or null for as long as train.stop_after says"
    if train.steps is None and train.schedule != "constant":
        yield f"train.schedule={train.schedule} needs to know the last step; set train.steps, or train.schedule=constant"
    if train.steps is not None and train.warmup > train.steps:
        yield f"train.warmup={train.warmup} is longer than train.steps={train.steps}; set train.warmup={train.steps // 10}"
    if plan.gpu.peak(train.precision) is None:
        has = ", ".join(name for name in ("fp32", "bf16", "fp16", "fp8", "fp4") if plan.gpu.peak(name))
        yield f"train.precision={train.precision}: {plan.gpu.name} has no {train.precision} rate; it has {has}; set train.precision=fp32"
    for entry in plan.data.mixture:
        if not re.fullmatch(r"(\d+\.?\d*|\.\d+) \S+", entry) or float(entry.split()[0]) <= 0:
            yield f"data.mixture: {entry!r} is no weight above 0 and a pattern; write for example data.mixture=['3 *.py','1 *.md']"
    if plan.data.dedup_within == "folder" and plan.data.path not in (None, "crawl") and not Path(plan.data.path).is_dir():
        yield f"data.dedup_within=folder needs data.path={plan.data.path} to be a folder of folders; name one, or set corpus"
    if 0 < plan.data.substrings < 20:
        yield f"data.substrings={plan.data.substrings} must be at least 20 words, or 0 for none; set data.substrings=50"
    if plan.data.path is None and plan.data.tokens is None and plan.data.raw is None:
        yield "data.path and data.tokens are both null; name a corpus with data.path=…, or say how many tokens exist with data.tokens=…"
    if plan.data.raw is not None and (plan.data.path is not None or plan.data.tokens is not None):
        yield f"data.raw={plan.data.raw:g} B is of a corpus that is not here and not yet tokens; set data.path and data.tokens to null"
    if plan.data.path is not None and plan.data.tokens is not None:
        yield f"data.path={plan.data.path} and data.tokens={plan.data.tokens} contradict each other; set one of them to null"


def _failures(plan: Plan) -> Iterator[str]:
    cluster, checkpoint, steps = plan.cluster, plan.checkpoint, plan.train.steps
    if cluster.spares > cluster.nodes:
        yield f"cluster.spares={cluster.spares} exceeds cluster.nodes={cluster.nodes}; lower it, or raise cluster.nodes"
    for name, cause in plan.failures.causes.items():
        if cause.blast > cluster.nodes:
            yield f"failures.causes.{name}.blast={cause.blast} exceeds cluster.nodes={cluster.nodes}; lower it"
        if cause.per == "job" and cause.shape != 1:
            yield f"failures.causes.{name}.shape={cause.shape} is a machine's age; what strikes the job has none: set 1, or per=node"
        if cause.how == "slow" and cause.factor < 1:
            yield f"failures.causes.{name}.factor={cause.factor} makes steps faster; a slow server's factor is 1 or more, such as 1.06"
    yield from script.problems(plan.failures.script, plan.ranks, steps)
    if plan.failures.verify_every and plan.mesh.dp_replicate == 1:
        what = f"failures.verify_every={plan.failures.verify_every} compares replicas, and mesh.dp_replicate=1 makes none"
        yield f"{what}; set mesh.dp_replicate=2, or 0 here"
    spikes = plan.failures.spikes
    if spikes.answer == "rollback" and 0 < spikes.skip <= spikes.rewind:
        yield f"failures.spikes.skip={spikes.skip} ends before the spike, which is rewind={spikes.rewind} steps ahead; make it larger, or 0"
    if plan.failures.infant < 1:
        yield f"failures.infant={plan.failures.infant} would make new machines the better ones; it must be 1 or more"
    aligned = plan.align.steps if plan.align.method != "none" else 0
    if plan.failures.causes and steps is not None and checkpoint.every > max(steps, aligned) > 0:
        which = f"align.steps={aligned}" if aligned > steps else f"train.steps={steps}"
        yield f"checkpoint.every={checkpoint.every} is longer than the run, {which}; lower it, or set 0 to save only at the end"
    if checkpoint.local_every and cluster.local_bandwidth is None:
        yield f"checkpoint.local_every={checkpoint.local_every} needs disks in the servers; set cluster.local_bandwidth, as in '10 GB/s'"


def _replicas(plan: Plan) -> Iterator[str]:
    if plan.failures.restart == "replica":
        inner = plan.dp_shard * plan.mesh.cp * plan.mesh.tp
        if plan.mesh.dp_replicate < 2 or inner % plan.cluster.gpus_per_node:
            rule = f"replicas of whole servers; mesh.dp_replicate={plan.mesh.dp_replicate} makes {inner} neighbouring ranks each"
            yield f"failures.restart=replica needs {rule}; set mesh.dp_replicate=2 or more, or failures.restart=job"


def _world(plan: Plan) -> Iterator[str]:
    if plan.gpu.name not in plan.price.gpu_hours:
        cure = f"add price.gpu_hours.{plan.gpu.name}, or {nearest(plan.gpu.name, plan.price.gpu_hours)}"
        yield f"price.gpu_hours has no price for {plan.gpu.name}; {cure}"
    for state in plan.price.unbilled or []:
        if state not in STATES:
            yield f"price.unbilled: {state} is no state of a rank; {nearest(state, STATES)}"
    if plan.gpu.name not in plan.price.embodied:
        yield f"price.embodied has no value for {plan.gpu.name}; add price.embodied.{plan.gpu.name}"
    gpu, cap = plan.gpu, plan.power.cap
    least = max(gpu.idle_power, gpu.cap_static * gpu.max_power)
    if cap is not None and not least < cap <= gpu.max_power:
        bounds = f"above {show(least, 'W')}, which {gpu.name} draws without arithmetic, and not above its limit, {show(gpu.max_power, 'W')}"
        yield f"power.cap={show(cap, 'W')} must lie {bounds}"
    if plan.power.pue < 1:
        yield f"power.pue={plan.power.pue} must be at least 1: a building uses what its servers use"
    yield from _limits(plan)
    yield from _grid(plan)
    yield from _prices(plan)
    if plan.profile is not None and not Path(plan.profile).is_file():
        yield f"profile={plan.profile} is no file; make one with: foretold real only=kernels,network && foretold analysis calibrate"


def _limits(plan: Plan) -> Iterator[str]:
    power = plan.power
    if power.host_idle is not None and power.host_idle > power.host:
        yield f"power.host_idle={show(power.host_idle, 'W')} exceeds power.host={show(power.host, 'W')}, that of a loaded server; lower it"
    ordered = sorted(power.limits.items(), key=lambda item: item[1].start)
    for (name, one), (after, other) in pairwise(ordered):
        if one.start + one.length > other.start:
            yield f"power.limits.{after} begins before power.limits.{name} has ended; set power.limits.{after}.start later, or join them"
    if power.limits and plan.grid.shift == "pause":
        yield "power.limits and grid.shift=pause would both stop the run; set grid.shift=none or start, or power.limits={}"


def _grid(plan: Plan) -> Iterator[str]:
    grid = plan.grid
    profile = grid.profile
    if profile is not None and (len(profile) != 12 or any(len(month) != 24 for month in profile)):
        yield "grid.profile must hold 12 months of 24 hours; give 12 rows of 24 values, or null"
    if grid.hourly is not None:
        try:
            hours_of(grid)
        except ValueError as error:
            yield str(error)
    dates = [key for key in ("start", "price.as_of", "grid.deadline") if get(plan, key) is not None]
    strange = [key for key in dates if not _is_date(str(get(plan, key)))]
    yield from (f"{key}={get(plan, key)} is not a date; write for example {key}=2026-01-31" for key in strange)
    if grid.shift != "none" and grid.deadline is None:
        yield f"grid.shift={grid.shift} needs to know until when; set grid.deadline=…, a date after start={plan.start}, or grid.shift=none"
    if grid.deadline is not None and not strange and hour_of(grid.deadline) <= hour_of(plan.start):
        yield f"grid.deadline={grid.deadline} is not after start={plan.start}; set a later date"


def _is_date(text: str) -> bool:
    try:
        hour_of(text)
    except ValueError:
        return False
    return True


def _prices(plan: Plan) -> Iterator[str]:
    price = plan.price
    ranges: dict[str, Any] = {f"gpu_hours.{name}": offer for name, offer in price.gpu_hours.items()}
    ranges |= {"storage": price.storage, "egress": price.egress, "tariff": price.tariff}
    for name, offer in ranges.items():
        if not offer.low <= offer.mid <= offer.high:
            yield f"price.{name} must have low ≤ mid ≤ high; order its three prices"
    if price.owned and plan.gpu.name not in price.capex:
        yield f"price.owned=true needs price.capex.{plan.gpu.name}; set '+price.capex.{plan.gpu.name}=30000', in USD"
    if price.hours is not None and (len(price.hours) != 24 or min(price.hours) < 0):
        yield "price.hours must hold 24 values, none negative: the tariff of each hour (UTC) relative to its mean; or set it to null"


def _facts(plan: Plan) -> Iterator[str]:
    for name, fact in plan.published.items():
        quantity = QUANTITIES.get(name.split(".")[-1])
        if quantity is None:
            yield f"published.{name} is no quantity of the record; {nearest(name.split('.')[-1], QUANTITIES)}"
            continue
        try:
            read_fact(fact.value, quantity[0])
        except ValueError as error:
            yield f"published.{name}: {error}"
