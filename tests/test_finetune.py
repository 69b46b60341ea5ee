"""Fine-tuning: what is learned of a conversation, adapters on every mesh, and what peft and transformers make of them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conf.arithmetic import adapter_parameters, flops_per_token, tuned_flops_per_token
from conf.corpus import LINES
from conf.errors import Refused
from conf.program import load, main
from conf.record import read
from real import adapters, chats, checkpoint, huggingface, nf4
from real.adapters import Adapted, adapt
from real.chats import Template, conversation
from real.data import Chats, batch_of
from real.initial import initialise
from real.layers import Linear
from real.loss import IGNORED
from real.model import Decoder
from real.optim import Optimizer
from real.parallel import refuse_unbuilt
from sim.finetune import finetune
from sim.pace import pace
from tests.conftest import TINY, forked
from tests.worlds import Outcome, outcome, plan_of

ROOT = Path(__file__).parents[1]
CHATS = [
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat sees"},
                  {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "and then"},
                  {"role": "assistant", "content": "the moon"}]},
    {"prompt": "the sun", "completion": "runs"},
    {"question": "red or blue", "answer": "both"},
    {"history": [["prompter", "walk"], ["assistant", "under"], ["prompter", "over"]], "response": "with"},
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- conversations


@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_only_what_the_assistant_says_is_learned(name):
    for row in CHATS:
        messages = conversation(json.dumps(row))
        pieces = Template(name).pieces(messages)
        learned = "".join(text for text, wanted in pieces if wanted)
        rest = "".join(text for text, wanted in pieces if not wanted)
        for message in messages:
            mine, other = (learned, rest) if message["role"] == "assistant" else (rest, learned)
            assert message["content"] in mine and (message["content"] not in other)
        assert "".join(text for text, _ in pieces) == Template(name).render(messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_templates_render_as_transformers_has_them(name):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    messages = conversation(json.dumps(CHATS[0]))
    theirs = _compile_jinja_template(chats.TEMPLATES[name]).render(messages=messages, add_generation_prompt=True)
    assert Template(name).render(messages, answer=True) == theirs


BAD_LINES = [
    ("{", "it is no JSON"), ("[]", "it is no object"), ('{"text": "a"}', "it has text; messages, or prompt and completion"),
    ('{"messages": [{"role": "user"}]}', "message 1 has no role and content"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant says anything"),
    ('{"prompt": "a", "completion": ""}', "no assistant says anything"), ('{"prompt": "a", "completion": 3}', "message 2 has no role"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_line_says_what_is_missing(line, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        conversation(line)


def test_a_template_that_cannot_be_learned_from(tmp_path):
    """One that counts the messages ahead changes what was there before."""
    path = tmp_path / "counting.jinja"
    path.write_text("{{ messages | length }} messages\n{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="changes the text before it"):
        Template(str(path)).pieces(conversation(json.dumps(CHATS[0])))
    path.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}")
    with pytest.raises(ValueError, match="refuses it: no system message"):
        Template(str(path)).pieces(conversation(json.dumps(CHATS[0])))
    path.write_text("a table, not a template")
    with pytest.raises(ValueError, match="leaves out what message 3 says"):
        Template(str(path)).pieces(conversation(json.dumps(CHATS[0])))
    path.write_text("{% for %}")
    with pytest.raises(Refused, match="is no template"):
        Template(str(path))


# -- the run


ONE = ("train.steps=1", "train.warmup=0")
TUNE = ("finetune=lora", "finetune.steps=6", "finetune.seq_len=32", "finetune.global_batch=4", "finetune.micro_batch=2",
        "finetune.warmup=1", "finetune.held_out=0.3", "finetune.rank=4", "finetune.targets=[q_proj,v_proj,down_proj]")  # fmt: skip


@pytest.fixture
def talks(tmp_path):
    words = ["cat", "dog", "sun", "moon", "red", "blue"]
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a} " * 3} for a in words for b in words for _ in range(2)]
    return write(tmp_path / "talks.jsonl", [*CHATS, *rows])


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    """A run of one step, for fine-tunings to begin with."""
    runs = tmp_path_factory.mktemp("pretrained")
    assert main(["real", *TINY, *ONE, f"data.path={corpus}", f"runs={runs}"]) == 0
    return next(runs.glob("*/real"))


def test_a_run_ends_with_adapters_that_are_read_back(tmp_path, tiny, foretold, talks):
    """Pre-training, then adapters; killed between, it goes on; peft's names and shapes; sharded as the whole."""
    words = [*tiny, *TUNE, f"finetune.data={talks}"]
    status, out, err = foretold("real", *words, "checkpoint.every=2")
    assert status == 0, err
    assert "adapters:" in out and "finetune.step_time" in out
    home = next((tmp_path / "runs").iterdir()) / "real"
    told = json.loads((home / "summary.json").read_text())["quantities"]
    model = load(words).model
    each = 4 * (2 * model.hidden + model.heads * model.head_dim + model.kv_heads * model.head_dim + model.ffn + model.hidden)
    assert told["finetune.parameters"]["value"] == model.layers * each
    assert set(checkpoint.shapes(checkpoint.complete(home / "finetune" / "checkpoints")[-1])) & {"model.norm.weight"} == set()
    status, out, err = foretold("real", *words, "checkpoint.every=2", "export=merged")
    assert status == 0 and "step-00000006" in out and (tmp_path / "merged" / "model.safetensors").is_file(), err
    again = foretold("real", *words, "checkpoint.every=2", "only=finetune")
    assert again[0] == 0 and "resumed" not in again[1].replace("resumed from step-00000006", "")


def test_windows_hold_whole_conversations_and_their_masks(tmp_path, tiny, foretold, talks, pretrained):
    status, _, err = foretold("real", *tiny, *TUNE, f"finetune.data={talks}", *ONE, "only=finetune", f"start={pretrained}")
    assert status == 0, err
    home = next((tmp_path / "runs").iterdir()) / "real"
    from tokenizers import Tokenizer

    coder = Tokenizer.from_file(str(pretrained / "tokens" / "tokenizer.json"))
    tokens = Chats(home / "finetune" / "tokens", "train", 32)
    batch = batch_of(tokens, range(len(tokens)), document_mask=True)
    learned = [coder.decode(row[row != IGNORED].tolist()) for row in batch.targets]
    assert all("User" not in text and "Assistant" not in text for text in learned)
    assert sum(text.count("cat dog") for text in learned) > 0
    inputs = np.concatenate([tokens.window(i)[:-1] for i in range(len(tokens))])
    assert "User" in coder.decode(inputs.tolist())


@pytest.mark.parametrize(("change", "words"), [
    (["finetune.data=/nowhere.jsonl"], "is no file; name JSON Lines, a line holds messages"),
    (["finetune.template=chatm"], "finetune.template=chatm is no file"),
    (["finetune.targets=[q_prj]"], "targets=[q_prj] names q_prj, which is no matrix of a block here; did you mean q_proj"),
    (["finetune.method=lor"], "finetune.method=lor is not known; did you mean lora"),
    (["finetune.global_batch=4000"], "a step takes finetune.global_batch=4000"), (["finetune.rank=0"], "finetune.rank=0 must be above 0"),
    (["finetune.micro_batch=3"], "finetune.global_batch=4"),
])  # fmt: skip
def test_bad_input_is_one_line(tiny, foretold, talks, pretrained, change, words):
    start = ["only=finetune", f"start={pretrained}"]
    status, _, err = foretold("real", *tiny, *ONE, *TUNE, *start, f"finetune.data={talks}", *change)
    assert status == 2 and words in err, err
    assert err.strip().count("\n") == 0, err


def test_bad_files_are_one_line(tmp_path, tiny, foretold, talks, pretrained):
    common, alone = [*tiny, *ONE, *TUNE, "only=finetune", f"start={pretrained}"], [*tiny, *ONE, *TUNE, "only=finetune"]
    empty = write(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl is empty" in foretold("real", *common, f"finetune.data={empty}")[2]
    bad = write(tmp_path / "bad.jsonl", [*CHATS, {"text": "no"}])
    status, _, err = foretold("real", *common, f"finetune.data={bad}")
    assert status == 2 and f"{bad}, line 5: it has text" in err and err.strip().count("\n") == 0
    status, _, err = foretold("real", *alone, f"finetune.data={talks}", "seed=9")
    assert status == 2 and "holds no pre-trained model to fine-tune" in err
    home = foretold("real", *common, f"finetune.data={talks}")[0] == 0 and next((tmp_path / "runs").glob("*/real/finetune/adapter")).parent
    (home / "base").write_text("/another")
    status, _, err = foretold("real", *common, f"finetune.data={talks}")
    assert status == 2 and "was begun on /another, this is" in err and err.strip().count("\n") == 0
    status, _, err = foretold("real", *tiny, *ONE, "only=finetune")
    assert status == 2 and "only=finetune, but finetune.method=none" in err and err.strip().count("\n") == 0


def test_replicas_that_restart_alone_are_refused():
    plan = load(["finetune=lora", "failures.restart=replica"], rules=lambda _: [])
    with pytest.raises(Refused, match="fine-tuning where replicas restart alone: real cannot execute it"):
        refuse_unbuilt(plan)


def losses(home):
    rows = read(home / "finetune", "ledger")
    return {row["step"]: row["value"] for row in rows if row["quantity"] == "loss"}


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path, tiny, talks, foretold):
    """SIGKILL of all processes within the fine-tuning; the same command goes on, base and adapters as they were."""
    words = [*tiny, *ONE, *TUNE, f"finetune.data={talks}", "checkpoint.every=2", "finetune.steps=12", "runs=killed"]
    process = forked(["real", *words], tmp_path / "said.txt")
    try:
        while process.is_alive() and not list(tmp_path.glob("killed/*/real/finetune/checkpoints/step-00000004/manifest.json")):
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    for run in ("killed", "whole"):
        assert foretold("real", *words[:-1], f"runs={run}")[0] == 0
    killed, whole = (next((tmp_path / run).iterdir()) / "real" for run in ("killed", "whole"))
    one, other = ({step: loss for step, loss in losses(home).items() if step > 4} for home in (killed, whole))
    assert one == other and len(one) == 8  # what was not yet flushed of the steps before died with the process
    one, other = (load_file(home / "finetune" / "adapter" / "adapter_model.safetensors") for home in (killed, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_under_torchrun_it_is_the_same(tmp_path, tiny, talks):
    words = [*tiny, *ONE, *TUNE, f"finetune.data={talks}"]
    own = [sys.executable, "-m", "real"]
    other = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "real"]
    for name, command in (("own", own), ("torchrun", other)):
        subprocess.run([*command, *words, f"runs={name}"], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                       capture_output=True)  # fmt: skip
    assert losses(next((tmp_path / "own").iterdir()) / "real") == losses(next((tmp_path / "torchrun").iterdir()) / "real")


def test_a_base_of_another_model_is_refused(tiny, foretold, talks, pretrained):
    words = [*tiny, *TUNE, f"finetune.data={talks}", "only=finetune", f"start={pretrained}"]
    status, _, err = foretold("real", *words, "model.hidden=64")
    assert status == 2 and "is of another model" in err and "lora" not in err
    status, out, err = foretold("real", *words, "finetune.method=full")
    assert status == 0 and "finetune.final_loss" in out, err


# -- foretold


def test_what_adapters_take_is_their_own(tmp_path, tiny):
    """No factor for them: with every narrower adapter time and memory come nearer to those of a frozen model; less than full training."""
    common = ["experiment=llama3_8b", "finetune.global_batch=4096", "finetune.seq_len=4096"]
    frozen, full = load(["experiment=llama3_8b"]), load([*common, "finetune=full"])
    ranks = [load([*common, "finetune=lora", f"finetune.rank={rank}"]) for rank in (8, 64, 512)]
    times, sizes = zip(*((one.step_time, one.memory) for one in (pace(plan.tuned, adapters=True) for plan in ranks)), strict=True)
    assert times[0] < times[1] < times[2] and sizes[0] < sizes[1] < sizes[2] < pace(full.tuned).memory
    assert times[0] < pace(full.tuned).step_time
    assert frozen.id == load(["experiment=llama3_8b"]).id and "finetune.step_time" not in finetune(frozen)


LARGE = ("experiment=llama3_8b", "finetune=lora", "finetune.global_batch=4096", "finetune.seq_len=4096")


def stage(*words):
    return finetune(load([*LARGE, *words]))


def test_energy_is_power_over_the_stage():
    """By the meter of pre-training: twice the steps, so much more of both; owned devices are paid by wear and electricity."""
    one, two, three = (stage(f"finetune.steps={steps}", "train.evaluate_every=0", "checkpoint.every=0") for steps in (200, 400, 600))
    assert all(told["energy"] == pytest.approx(told["mean_power"] * told["seconds"]) for told in (one, two))
    assert three["energy"] - two["energy"] == pytest.approx(two["energy"] - one["energy"], rel=1e-9)
    plan = load(LARGE)
    watts = (two["energy"] - one["energy"]) / (two["seconds"] - one["seconds"]) / plan.power.pue / plan.ranks
    assert plan.gpu.idle_power < watts < plan.gpu.max_power + (plan.power.host + plan.power.network) / plan.cluster.gpus_per_node
    rented, owned = stage(), stage("price.owned=true")
    price, hours = plan.price, rented["seconds"] / 3600 * (plan.ranks + plan.cluster.spares * plan.cluster.gpus_per_node)
    assert rented["cost"] == pytest.approx(price.gpu_hours[plan.gpu.name].mid * hours)
    worn = price.capex[plan.gpu.name] / price.lifetime * hours * 3600
    assert owned["cost"] == pytest.approx(worn + price.tariff.mid * owned["energy"]) and owned["energy"] == rented["energy"]
    assert rented["carbon_location"] > 0 and stage("power.pue=2")["energy"] > 1.5 * rented["energy"]


def test_conversations_take_their_time(tmp_path):
    """Bytes a worker at the tokenizer's rate, rounds of tasks for a long file; few that are held out are soon evaluated."""
    plan = load(["finetune=lora"])
    base = finetune(plan)["seconds"]

    def more(lines, length):
        path = tmp_path / f"{lines}.jsonl"
        path.write_text(("x" * (length - 1) + "\n") * lines)
        return finetune(load(["finetune=lora", f"finetune.data={path}"]))["seconds"] - base

    rate, whole = plan.tokenizer.encode_rate, LINES * plan.finetune.held_out > plan.train.evaluate_sequences
    one, two, three = more(LINES, 100), more(LINES, 200), more(3 * LINES, 100)
    assert whole and plan.ranks == 2 and two - one == pytest.approx(LINES * 100 / rate) == pytest.approx(three - one)
    few = more(40, 100)
    assert few < one - LINES * 100 / rate


def test_a_checkpoint_of_adapters_is_small():
    """Weights and two moments in fp32 of the adapters alone, written to a storage that is slow."""
    words = ["checkpoint.asynchronous=false", "cluster.storage_write='1 GB/s'"]
    often, once = (stage(*words, "finetune.steps=200", f"checkpoint.every={every}")["seconds"] for every in (100, 200))
    plan = load(LARGE)
    count = adapter_parameters(plan.model, plan.finetune.targets, plan.finetune.rank)
    assert often - once == pytest.approx(12 * count / 1e9, rel=0.01)


def test_flops_of_adapters():
    """Four a frozen parameter and token and six an adapter's, against six: 0.67 of full training for a narrow one."""
    model = load(["model=llama3_8b"]).model
    whole = flops_per_token(model, 1)
    assert tuned_flops_per_token(model, 1, 0) / whole == pytest.approx(2 / 3, rel=1e-3)
    assert tuned_flops_per_token(model, 1, 1e9) - tuned_flops_per_token(model, 1, 0) == pytest.approx(6e9)


@pytest.mark.parametrize("name", ["llama3_8b", "tiny_qwen3_moe", "tiny_deepseek_v3"])
def test_their_parameters_are_counted_alike_by_both(name):
    targets = ["q_proj", "o_proj", "kv_b_proj", "up_proj", "down_proj"] if "deepseek" in name else ["q_proj", "v_proj", "o_proj"]
    plan = load([f"model={name}", "finetune=lora", f"finetune.targets=[{','.join(targets)}]"], rules=lambda _: [])
    with torch.device("meta"):
        model = Decoder(plan.model)
    held = {path.split(".")[-1] for path, module in model.layers.named_modules() if isinstance(module, Linear)}
    tune = dataclasses.replace(plan.finetune, targets=[target for target in targets if target in held])
    adapt(model, dataclasses.replace(plan, finetune=tune))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter_parameters(plan.model, tune.targets, tune.rank)


# -- adapters


COMMON = ("train.seq_len=32", "train.global_batch=8", "train.micro_batch=2", "train.epsilon=1e-6", "train.learning_rate=0.001",
          "train.warmup=1", "finetune=lora", "finetune.rank=4", "finetune.micro_batch=1")  # fmt: skip


def tuned(*words):
    return plan_of("model=tiny_llama3", *COMMON, *words)


def test_parameters_are_exact():
    """Llama 3.2 3B with rank 32 on q and v: 9,175,040 (PEFT's own count)."""
    shape = {"layers": 28, "hidden": 3072, "heads": 24, "kv_heads": 8, "ffn": 8192}
    plan = plan_of("model=llama3_8b", *(f"model.{key}={value}" for key, value in shape.items()), "mesh.dp_shard=1", "finetune=lora",
                   "finetune.rank=32", "finetune.targets=[q_proj,v_proj]")  # fmt: skip
    with torch.device("meta"):
        model = Decoder(plan.model)
    adapt(model, plan)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9_175_040


def test_a_new_adapter_changes_nothing_and_can_be_turned_off():
    plan = tuned("mesh.dp_shard=1")
    base, model = Decoder(plan.model), Decoder(plan.model)
    initialise(base, 3)
    adapt(model, plan)
    initialise(model, 3)
    tokens = torch.randint(512, (2, 32))
    assert torch.equal(base(tokens), model(tokens))
    for module in model.modules():
        if isinstance(module, Adapted):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    assert not torch.allclose(base(tokens), model(tokens))
    for module in model.modules():
        if isinstance(module, Adapted):
            module.active = False
    assert torch.equal(base(tokens), model(tokens))


@cache
def alone(model: str) -> Outcome:
    return outcome(tuned("mesh.dp_shard=1", *model.split()), adapters=True)


MESHES = [
    ("", "mesh.dp_shard=2"), ("", "mesh.tp=2"), ("", "mesh.pp=2"), ("", "mesh.cp=2"), ("", "mesh.dp_shard=4"),
    ("", "mesh.dp_replicate=2 mesh.tp=2"), ("", "mesh.dp_shard=2 mesh.tp=2 mesh.pp=2"), ("model.tied=true", "mesh.pp=2"),
    ("train.recompute=full", "mesh.dp_shard=2"), ("model=tiny_qwen3_moe finetune.targets=[q_proj,o_proj]", "mesh.dp_shard=2 mesh.ep=2"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "mesh"), [pytest.param(*m, marks=() if i < 3 else pytest.mark.slow) for i, m in enumerate(MESHES)])
def test_adapters_train_alike_on_every_mesh(model, mesh):
    words = [*([] if "dp_shard" in mesh else ["mesh.dp_shard=1"]), *mesh.split()]
    one, other = alone(model), outcome(tuned(*words, *model.split()), adapters=True)
    assert one.weights.keys() == other.weights.keys() and all("lora" in name for name in one.weights if name.startswith("model."))
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(other.norms, one.norms, rtol=1e-5)
    for name, weight in one.weights.items():
        if name.startswith("model."):
            # B begins at zero: all of it is what AdamW makes of gradients, the smallest included.
            assert weight.any() and (other.weights[name] - weight).norm() <= 3e-4 * weight.norm(), name


QUANTISED = [
    ("", "mesh.dp_shard=2"), ("", "mesh.pp=2"), ("", "mesh.dp_shard=2 mesh.pp=2"), ("", "mesh.cp=2"),
    ("model=tiny_qwen3_moe finetune.targets=[q_proj,o_proj]", "mesh.dp_shard=2 mesh.ep=2"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "mesh"), [pytest.param(*m, marks=() if i < 1 else pytest.mark.slow) for i, m in enumerate(QUANTISED)])
def test_four_bits_train_alike_on_every_mesh(model, mesh):
    """The same bytes wherever they lie: as near as in full precision."""
    test_adapters_train_alike_on_every_mesh(f"finetune.method=qlora {model}", mesh)


@pytest.mark.slow
def test_four_bits_cut_over_tensor_parallel_ranks():
    """Each rank groups the scales of its own part: the base differs in their eighth bit, and losses by as little."""
    one = alone("finetune.method=qlora")
    other = outcome(tuned("mesh.dp_shard=2", "mesh.tp=2", "finetune.method=qlora"), adapters=True)
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-3)
    plain = alone("")
    assert max(abs(a / b - 1) for a, b in zip(one.losses, plain.losses, strict=True)) > 1e-5  # four bits are seen


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_half_precision_is_near(method):
    """Frozen weights in bf16 or four bits, adapters in fp32; bytes travel as bf16 does."""
    words = (f"finetune.method={method}", "train.precision=bf16", "gpu.bf16_peak='10 GFLOP/s'")
    one, other = alone(words[0]), outcome(tuned("mesh.dp_shard=2", *words), adapters=True)
    np.testing.assert_allclose(other.losses, one.losses, rtol=5e-3)
    assert all(weight.dtype == torch.float32 for weight in other.weights.values())


# -- four bits


def test_four_bits():
    """4.127 bits a number; a normal matrix is 9.2% off (QLoRA's own figure: notes of bitsandbytes); zeros stay zeros."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    told = nf4.quantise(weight)
    again = nf4.dequantise(told, (512, 512), torch.float32)
    assert 8 * len(told) / weight.numel() == pytest.approx(4.127, abs=1e-3)
    assert float((again - weight).norm() / weight.norm()) == pytest.approx(0.092, abs=0.002)
    assert (again.sign() * weight.sign() >= 0).all()
    assert not nf4.dequantise(nf4.quantise(torch.zeros(64, 64)), (64, 64), torch.float32).any()
    twice = nf4.quantise(again)
    assert torch.equal(twice[: weight.numel() // 2], told[: weight.numel() // 2])


@pytest.mark.slow
def test_four_bits_are_those_of_bitsandbytes():
    """Every code; and every number where the scale's eighth bits are alike: its search on a CPU is not always the nearest step."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape, std in (((512, 512), 0.02), ((96, 128), 1.0), ((1024, 320), 0.5)):
        weight = std * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        told, half, scales = nf4.quantise(weight), weight.numel() // 2, weight.numel() // 64
        assert torch.equal(codes.flatten(), told[:half])
        same = told[half : half + scales] == state.absmax
        assert same.float().mean() > 0.99
        ours, theirs = nf4.dequantise(told, shape, torch.float32), functional.dequantize_4bit(codes, state)
        torch.testing.assert_close(ours.view(-1, 64)[same], theirs.view(-1, 64)[same], rtol=1e-6, atol=1e-7 * std)


def tuned_checkpoint(tmp_path, words=()):
    """A base as Hugging Face's folder, and a checkpoint of adapters that do something."""
    plan = tuned("mesh.dp_shard=1", *words)
    base = Decoder(plan.model)
    initialise(base, 3)
    writer = checkpoint.Writer(tmp_path / "base", plan)
    writer.save(checkpoint.state([base], Optimizer([base], plan.train)), 0)
    huggingface.export(tmp_path / "base" / "step-00000000", plan.model, 32, tmp_path / "hf", None)
    model = Decoder(plan.model)
    adapt(model, plan)
    initialise(model, 3)
    adapters.fill(model, lambda name, _: base.get_parameter(name).detach(), 0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    checkpoint.Writer(tmp_path / "tuned", plan.tuned).save(checkpoint.state([model], Optimizer([model], plan.train)), 0)
    return plan, model.eval(), tmp_path / "tuned" / "step-00000000"


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("model=tiny_qwen3",), ("model.tied=true",), ("finetune.method=qlora",)])
def test_peft_and_transformers_load_them(tmp_path, words):
    """Adapters in peft within 1e-5, the merged model in transformers within 1e-4; both from a checkpoint and from a folder of weights."""
    import transformers
    from peft import PeftModel

    plan, model, path = tuned_checkpoint(tmp_path, words)
    count = adapters.save(path, plan, tmp_path / "hf", tmp_path / "adapter")
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours = model(tokens)
        adapted = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(tokens).logits
        if plan.finetune.method == "lora":  # peft's base is not in four bits here
            torch.testing.assert_close(adapted, ours, atol=1e-5, rtol=1e-5)
        for number, base in enumerate((tmp_path / "hf", tmp_path / "base" / "step-00000000")):
            adapters.merge(path, plan, base, tmp_path / f"merged{number}", None)
            merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}", dtype=torch.float32,
                                                                       attn_implementation="eager").eval()  # fmt: skip
            torch.testing.assert_close(merged(tokens).logits, ours, atol=1e-4, rtol=1e-4)
