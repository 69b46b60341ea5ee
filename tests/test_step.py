"""The step model's answers to what the trainer can do: schedules, shared cores, recomputation, growing batches."""

import pytest

from conf.errors import Refused
from conf.program import load
from sim.kernels import rates, throttle
from sim.life import live
from sim.parallel import steps
from sim.power import Meter


def predicted(*words: str):
    return steps([load(["model=tiny_llama3", "cluster.gpus_per_node=4", "train.global_batch=32", "train.micro_batch=1", *words])])


def test_each_schedule_has_its_bubble():
    """Shares of 1F1B's: interleaving divides by the virtual stages; where weights' gradients fill the holes, a forward or an inputs'
    backward pass is left of a forward and a backward one (exact shares where all three are equal: tests/test_events.py)."""
    base = ["mesh.pp=4", "model.layers=8"]
    whole = predicted(*base).bubble[0]
    found = {
        name: predicted(*base, f"mesh.schedule={name}", f"mesh.vpp={vpp}").bubble[0] / whole
        for name, vpp in (("gpipe", 1), ("interleaved", 2), ("zero_bubble", 2), ("zbv", 2), ("dualpipev", 2))
    }
    assert (found["gpipe"], found["interleaved"]) == pytest.approx((1, 1 / 2), rel=1e-9)
    assert 1 / 8 < found["zero_bubble"] <= found["zbv"] == found["dualpipev"] < 1 / 3
    memory = [predicted(*base, f"mesh.schedule={name}").memory[0] for name in ("gpipe", "1f1b")]
    assert memory[0] > memory[1]  # all of the step's micro-batches in flight, or as many as stages


def test_ranks_that_share_cores_take_turns():
    alone, crowded = (predicted("mesh.dp_shard=4", f"cluster.cores_per_node={cores}") for cores in (4, 1))
    assert crowded.compute[0] == pytest.approx(4 * alone.compute[0]) and crowded.communication[0] == pytest.approx(alone.communication[0])


def test_recomputing_some_costs_some_and_keeps_some():
    none, selective, full = (predicted("mesh.dp_shard=4", f"train.recompute={kind}", "train.seq_len=2048") for kind in RECOMPUTE)
    assert none.memory[0] > selective.memory[0] > full.memory[0]
    assert none.compute[0] < selective.compute[0] < full.compute[0]

    half = predicted("mesh.dp_shard=4", "train.recompute=full", "train.recompute_share=0.5", "train.seq_len=2048")
    assert half.compute[0] == pytest.approx((none.compute[0] + full.compute[0]) / 2) and full.memory[0] < half.memory[0] < none.memory[0]


RECOMPUTE = ("none", "selective", "full")


def test_a_growing_batch_shortens_the_run_and_counts_its_tokens():
    words = ["train.steps=100", "train.warmup=10", "cluster.gpus_per_node=1", "train.evaluate_every=0", "train.evaluate_sequences=0"]
    plans = [
        load(["train.global_batch=8", "train.micro_batch=2", *words, *more])
        for more in ([], ["train.first_batch=2", "train.batch_warmup=80"])
    ]
    histories = [live(plan) for plan in plans]
    share = plans[1].samples(100) / 800
    assert share == pytest.approx((20 + 20 * 2 + 20 * 3 + 40 * 4) / 400)
    spent = [sum(h.timeline.states().get(name, 0.0) for name in ("compute", "optimizer")) for h in histories]
    assert spent[1] / spent[0] == pytest.approx(share, rel=0.02)


def test_a_power_cap_slows_arithmetic_alone_and_bounds_the_draw():
    plan = load(["experiment=llama3_405b", "power.compute=0.95", "power.host_idle=null"])
    capped = [plan.but(power=plan.power.but(cap=watts)) for watts in (300.0, 500.0, 600.0, 669.0, 700.0)]
    clocks = [throttle(one) for one in capped]
    assert clocks == sorted(clocks) and clocks[-1] == 1.0 and throttle(plan) == 1.0
    assert clocks[1] == pytest.approx(((500 - 224) / (670 - 224)) ** (1 / 3.2))  # 0.32 and 0.95 of the way from 100 to 700 W
    slow, usual = rates(capped[1]), rates(plan)
    assert slow.rate["matmul.forward"] == pytest.approx(clocks[1] * usual.rate["matmul.forward"])
    assert slow.bandwidth == usual.bandwidth and slow.link == usual.link
    meter, free = (Meter(one, {"compute": 1.0}) for one in (capped[1], plan))
    assert free.table["compute"] - meter.table["compute"] == pytest.approx(plan.power.pue * plan.ranks * (670 - 500))
    assert free.table["bubble"] == meter.table["bubble"]


def test_an_impossible_cap_is_refused():
    with pytest.raises(Refused, match=r"power\.cap=50 W must lie above 224 W, which h100-sxm draws without arithmetic"):
        load(["experiment=llama3_405b", "power.cap=50 W"])
