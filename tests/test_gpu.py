"""What only a GPU can show: `make gpu-test` runs these; they never count as passed where there is none."""

import json
import math
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.program import load
from real import checkpoint, nf4, nvml
from real.cluster import device
from real.initial import initialise
from real.kernels import rows
from real.learner import Network, Rows, rows_of
from real.loss import loss_sum
from real.model import Decoder
from real.optim import local
from real.parallel import Axes
from real.rollout import Engine, Request
from real.sync import bits_of
from real.timeline import Timeline
from real.trainer import Trainer
from tests.kit import execute
from tests.kit.plans import plan_of as plan_of_row
from tests.kit.plans import rows as rows_of_plans
from tests.worlds import Stream, plan_of

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


TRAIN = ["train.seq_len=64", "train.global_batch=8", "train.micro_batch=4", "mesh.dp_shard=1", "train.warmup=1"]
ON_GPU = ["gpu=h200_sxm", "train.precision=bf16"]


@contextmanager
def world():  # type: ignore[no-untyped-def]
    """A process group of this process alone. Nothing is forked here: a fork of a process that has used a GPU cannot train."""
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def losses(plan, steps=5, adapters=False):  # type: ignore[no-untyped-def]
    """Of steps on the same sequences again and again, which are soon learned."""
    with world():
        trainer = Trainer(plan, Stream(plan, 8), Timeline(plan.gpu.kind == "cuda"), adapters=adapters)
        return [trainer.step(step)[0] for step in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_gpu_trains_as_a_cpu(precision, compiled):
    """The same plan for five steps: losses within the precision."""
    words = ["model=tiny_llama3", *TRAIN]
    found = losses(plan_of(*words, "gpu=h200_sxm", f"train.precision={precision}", f"train.compile={compiled}"))
    assert found == pytest.approx(losses(plan_of(*words)), rel={"fp32": 1e-3, "bf16": 5e-3, "fp8": 1e-2}[precision])


@pytest.mark.parametrize(
    "words",
    [
        "model=tiny_qwen3_moe",
        "model=tiny_qwen3_moe train.compile=true",
        "model=tiny_qwen3_moe train.recompute=selective",
        "model=tiny_deepseek_v3",
        "model=tiny_llama3 train.recompute=selective train.compile=true",
        "model=tiny_llama3 train.recompute=full",
        "model=tiny_llama3 train.document_mask=true",
        "model=tiny_llama3 train.optimizer=muon",
    ],
)
def test_and_so_does_every_kind_of_model(words):
    """Experts by the grouped product, latent attention, blocks computed again, masks between documents."""
    plain = [word for word in words.split() if "compile" not in word and "recompute" not in word]
    found = losses(plan_of(*words.split(), *TRAIN, *ON_GPU))
    assert found == pytest.approx(losses(plan_of(*plain, *TRAIN)), rel=1e-2)


def test_adam_with_moments_in_eight_bits():
    pytest.importorskip("torchao")
    words = ["model=tiny_llama3", "model.hidden=256", "model.heads=8", "model.kv_heads=4", "model.ffn=512", *TRAIN]
    exact = losses(plan_of(*words, *ON_GPU))
    found = losses(plan_of(*words, *ON_GPU, "train.optimizer=adamw8bit"))
    assert found[0] == pytest.approx(exact[0], rel=1e-3) and found == pytest.approx(exact, rel=2e-2)


TUNED = ["finetune.data=digits", "finetune.seq_len=64", "finetune.global_batch=8", "finetune.micro_batch=4", "finetune.warmup=1",
         "finetune.learning_rate=1e-2"]  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_trained_as_on_a_cpu(method):
    words = ["model=tiny_llama3", *TRAIN, f"finetune={method}", *TUNED]
    found, exact = (losses(plan_of(*words, *more).tuned, 8, adapters=True) for more in (ON_GPU, ()))
    assert found == pytest.approx(exact, rel=1e-2) and found[-1] < 0.97 * found[0]


def test_four_bits_are_those_of_a_cpu():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    here, there = (nf4.dequantise(nf4.quantise(weight.to(where)), (256, 512), torch.float32).cpu() for where in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-3)


def test_without_its_adapters_a_network_is_its_base():
    plan = plan_of("model=tiny_llama3", *TRAIN, *ON_GPU, "align=dpo", "align.data=digits", "align.tune=lora").aligned
    with world():
        timeline = Timeline(cuda=True)
        network = Network(plan, Axes(plan, timeline), timeline, None, adapters=True, rate=1e-3)
        tokens = torch.randint(512, (8, 33), generator=torch.Generator().manual_seed(1))
        rows = network.mine(Rows(tokens, torch.ones(8, 32)))
        base = network.asked(network.logp, rows, "score")
        for name, parameter in network.model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(local(parameter.detach()))
        adapted = network.asked(network.logp, rows, "score")
        with network.unadapted():
            again = network.asked(network.logp, rows, "score")
    assert torch.equal(base, again) and (adapted - base).abs().max() > 0.1


def test_an_engine_says_what_the_trainer_says():
    """Log-probabilities of tokens when they were drawn, from a cache, and of the same rows in a pass of the trainer."""
    plan = plan_of("model=tiny_llama3", *TRAIN, *ON_GPU, "align=grpo", "align.data=digits", "align.reward=digits",
                   "align.prompt_tokens=16", "align.new_tokens=48").aligned  # fmt: skip
    model = Decoder(plan.model)
    initialise(model, plan.seed)
    model = model.to("cuda", torch.bfloat16).requires_grad_(False).eval()
    engine = Engine(model, slots=8, longest=64, new_tokens=48, end=-1, temperature=1.0, device="cuda")
    engine.submit(Request(i, 0, tuple(range(3 * i, 5 * i + 4)), i) for i in range(6))
    samples = engine.run()
    assert [len(sample.tokens) for sample in samples] == [48] * 6
    ids = [[*sample.request.ids, *sample.tokens] for sample in samples]
    rows = rows_of(ids, [np.arange(len(row)) >= len(row) - 48 for row in ids], 8)
    with world():
        timeline = Timeline(cuda=True)
        network = Network(plan, Axes(plan, timeline), timeline, None)
        found = network.asked(network.logp, rows.to(torch.device("cuda")), "score").cpu()
    told = torch.tensor([sample.logp for sample in samples])
    error = (found[rows.mask > 0].view(6, 48) - told).abs()
    assert error.mean() < 1e-2 and error.max() < 0.1


@pytest.mark.parametrize("line", ["nano 64 4x2 bf16 none dpo", "nano 32 8x2 bf16 none grpo", "nano 64 4x2 bf16 none compile beside"])
def test_the_kit_executes(line, tmp_path):
    """An alignment's steps, and baselines beside a training, in the runner of make gpu-compare."""
    row = rows_of_plans(line, "experiment=h200 train.warmup=2")[0]
    found = execute.one(row, plan_of_row(row), tmp_path, 5)
    assert found["status"] == "done" and found["finite"] and 0 < found["memory"] <= found["reserved"]
    if "dpo" in line:
        assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-2)
    if "beside" in line:
        assert found["falls"] and found["by_hand_tokens_per_s"] > 0


def test_checksums_are_those_of_a_cpu():
    tensor = torch.randn(1 << 25).bfloat16()
    assert bits_of(tensor.cuda()) == bits_of(tensor)


def test_a_checkpoint_beside_the_training_holds_what_was_there_when_it_was_asked_for(tmp_path):
    plan = plan_of("model=tiny_llama3", *TRAIN, *ON_GPU, "checkpoint.asynchronous=true")
    with world():
        trainer = Trainer(plan, Stream(plan), Timeline(cuda=True))
        trainer.step(0)
        writer = checkpoint.Writer(tmp_path, plan)
        before = torch.cuda.memory_allocated()
        writer.save(checkpoint.state(trainer.parts, trainer.optimizer), 1)
        assert torch.cuda.memory_allocated() <= before + 2**20  # the copy is the host's
        kept = {name: local(p.detach()).clone() for name, p in trainer.parts[0].named_parameters()}
        trainer.step(1)
        writer.finish()
        checkpoint.load(checkpoint.complete(tmp_path)[-1], trainer.parts, trainer.optimizer, 1)
        for name, parameter in trainer.parts[0].named_parameters():
            assert torch.equal(local(parameter.detach()), kept[name]), name


def test_the_driver_counts_energy():
    where = torch.device("cuda", 0)
    if (before := nvml.joules(where)) is None:
        pytest.skip("the driver's library does not tell of energy here")
    a, began = torch.randn(8192, 8192, device=where, dtype=torch.bfloat16), time.perf_counter()
    while time.perf_counter() - began < 1.0:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    drawn = (nvml.joules(where) or 0.0) - before
    assert 50 < drawn / (time.perf_counter() - began) < 1500
    assert 20 < (nvml.watts(where) or 0.0) < 1500


def test_a_command_from_text_to_an_aligned_model(foretold, tiny):
    """Ranks on GPUs are spawned: data stages, pre-training, QLoRA, GRPO, each with its record."""
    tune = ["finetune=qlora", "finetune.template=bare", *TUNED, "finetune.steps=4"]
    align = ["align=grpo", "align.data=digits", "align.template=bare", "align.reward=digits", "align.tune=lora", "align.sync=adapters",
             "align.steps=2", "align.warmup=1", "align.prompts=2",
             "align.prompt_tokens=8", "align.new_tokens=8", "align.slots=16"]  # fmt: skip
    words = [*tiny, "cluster=one_gpu", *ON_GPU, *tune, *align]
    status, out, err = foretold("real", "json=true", *words)
    assert status == 0, err
    told = json.loads(out)["quantities"]
    assert {"pretrain.step_time", "pretrain.peak_memory", "finetune.step_time", "align.step_time"} <= set(told)


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
    assert kinds >= {"launch", "host", "matmul", "grouped", "attention", "swiglu", "optimizer", "copy", "decode"}
    parameters, _ = fit(plan, rows)
    assert 0.5 < parameters["gemm_efficiency"].value < 1.0 and 0.4 < parameters["memory_efficiency"].value < 1.0
    assert 0.5e-6 < parameters["launch"].value < 5e-6 < parameters["host_launch"].value < 100e-6
    assert held_out(plan, rows, parameters)["all"].median < 20
    if nvml.joules(watch.where) is not None:
        watts = {row["stage"]: float(row["watts"]) for row in rows if row["op"] == "power"}
        assert 50 < watts["idle"] < watts["products"] < 1.05 * plan.gpu.max_power
