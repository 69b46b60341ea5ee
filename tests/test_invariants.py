"""What must hold for every plan, tried on random ones: the step model's invariants."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conf.errors import Refused
from conf.program import load, vary
from conf.rules import problems
from sim.memory import memory
from sim.parallel import columns, steps

BASES = {
    name: load([f"model={name}", *words, "train.seq_len=2048", "train.micro_batch=1", "train.global_batch=64", "train.precision=bf16",
                "cluster.nodes=8", "train.compile=true"])
    for name, words in {
        "llama3_8b": ["gpu=h100_sxm", "cluster=dgx_h100"], "gpt3_175b": ["gpu=a100_80", "cluster=dgx_a100"],
        "mixtral_8x7b": ["gpu=h100_sxm", "cluster=dgx_h100"], "deepseek_v3": ["gpu=b200", "cluster=dgx_b200"],
    }.items()
}  # fmt: skip


@st.composite
def plans(draw, schedules=("1f1b", "interleaved")):
    """A legal plan of 64 ranks."""
    base = BASES[draw(st.sampled_from(sorted(BASES)))]
    tp, cp, pp = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4, 8), (1, 2), (1, 2, 4)))
    dp = 64 // (tp * cp * pp)
    schedule = draw(st.sampled_from(schedules)) if pp > 1 else "auto"
    ep, vpp = draw(st.sampled_from((1, 2, 4))) if base.model.moe.experts else 1, 1 if schedule in ("auto", "1f1b") else 2
    mesh = {"tp": tp, "cp": cp, "pp": pp, "dp_shard": dp, "zero": draw(st.integers(0, 3)), "schedule": schedule, "vpp": vpp, "ep": ep}
    micro, turns = draw(st.sampled_from((1, 2))), draw(st.sampled_from((4, 8, 16)))
    train = {"micro_batch": micro, "global_batch": dp * micro * turns, "recompute": draw(st.sampled_from(("none", "selective", "full")))}
    plan = base.but(mesh=base.mesh.but(**mesh), train=base.train.but(**train))
    assume(not problems(plan))
    return plan


LEGAL = settings(max_examples=60, deadline=None)


@LEGAL
@given(plans())
def test_mfu_is_a_share_and_the_parts_add_up(plan):
    step = steps([plan])
    assert 0 < step.mfu[0] <= 1
    parts = step.compute + step.communication + step.bubble + step.optimizer
    np.testing.assert_allclose(parts, step.step_time, rtol=1e-12)
    assert step.tokens_per_s[0] * step.step_time[0] == np.float64(plan.tokens_per_step) or np.isclose(
        step.tokens_per_s[0] * step.step_time[0], plan.tokens_per_step
    )


@LEGAL
@given(plans())
def test_step_time_is_linear_in_accumulation(plan):
    """Twice the additional micro-batches, twice the additional time; traffic of a step that a longer one hides may only help."""
    batch = plan.train.global_batch
    for some, rest in ((plan, np.inf), (unconnected(plan), 0.02)):
        times = [steps([some.but(train=some.train.but(global_batch=n * batch))]).step_time[0] for n in (2, 4, 6)]
        first, second = np.diff(times)
        assert 0 < first <= second * 1.02 and second <= first * (1 + rest)


def unconnected(plan):
    """The same plan where traffic takes no time."""
    return plan.but(cluster=plan.cluster.but(nic_bandwidth=1e18, nic_latency=0.0),
                    gpu=plan.gpu.but(link_bandwidth=1e18, link_latency=0.0, link_start=0.0))  # fmt: skip


@LEGAL
@given(plans(), st.sampled_from(("gpu.link_bandwidth", "cluster.nic_bandwidth", "gpu.memory_bandwidth", "gpu.bf16_peak")))
def test_faster_parts_never_slow_a_step(plan, key):
    group, name = key.split(".")
    part = getattr(plan, group)
    faster = plan.but(**{group: part.but(**{name: 2 * getattr(part, name)})})
    assert steps([faster]).step_time[0] <= steps([plan]).step_time[0] * (1 + 1e-12)


@LEGAL
@given(plans(schedules=("1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")))
def test_more_micro_batches_never_make_the_bubble_a_larger_share(plan):
    batch = plan.train.global_batch
    plan = unconnected(plan)  # data-parallel traffic that a longer step hides makes everything else a larger share
    found = [steps([plan.but(train=plan.train.but(global_batch=n * batch))]) for n in (1, 2, 4)]
    shares = [float(step.bubble[0] / step.step_time[0]) for step in found]
    assert shares[0] + 1e-12 >= shares[1] and shares[1] + 1e-12 >= shares[2]


@LEGAL
@given(st.lists(plans(), min_size=2, max_size=6), st.randoms())
def test_a_prediction_depends_on_its_own_plan_alone(some, random):
    order = list(range(len(some)))
    random.shuffle(order)
    together, shuffled = steps(some), steps([some[i] for i in order])
    np.testing.assert_allclose(together.step_time[order], shuffled.step_time, rtol=1e-12)
    np.testing.assert_allclose(together.step_time, [steps([plan]).step_time[0] for plan in some], rtol=1e-12)


@LEGAL
@given(plans())
def test_sharding_more_and_recomputing_more_never_needs_more_memory(plan):
    def need(**mesh):
        return float(memory(columns([plan.but(mesh=plan.mesh.but(**mesh))])).total[()].max())

    assert need(zero=0) >= need(zero=1) >= need(zero=2)
    full, none = (memory(columns([plan.but(train=plan.train.but(recompute=how))])).total for how in ("full", "none"))
    assert np.max(full) <= np.max(none) * (1 + 1e-12) or plan.model.layers / plan.mesh.pp < 3


def test_too_much_memory_is_said(foretold, tmp_path):
    status, text, error = foretold("sim", f"runs={tmp_path}", "model=llama3_70b", "gpu=h100_sxm", "cluster=dgx_h100", "cluster.nodes=1",
                                   "train.global_batch=8", "train.micro_batch=1", "train.seq_len=8192", "train.precision=bf16",
                                   "data.path=null", "data.tokens=1000000", "train.steps=2", "train.warmup=1")  # fmt: skip
    assert status == 0 and "does not fit: needs" in error and "step time" in text


def test_a_varied_plan_is_refused_where_it_breaks_a_rule():
    try:
        vary(BASES["llama3_8b"], {"mesh.tp": "3"})
    except Refused as refused:
        assert any("mesh.tp=3 must divide" in line for line in refused.problems)
    else:
        raise AssertionError("mesh.tp=3 divides nothing")
