"""The memory model against the trainer's own word (its code tracked on fake devices), torch's schedules, published peaks, and itself."""

from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import get_schedule_class

from conf.program import load
from conf.rules import problems
from sim.memory import PARTS, in_flight, memory, waiting
from sim.parallel import columns
from sim.room import line, verdict
from sim.schedule import orders
from tests.test_invariants import LEGAL, plans

BASE = ["gpu=h100_sxm", "cluster.gpus_per_node=8", "train.precision=bf16", "train.micro_batch=1", "data.path=null", "data.tokens=1000000",
        "tokenizer.vocab=256"]  # fmt: skip
SHORT = "model=llama3_8b model.layers=4 model.vocab=16384 train.seq_len=4096"
FEW = [
    f"{SHORT} train.global_batch=8",
    f"{SHORT} mesh.tp=4 train.global_batch=4 train.recompute=selective",
    f"{SHORT} mesh.cp=2 train.global_batch=4 train.recompute=full",
    f"{SHORT} mesh.pp=2 mesh.tp=2 train.global_batch=8",
    f"{SHORT} mesh.pp=2 mesh.vpp=2 mesh.schedule=zbv train.global_batch=16",
    "model=qwen3_30b_a3b model.layers=2 model.vocab=16384 train.seq_len=4096 mesh.ep=4 train.global_batch=8",
    f"{SHORT} gpu=cpu_core train.precision=fp32 train.global_batch=8",  # whose RMSNorm keeps more
]
LLAMA, QWEN = "model=llama3_8b train.seq_len=4096", "model=qwen3_30b_a3b train.seq_len=4096"
MANY = [
    "model=llama3_8b cluster.nodes=1 train.seq_len=8192 train.global_batch=8",
    "model=llama3_8b cluster.nodes=2 train.seq_len=8192 train.global_batch=32 train.recompute=selective",
    "model=llama3_8b cluster.nodes=4 train.seq_len=8192 train.global_batch=32 train.recompute=full",
    f"{LLAMA} cluster.nodes=8 mesh.dp_replicate=4 mesh.tp=2 train.global_batch=64",
    "model=llama3_8b cluster.nodes=2 mesh.cp=4 train.seq_len=32768 train.global_batch=8",
    "model=llama3_8b cluster.nodes=2 mesh.cp=4 train.seq_len=16384 train.global_batch=4 train.recompute=selective",
    "model=llama3_8b cluster.nodes=2 mesh.cp=4 mesh.cp_kind=gather train.seq_len=16384 train.global_batch=4",
    "model=llama3_8b cluster.nodes=2 mesh.cp=4 mesh.cp_kind=ulysses train.seq_len=16384 train.global_batch=8 train.recompute=selective",
    "model=llama3_8b cluster.nodes=4 mesh.tp=4 mesh.cp=2 train.seq_len=16384 train.global_batch=8 train.recompute=full",
    "model=llama3_8b cluster.nodes=4 mesh.pp=4 mesh.tp=2 train.seq_len=8192 train.global_batch=32",
    f"{LLAMA} cluster.nodes=4 mesh.pp=4 mesh.vpp=2 mesh.tp=2 train.global_batch=32 train.recompute=selective",
    f"{LLAMA} cluster.nodes=4 mesh.pp=4 mesh.vpp=2 mesh.schedule=zbv mesh.tp=2 train.global_batch=32",
    "model=llama3_8b cluster.nodes=4 mesh.pp=4 mesh.vpp=2 mesh.schedule=dualpipev train.seq_len=2048 train.global_batch=64",
    f"{LLAMA} cluster.nodes=2 mesh.pp=4 mesh.vpp=2 mesh.schedule=zero_bubble mesh.tp=4 train.global_batch=8",
    f"{LLAMA} cluster.nodes=2 mesh.pp=4 mesh.schedule=gpipe mesh.tp=4 train.global_batch=4",
    "model=llama3_70b cluster.nodes=16 mesh.tp=8 train.seq_len=8192 train.global_batch=16 train.recompute=selective",
    "model=llama3_70b cluster.nodes=64 mesh.tp=8 mesh.pp=4 train.seq_len=8192 train.global_batch=64",
    "model=llama3_70b cluster.nodes=64 mesh.tp=8 mesh.cp=2 mesh.pp=8 train.seq_len=16384 train.global_batch=64 train.recompute=full",
    "model=gpt3_175b cluster.nodes=64 mesh.tp=8 mesh.pp=8 train.seq_len=2048 train.global_batch=64",
    "model=gpt3_175b cluster.nodes=64 mesh.tp=8 train.seq_len=2048 train.global_batch=64 train.recompute=full",
    f"{QWEN} cluster.nodes=2 mesh.ep=16 train.global_batch=16",
    f"{QWEN} cluster.nodes=4 mesh.ep=8 mesh.tp=2 train.global_batch=32 train.recompute=full",
    f"{QWEN} cluster.nodes=8 mesh.pp=4 mesh.ep=8 train.global_batch=64",
    "model=mixtral_8x7b cluster.nodes=8 mesh.ep=8 mesh.tp=2 train.seq_len=4096 train.global_batch=32 train.recompute=selective",
    "model=deepseek_v3 cluster.nodes=64 mesh.pp=8 mesh.ep=32 train.seq_len=4096 train.global_batch=512 train.recompute=full",
    "model=deepseek_v3 cluster.nodes=64 mesh.tp=2 mesh.pp=8 mesh.ep=16 train.seq_len=2048 train.global_batch=256",
]
TABLE = Path(__file__).parents[2] / "shared" / "validation" / "step_time.csv"


def tracked(task: tuple[str, int]) -> int:
    """Bytes on the rank of a pipeline rank that holds most: a ring's last one computes on whole parts of keys, others on halves."""
    from real.dry import peak

    words, place = task
    plan = load([*BASE, *words.split()])
    ring = plan.mesh.cp_kind == "ring" and plan.train.recompute == "selective"
    return peak(plan, place * plan.ranks // plan.mesh.pp + ring * (plan.mesh.cp - 1) * plan.mesh.tp)


def compare(meshes: list[str]) -> None:
    """First and last pipeline rank of each mesh, within 5%."""
    loaded = {words: load([*BASE, *words.split()]) for words in meshes}
    tasks = [(words, place) for words, plan in loaded.items() for place in sorted({0, plan.mesh.pp - 1})]
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:  # a process group outlives its world in a process
        for (words, place), found in zip(tasks, pool.imap(tracked, tasks), strict=True):
            told = float(memory(columns([loaded[words]])).of_rank(place).max())
            print(f"{words} rank {place}: tracked {found / 1e9:.2f} GB, predicted {told / 1e9:.2f} GB, {told / found - 1:+.1%}")
            assert told == pytest.approx(found, rel=0.05), (words, place)


def test_the_trainers_own_peak_is_foretold():
    compare(FEW)


@pytest.mark.slow
def test_the_trainers_own_peak_is_foretold_on_meshes_of_up_to_512_ranks():
    compare(MANY)


# -- passes in flight


def walked(passes: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Most passes held at once, and how many of those waited for their weights' gradients, at most."""
    begun, back, most = set[tuple[int, int]](), set[tuple[int, int]](), (0, 0)
    for kind, *where in passes:
        at = (where[0], where[1])
        begun |= {at} if kind == "F" else set()
        back |= {at} if kind == "I" else set()
        if kind in "BW":
            begun, back = begun - {at}, back - {at}
        most = max(most, (len(begun), len(back)))
    return most


def torchs(schedule: str, pp: int, vpp: int, count: int) -> list[list[tuple[str, int, int]]]:
    """The passes of every rank in torch's order."""
    names = {"interleaved": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}
    numbers = [0, 2 * pp - 1] if schedule in ("zbv", "dualpipev") else [turn * pp for turn in range(vpp)]
    stages = [SimpleNamespace(stage_index=i, num_stages=pp * vpp, group_size=pp, group_rank=0, group=None, is_first=i == 0, device="cpu",
                              is_last=i == pp * vpp - 1, has_backward=True, submod=None) for i in numbers]  # fmt: skip
    order = get_schedule_class(names[schedule])(stages, count, loss_fn=lambda a, _: a).pipeline_order
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}

    def plain(rank: int) -> list[tuple[str, int, int]]:
        parts = [part for action in order[rank] if action is not None for part in (getattr(action, "sub_actions", None) or [action])]
        return [(kinds[p.computation_type.name], p.stage_index, p.microbatch_index) for p in parts if p.computation_type.name in kinds]

    return [plain(rank) for rank in range(pp)]


def numbers(schedule: str, pp: int, vpp: int, count: int) -> SimpleNamespace:
    return SimpleNamespace(pp=pp, vpp=vpp, accumulation=count, gpipe=schedule == "gpipe", dual=schedule == "dualpipev",
                           v_shaped=schedule in ("zbv", "dualpipev"), parted=schedule in ("zero_bubble", "zbv", "dualpipev"))  # fmt: skip


@LEGAL
@given(st.sampled_from(("gpipe", "1f1b", "interleaved")), st.integers(2, 8), st.integers(2, 4), st.integers(1, 4), st.booleans())
def test_passes_in_flight_are_those_of_the_schedules(schedule, pp, vpp, rounds, few):
    vpp, count = (vpp if schedule == "interleaved" else 1), max(1, pp - 1) if few else rounds * pp
    mine = numbers(schedule, pp, vpp, count)
    for rank, passes in enumerate(orders(schedule, pp, vpp, count)):
        assert in_flight(mine, rank) == walked(passes)[0]
    if schedule == "interleaved":
        assert [in_flight(mine, rank) for rank in range(pp)] == [walked(passes)[0] for passes in torchs(schedule, pp, vpp, count)]


@LEGAL
@given(st.sampled_from(("zero_bubble", "zbv", "dualpipev")), st.integers(2, 6), st.integers(2, 3), st.integers(2, 4))
def test_passes_that_wait_are_those_of_torchs_schedules(schedule, pp, vpp, rounds):
    vpp = vpp if schedule == "zero_bubble" else 2
    mine, found = numbers(schedule, pp, vpp, rounds * pp), [walked(passes) for passes in torchs(schedule, pp, vpp, rounds * pp)]
    assert [int(in_flight(mine, rank)) for rank in range(pp)] == [held for held, _ in found]
    if schedule == "zero_bubble":
        assert [int(waiting(mine, rank)) for rank in range(pp)] == [late for _, late in found]


# -- what must hold for every plan


def need(plan) -> float:
    return float(memory(columns([plan])).total.max())


@LEGAL
@given(plans(schedules=("1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")))
def test_parts_add_up_to_the_fullest_rank(plan):
    told = memory(columns([plan]))
    assert sum(told.part(part).max() for part in PARTS) == pytest.approx(told.total.max(), rel=1e-12)
    assert told.of_rank(int(told.rank.max())).max() == pytest.approx(told.total.max(), rel=1e-12)
    assert all(told.part(part).max() >= 0 for part in PARTS)


@LEGAL
@given(plans())
def test_more_tokens_need_more_and_more_shards_less(plan):
    train, mesh = plan.train, plan.mesh
    assert need(plan.but(train=train.but(micro_batch=2 * train.micro_batch, global_batch=2 * train.global_batch))) > need(plan)
    longer = plan.but(train=train.but(seq_len=2 * train.seq_len), model=plan.model.but(context=2 * (plan.model.context or 1)))
    assert need(longer) > need(plan)
    wider = {"dp_shard": plan.but(mesh=mesh.but(dp_shard=2 * plan.dp_shard), train=train.but(global_batch=2 * train.global_batch))}
    wider["tp"] = plan.but(mesh=mesh.but(tp=2 * mesh.tp, dp_shard=plan.dp_shard))
    for other in wider.values():
        assert need(other.but(cluster=plan.cluster.but(nodes=16))) <= need(plan) * (1 + 1e-12)


@LEGAL
@given(plans(schedules=("1f1b",)))
def test_more_stages_need_less(plan):
    """Of micro-batches enough to fill both."""
    assume(plan.mesh.pp > 1)
    batch = plan.dp * plan.train.micro_batch * 16
    filled = plan.but(train=plan.train.but(global_batch=batch))
    deeper = filled.but(mesh=plan.mesh.but(pp=2 * plan.mesh.pp), cluster=plan.cluster.but(nodes=16))
    assume(not problems(deeper))
    assert need(deeper) <= need(filled)


@LEGAL
@given(plans())
def test_recomputing_needs_less(plan):
    """Selective recomputation keeps what was gathered over tp, before and after: with tp it may keep more than none does, as traced."""
    none, selective, full = (need(plan.but(train=plan.train.but(recompute=how))) for how in ("none", "selective", "full"))
    few = plan.model.layers / (plan.mesh.pp * plan.mesh.vpp) < 3  # a block's recomputation is held beside what others keep
    assert few or full <= min(none, selective) * (1 + 1e-12)
    assert few or plan.mesh.tp > 1 or plan.mesh.cp > 1 or selective <= none * (1 + 1e-12)


# -- the verdict


@pytest.mark.parametrize("words", [
    "model=llama3_70b cluster.nodes=2 mesh.tp=8 mesh.dp_replicate=2 train.global_batch=32 train.seq_len=8192",
    "model=llama3_8b cluster.nodes=1 train.global_batch=32 train.micro_batch=4 train.seq_len=8192",
    "experiment=llama3_405b mesh.zero=1",
])  # fmt: skip
def test_the_cures_of_a_plan_that_does_not_fit_make_it_fit(words):
    said = words.split() if "experiment" in words else [*BASE, *words.split()]
    plan = load(said)
    told = verdict(plan)
    assert not told["fits"] and told["cures"] and told["need"] == pytest.approx(need(plan))
    for cure in told["cures"]:
        cured = load([*said, *cure["word"].split()])
        assert need(cured) == pytest.approx(cure["need"]) and verdict(cured)["fits"]
    assert f"set {told['cures'][0]['word']} (needs" in line(plan, told)


def test_a_plan_beyond_cure_is_told_so():
    plan = load([*BASE, "model=llama3_405b", "cluster.nodes=1", "train.global_batch=8", "mesh.dp_shard=8"])
    told = verdict(plan)
    assert told["cures"] == [] and line(plan, told).endswith(
        "; no single change fits, foretold sim search=true finds the best mesh that does"
    )


def test_llama_3_405b_fits_as_it_was_published():
    """Gradients sharded beside the optimizer (section 3.3.2 of its paper); with whole ones it would not have."""
    assert verdict(load(["experiment=llama3_405b"]))["fits"]
    assert not verdict(load(["experiment=llama3_405b", "mesh.zero=1"]))["fits"]


@pytest.mark.skipif(not TABLE.is_file(), reason="the table lies beside the repository")
def test_published_peaks():
    from analysis.published import _memory
    from analysis.replay import steps_of

    frame = pd.read_csv(TABLE)
    frame = frame[pd.to_numeric(frame["peak_memory_gib"], errors="coerce") > 0]
    told = _memory(frame, steps_of(frame).rows)
    assert told is not None and told["rows"] >= 32 and told["mean_abs_pct"] <= 3 and told["max_abs_pct"] <= 8
    assert np.isfinite(told["mean_abs_pct"])
