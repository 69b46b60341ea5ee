"""What only a GPU can show: `make gpu` runs these; they never count as passed where there is none."""

import pytest
import torch

from conf.program import load
from real.cluster import device
from real.initial import initialise
from real.kernels import rows
from real.loss import loss_sum
from real.model import Decoder
from real.timeline import Timeline

pytestmark = pytest.mark.gpu
SHAPE = ["experiment=h200", "model.layers=2", "model.hidden=256", "model.heads=8", "model.ffn=512"]


def test_the_same_loss_as_on_cpu():
    plan = load(SHAPE)
    tokens = torch.randint(plan.model.vocab, (2, 129), generator=torch.Generator().manual_seed(0))
    losses = []
    for where in ("cpu", "cuda"):
        model = Decoder(plan.model).to(where)
        initialise(model, plan.seed)
        batch = tokens.to(where)
        with torch.autocast(where, torch.bfloat16, enabled=where == "cuda"):
            losses.append(float(loss_sum(model(batch[:, :-1]), batch[:, 1:]).detach()) / 256)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_states_add_up_to_the_wall_clock():
    timeline = Timeline(cuda=True)
    timeline.close()
    a = torch.randn(4096, 4096, device="cuda")
    timeline.enter("compute")
    for _ in range(20):
        a = a @ a / 64
    timeline.enter("optimizer")
    a.sum()
    seconds, states = timeline.close()
    assert sum(states.values()) == pytest.approx(seconds, rel=1e-9)
    assert states["compute"] > 0.8 * seconds


def test_operations_are_timed(tmp_path):
    plan = load([*SHAPE, "train.precision=bf16"])
    assert device(plan).type == "cuda"
    table = list(rows(plan, tmp_path))
    peak = plan.gpu.bf16_peak
    rates = [2 * r["m"] * r["n"] * r["k"] / (r["time_us"] * 1e-6) for r in table if r["op"] == "matmul" and r["stage"] == "forward"]
    assert 0.2 * peak < max(rates) < peak
    assert {r["op"] for r in table} >= {"matmul", "attention", "norm", "swiglu", "loss", "optimizer", "launch"}
