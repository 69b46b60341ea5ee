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


@pytest.mark.parametrize("causal", [True, False])
def test_the_ring_tile_is_the_kernel(causal):
    """Flash attention's output, log-sum-exp and gradients against plain arithmetic."""
    from real.attention import _tile, _tile_backward

    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    out, lse = _tile(q, k, v, causal, None)
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril() if causal else torch.ones(256, 256, dtype=torch.bool, device="cuda")
    exact, exact_lse = _tile(q.float(), k.float(), v.float(), causal, mask.expand(2, 4, 256, 256))
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.float(), exact_lse, atol=1e-3, rtol=1e-3)
    found = _tile_backward(grad, q, k, v, out, lse, causal, None)
    wanted = _tile_backward(grad.float(), q.float(), k.float(), v.float(), exact, exact_lse, causal, mask.expand(2, 4, 256, 256))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_gpu_trains_as_a_cpu(precision, compiled):
    """The same plan for five steps: losses within the precision."""
    import torch.distributed as dist

    from real.trainer import Trainer
    from tests.worlds import Stream, outcome, plan_of

    words = ["model=tiny_llama3", "train.seq_len=64", "train.global_batch=8", "train.micro_batch=4", "mesh.dp_shard=1", "train.warmup=1"]
    exact = outcome(plan_of(*words), 5).losses
    plan = plan_of(*words, "gpu=h200_sxm", f"train.precision={precision}", f"train.compile={compiled}")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(plan, Stream(plan), Timeline(cuda=True))  # type: ignore[arg-type]
        losses = [trainer.step(step)[0] for step in range(5)]
    finally:
        dist.destroy_process_group()
    assert losses == pytest.approx(exact, rel={"fp32": 1e-3, "bf16": 5e-3, "fp8": 1e-2}[precision])


def test_a_part_of_the_calibration_is_one(tmp_path):
    """A minute of it: every kind of row, physical numbers, and a second call that goes on where the first was cut."""
    from analysis.calibrate import table
    from analysis.gpu import fit, held_out
    from real import gpu, nvml
    from real.stopwatch import Stopwatch

    plan, watch = load(["experiment=h200"]), Stopwatch(device(load(SHAPE)))
    left = gpu.measure(plan, tmp_path, watch, limit=60.0)
    rows = table(tmp_path / gpu.TABLE)
    assert gpu.measure(plan, tmp_path, watch, limit=5.0) < left
    assert len(table(tmp_path / gpu.TABLE)) > len(rows) > 40
    kinds = {row["op"] for row in rows if row["time_us"]}
    assert kinds >= {"launch", "host", "matmul", "grouped", "attention", "swiglu", "optimizer", "copy"}
    parameters, _ = fit(plan, rows)
    assert 0.5 < parameters["gemm_efficiency"].value < 1.0 and 0.4 < parameters["memory_efficiency"].value < 1.0
    assert 0.5e-6 < parameters["launch"].value < 5e-6 < parameters["host_launch"].value < 100e-6
    assert held_out(plan, rows, parameters)["all"].median < 20
    if nvml.joules(watch.where) is not None:
        watts = {row["stage"]: float(row["watts"]) for row in rows if row["op"] == "power"}
        assert 50 < watts["idle"] < watts["products"] < 1.05 * plan.gpu.max_power
