"""The step as events: schedules that end, time that is conserved, links that are shared fairly, and the closed form again."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy import Environment

from conf.arithmetic import stage_blocks
from conf.program import load
from conf.rules import problems
from sim.flows import Flows, fair
from sim.parallel import steps
from sim.schedule import PARTED, Pass, orders, rank_of
from sim.step import lived, trace

BASE = load(["model=llama3_8b", "gpu=h100_sxm", "cluster=dgx_h100", "cluster.nodes=8", "train.seq_len=4096", "train.global_batch=64",
             "train.micro_batch=1", "train.precision=bf16", "train.compile=true"])  # fmt: skip
FOLDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]
FILLED = [("zero_bubble", 2), ("zero_bubble", 4), ("zbv", 2), ("dualpipev", 2)]


def makespan(schedule, pp, vpp, count, lengths):
    """Time until all passes have run in their order, each as soon as what it needs is there; and the most micro-batches under way."""
    order = orders(schedule, pp, vpp, count, lengths)
    done, clock, place = {}, [0.0] * pp, [0] * pp
    left = sum(map(len, order))
    while left:
        moved = False
        for rank in range(pp):
            while place[rank] < len(order[rank]):
                each = order[rank][place[rank]]
                needs = [each._replace(stage=each.stage - 1)] if each.kind == "F" and each.stage else []
                if each.kind in "BI":
                    needs = [each._replace(kind="F")] + ([each._replace(stage=each.stage + 1)] if each.stage < pp * vpp - 1 else [])
                if each.kind == "W":
                    needs = [each._replace(kind="I")]
                if any(need not in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + lengths[each.kind] / vpp
                done[each] = clock[rank]
                place[rank] += 1
                left -= 1
                moved = True
        assert moved, "these passes wait for each other for ever"
    return max(clock)


@pytest.mark.parametrize(("schedule", "vpp"), FOLDS + FILLED)
def test_every_schedule_runs_every_pass_once_and_ends_in_the_time_of_its_formula(schedule, vpp):
    for pp in (2, 4, 8):
        for count in sorted({1, 2, pp, 2 * pp, 4 * pp}):
            if schedule in ("interleaved", "zero_bubble") and count > pp and count % pp:
                continue
            order = orders(schedule, pp, vpp, count)
            kinds = "FIW" if schedule in PARTED else "FB"
            assert sorted(each for rank in order for each in rank) == sorted(
                Pass(kind, stage, micro) for kind in kinds for stage in range(pp * vpp) for micro in range(count)
            )
            assert all(rank_of(schedule, each.stage, pp) == rank for rank, mine in enumerate(order) for each in mine)
            span = makespan(schedule, pp, vpp, count, {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0})
            few = min(count, pp)
            bubble = 3 * (pp + (few - 1) / vpp - few)
            if schedule in PARTED:
                bubble = max((pp - 1) / vpp, 2 * pp + (1 + 2 * (count - 1)) / vpp - 3 * count)
            slack = 1 / vpp if schedule in PARTED and count < pp else 0.0  # one pass
            assert span - 3 * count == pytest.approx(bubble, abs=slack + 1e-6), (pp, count)


def test_micro_batches_under_way_stay_within_the_schedules_memory():
    for schedule, vpp, most in (("1f1b", 1, 4), ("interleaved", 2, 11), ("zero_bubble", 2, 16), ("zbv", 2, 8)):
        for rank in orders(schedule, 4, vpp, 32):
            under_way = high = 0
            for each in rank:
                under_way += {"F": 1, "B": -1, "I": -1, "W": 0}[each.kind]
                high = max(high, under_way)
            assert high <= most, schedule


@st.composite
def uniform(draw):
    """A plan whose stages are alike: no head to speak of, layers that divide, in a pipeline no traffic beside the messages."""
    tp, pp = draw(st.sampled_from((1, 2, 8))), draw(st.sampled_from((1, 2, 4)))
    schedule, vpp = draw(st.sampled_from(FOLDS)) if pp > 1 else ("auto", 1)
    count = draw(st.sampled_from((4, 8, 16)))
    dp = 64 // (tp * pp)
    mesh = BASE.mesh.but(tp=tp, pp=pp, dp_shard=dp, schedule=schedule, vpp=vpp, zero=draw(st.integers(0, 3)) if pp == 1 else 0)
    train = BASE.train.but(global_batch=dp * count, recompute=draw(st.sampled_from(("none", "full"))))
    return BASE.but(model=BASE.model.but(vocab=512, layers=draw(st.sampled_from((16, 32)))), mesh=mesh, train=train,
                    tokenizer=BASE.tokenizer.but(vocab=256))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(uniform())
def test_the_two_fidelities_agree_where_stages_are_alike(plan):
    if not problems(plan):
        assert lived(plan).step_time == pytest.approx(steps([plan]).step_time[0], rel=0.01)


@pytest.mark.parametrize("words", [[], ["mesh.tp=4", "mesh.pp=4"], ["mesh.pp=8", "mesh.vpp=2", "mesh.schedule=zbv", "mesh.zero=1"]])
def test_time_is_conserved_on_every_rank(words):
    plan = BASE.but(mesh=load(["model=llama3_8b", "cluster=dgx_h100", "cluster.nodes=8", "gpu=h100_sxm", "train.global_batch=64",
                               "train.micro_batch=1", *words]).mesh)  # fmt: skip
    step = lived(plan)
    assert len(step.states) == plan.mesh.pp
    for rank, states in enumerate(step.states):
        assert sum(states.values()) == pytest.approx(step.step_time) and min(states.values()) >= -1e-9
        mine = [span for span in step.spans if span.rank == rank and span.lane == "kernels"]
        assert all(a.stop <= b.start + 1e-12 for a, b in pairwise(mine))
    assert max(span.stop for span in step.spans) == pytest.approx(step.step_time)
    bars = json.loads(trace(step))["traceEvents"]
    assert sum(bar["ph"] == "X" for bar in bars) == len(step.spans)


def test_the_head_delays_its_rank_alone():
    plan = BASE.but(mesh=BASE.mesh.but(tp=4, pp=4, dp_shard=4, zero=0), train=BASE.train.but(global_batch=64))
    compute = [states["compute"] for states in lived(plan).states]
    assert compute[0] == pytest.approx(compute[2]) and compute[3] > 1.05 * compute[0]
    assert [len(stage_blocks(126, 16, stage)) for stage in (0, 1, 15)] == [7, 8, 7]


def test_the_step_of_llama3_405b_takes_no_time_and_both_ways_say_the_same():
    plan = load(["experiment=llama3_405b"])
    step = lived(plan)
    assert len(step.states) == 16 and step.step_time == pytest.approx(steps([plan]).step_time[0], rel=0.03)


# -- links


def test_rates_are_max_min_fair():
    a, b, c = ("a", 0), ("b", 0), ("c", 0)
    assert fair([(1.0, [a])] * 4, {a: 1.0}) == pytest.approx([0.25] * 4)
    assert fair([(1.0, [a]), (1.0, [b])], {a: 1.0, b: 1.0}) == pytest.approx([1, 1])
    assert fair([(1.0, [a]), (1.0, [a, b]), (1.0, [b]), (1.0, [b])], {a: 1.0, b: 1.0}) == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert fair([(0.1, [c]), (1.0, [c])], {c: 1.0}) == pytest.approx([0.1, 0.9])


def test_no_flow_can_gain_unless_a_slower_one_loses():
    dice = random.Random(1)
    for _ in range(200):
        links = [("l", i) for i in range(4)]
        flows = [(1.0, dice.sample(links, dice.randint(1, 3))) for _ in range(dice.randint(1, 6))]
        capacity = {link: dice.uniform(0.2, 2.0) for link in links}
        rates = fair(flows, capacity)
        used = {link: sum(rate for rate, (_, crossed) in zip(rates, flows, strict=True) if link in crossed) for link in links}
        assert all(used[link] <= capacity[link] * (1 + 1e-9) for link in links)
        for rate, (most, crossed) in zip(rates, flows, strict=True):
            full = [link for link in crossed if used[link] >= capacity[link] * (1 - 1e-9)]
            fastest = any(all(r <= rate + 1e-9 for r, (_, other) in zip(rates, flows, strict=True) if link in other) for link in full)
            assert rate >= most * (1 - 1e-9) or fastest


def test_flows_end_when_their_bytes_have_passed():
    env = Environment()
    flows, ends = Flows(env), {}

    def send(name, start, seconds, links):
        yield env.timeout(start)
        yield flows.send(seconds, links)
        ends[name] = env.now

    link = [("out", 0)]
    for each in (("long", 0.0, 3.0, link), ("short", 1.0, 1.0, link), ("alone", 1.0, 2.0, [("out", 1)]), ("nothing", 2.0, 0.0, link)):
        env.process(send(*each))
    env.run()
    assert ends == pytest.approx({"long": 4.0, "short": 3.0, "alone": 3.0, "nothing": 2.0})  # 1 alone, 2 shared, 1 alone


def test_the_command(tmp_path, foretold):
    words = ["sim", "events=true", f"runs={tmp_path}", "experiment=llama3_405b"]
    status, text, _ = foretold(*words)
    assert status == 0 and "16 pipeline ranks, 16 micro-batches, interleaved" in text and "step.json" in text
    told = json.loads(foretold(*words, "json=true")[1])
    assert len(told["ranks"]) == 16 and told["step_time"] == pytest.approx(told["closed_form"], rel=0.03)
    assert json.loads((tmp_path / told["plan"] / "sim" / "step.json").read_text())["traceEvents"]
    status, _, error = foretold(*words, "train.global_batch=16777216")
    assert status == 2 and "passes of a step, more than 2,000,000; lower train.global_batch" in error
