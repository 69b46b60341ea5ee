"""Alignment, executed by its commands: every method and placement, what is the same in all of them, and what a kill may not take along."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.record import read, read_summary
from tests import toy, worlds
from tests.conftest import forked

RUN = ["only=align", "align.updates=2", "align.micro_batch=8", "align.group=4", "align.prompts=8", "align.slots=16"]
DIGITS = [(a, b) for a in range(10) for b in range(10) if a != b]
PAIRS = [{"prompt": f"{a}{b}=", "chosen": str(max(a, b)) * 4, "rejected": str(min(a, b)) * 4} for a, b in DIGITS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.base(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture
def questions(tmp_path):
    return toy.questions(tmp_path / "questions.jsonl")


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture
def align(foretold, base, questions, tmp_path):
    """`foretold real` of an alignment on so many ranks: its folder, and the quantities of its summary."""

    def run(*words: str, ranks: int = 1, status: int = 0) -> Any:
        common = [*toy.TASK, *RUN, f"start={base}", f"align.data={questions}", f"cluster.gpus_per_node={ranks}", "cluster.cores_per_node=1"]
        before = set((tmp_path / "runs").glob("*"))
        told, out, err = foretold("real", *common, *words)
        assert told == status, out + err
        if status:
            return out, None, err
        (home,) = set((tmp_path / "runs").glob("*")) - before or {max((tmp_path / "runs").glob("*"), key=lambda p: p.stat().st_mtime)}
        found = read_summary(home / "real")
        return home / "real" / "align", {name: q["value"] for name, q in found["quantities"].items()} if found else {}

    return run


def weights(folder):
    """Of the last checkpoint."""
    return worlds.whole(max((folder / "checkpoints").glob("step-*")))


def same(one, other, limit=0.0):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tensor.is_floating_point() and tensor.numel():
            assert float((tensor - other[name]).abs().max()) <= limit, name


GRPO = ["align=grpo", "align.steps=4"]


# -- placements


def test_in_step_all_placements_do_the_same(align):
    """Who generates makes no difference to a bit of what is learned while nobody runs ahead."""
    alone, told = align(*GRPO)
    apart, split = align(*GRPO, "align.placement=disaggregated", ranks=2)
    queued, _ = align(*GRPO, "align.placement=async", "align.staleness=0", ranks=2)
    same(weights(alone), weights(apart))
    same(weights(alone), weights(queued))
    assert told["align.staleness_max"] == split["align.staleness_max"] == 0 and told["align.reward"] == split["align.reward"]
    states = {state for row in read(apart, "ledger") if (state := row["quantity"]) in ("generate", "score", "sync", "queue", "compute")}
    assert states == {"generate", "score", "sync", "queue", "compute"}


def test_two_trainers_learn_what_one_does(align):
    """Data parallelism sums the same losses, up to rounding."""
    one, _ = align(*GRPO, "align.loss=dapo")
    two, _ = align(*GRPO, "align.loss=dapo", ranks=2)
    first = [next(row["value"] for row in read(folder, "ledger") if row["quantity"] == "gradient_norm") for folder in (one, two)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    same(weights(one), weights(two), 2e-2)  # later draws differ where rounding moves a token


@pytest.mark.slow
def test_experts_are_spread_over_trainers_and_whole_in_generators(align, tmp_path):
    """One rank and two that hold half of the experts each learn the same, and their generators get the same weights."""
    (tmp_path / "variety.py").write_text("def variety(prompt, completion, answer):\n    return len(set(completion)) / 6\n")
    mixture = ["model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=64"]
    words = [*GRPO, *mixture, f"start={toy.untaught(tmp_path / 'mixture', *mixture)}", f"align.reward={tmp_path}/variety.py:variety",
             "train.global_batch=8"]  # fmt: skip
    one, told = align(*words)
    spread, there = align(*words, "mesh.ep=2", "align.placement=disaggregated", "align.sync=sharded", ranks=4)
    first = [next(row["value"] for row in read(folder, "ledger") if row["quantity"] == "gradient_norm") for folder in (one, spread)]
    assert first[0] == pytest.approx(first[1], rel=1e-4) and first[0] > 0.01
    assert there["align.reward"] == pytest.approx(told["align.reward"], abs=0.02)
    same(weights(one), weights(spread), 2e-2)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("stale", ["pace", "discard"])
def test_a_queue_runs_ahead_and_no_further(align, stale, partial):
    words = ["align.placement=async", "align.staleness=2", f"align.stale={stale}", f"align.partial={str(partial).lower()}", "align.steps=6"]
    folder, told = align("align=grpo", *words, ranks=2)
    ages = [row["value"] for row in read(folder, "ledger") if row["quantity"] == "staleness"]
    assert len(ages) == 6 and max(ages) <= 2 and told["align.staleness_max"] == max(ages)
    shares = [told[f"align.stale_{age}"] for age in range(3)]
    assert sum(shares) == pytest.approx(1) and shares[1] + 2 * shares[2] == pytest.approx(told["align.staleness_mean"])
    versions = [
        json.loads(line)["versions"] for line in next(folder.glob("samples-*.jsonl")).read_text().splitlines() if '"versions"' in line
    ]
    assert all(sorted(one) == one for one in versions)


def test_adapters_alone_travel(align):
    words = ["align.tune=lora", "align.rank=4", "align.targets=[q_proj,v_proj]", "align.placement=disaggregated", "align.sync=adapters"]
    folder, told = align(*GRPO, *words, ranks=2)
    assert told["align.sync_bytes"] == 4 * 2 * 4 * ((64 + 64) + (64 + 32))  # fp32 × layers × rank × (inputs + outputs)
    assert set(weights(folder)) >= {"model.layers.0.self_attn.q_proj.lora_A"} and "model.norm.weight" not in weights(folder)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["per_tensor", "sharded", "delta"])
def test_every_way_to_send_weights_sends_the_same(align, sync):
    words = [*GRPO, "align.placement=disaggregated", "train.global_batch=12"]  # one trains, two generate
    whole, _ = align(*words, "align.bucket=10 kB", ranks=3)
    other, _ = align(*words, f"align.sync={sync}", ranks=3)
    same(weights(whole), weights(other))


SERVE = """
import sys
from pathlib import Path
from tests import toy
from real import huggingface
from real.model import Decoder
from real.rollout import Engine
from real.server import Server
plan, folder = toy.plan_of(), Path(sys.argv[1])
model = Decoder(plan.model)
huggingface.load(folder, plan.model, [model])
engine = Engine(model, slots=16, longest=plan.align.longest, new_tokens=plan.align.new_tokens, end=0, temperature=1.0, device="cpu")
print(Server(engine, "toy").address, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_server_elsewhere_generates_and_gets_the_weights(align, base):
    command = [sys.executable, "-c", SERVE, str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as server:
        address = server.stdout.readline().strip()
        ours, _ = align(*GRPO, "align.placement=disaggregated", ranks=2)
        theirs, told = align(*GRPO, "align.placement=disaggregated", f"align.generator={address}", ranks=2)
        server.stdin.close()
    assert told["align.staleness_max"] == 0
    same(weights(ours), weights(theirs), 1e-4)
    assert "does not answer" in align(*GRPO, "align.placement=disaggregated", f"align.generator={address}", ranks=2, status=2)[2]


# -- methods


def test_ppo_holds_a_policy_to_its_reference_with_a_critic(align):
    folder, told = align("align=ppo", "align.group=1", "align.prompts=32", "align.steps=6", "align.kl_target=0.1")
    losses = [row["value"] for row in read(folder, "ledger") if row["quantity"] == "value_loss"]
    assert len(losses) == 6 and 0 < max(losses) < 1 and told["align.kl"] >= 0
    held = weights(folder)
    assert float(held["critic.model.score.weight"].abs().max()) > 0
    assert 0 < float(held["align.coefficient"]) != pytest.approx(0.02)  # steered: the divergence is not its target


@pytest.mark.parametrize("where", ["colocated", "split_ref"])
def test_a_policy_begins_at_its_reference_at_any_temperature(align, where):
    words = ["align=grpo", "align.reference=model", "align.beta=0.1", "align.temperature=1.5", "align.steps=1", "align.updates=1"]
    _, told = align(*words, f"align.placement={where}", ranks=1 + (where == "split_ref"))
    assert told["align.kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("reference", ["model", "precomputed"])
@pytest.mark.parametrize("loss", ["sigmoid", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ipo", "hinge"))])
def test_dpo_prefers_what_was_chosen(align, pairs, loss, reference):
    words = ["align=dpo", f"align.loss={loss}", f"align.reference={reference}", "align.steps=12", "align.prompts=16", f"align.data={pairs}"]
    folder, told = align(*words, "align.held_out=0.2", "align.learning_rate=1e-3")
    first = next(row["value"] for row in read(folder, "ledger") if row["quantity"] == "loss")
    assert first == pytest.approx({"sigmoid": np.log(2), "ipo": 25.0, "hinge": 1.0}[loss], rel=1e-4)  # it begins at its reference
    assert told["align.accuracy"] > 0.7 and 0.5 < told["align.held_out_accuracy"] <= 1 and told["align.held_out_error"] >= 0


@pytest.mark.slow
def test_every_reference_says_the_same(align, pairs):
    words = ["align=dpo", "align.tune=lora", "align.rank=4", "align.steps=3", f"align.data={pairs}"]
    found = [weights(align(*words, f"align.reference={kind}")[0]) for kind in ("model", "precomputed", "adapter_off")]
    found.append(weights(align(*words, "align.placement=split_ref", ranks=2)[0]))
    for other in found[1:]:
        same(found[0], other, 1e-5)


@pytest.mark.slow
def test_a_reward_model_judges_a_policy(align, pairs):
    folder, told = align("align=reward", "align.steps=30", f"align.data={pairs}", "align.prompts=32", "align.learning_rate=1e-3")
    assert told["align.accuracy"] > 0.9
    words = [*GRPO, "align.reward=model", f"align.reward_model={folder}"]
    here, alone = align(*words)
    there, split = align(*words, "align.placement=split_ref", ranks=2)
    assert alone["align.reward"] == pytest.approx(split["align.reward"], rel=1e-3)
    same(weights(here), weights(there), 1e-4)
    words += ["align.steps=1", "train.evaluate_sequences=3"]  # which two ranks cannot share evenly
    told = [read(align(*words, ranks=ranks)[0], "ledger") for ranks in (1, 2)]
    rewards = [next(row["value"] for row in rows if row["quantity"] == "held_out_reward") for rows in told]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh"), [("grpo", "mesh.tp=2 mesh.dp_shard=2"), ("ppo", "mesh.tp=2"), ("reward", "mesh.dp_shard=1 mesh.dp_replicate=2")]
)
def test_every_mesh_learns_the_same(align, pairs, method, mesh):
    words = [f"align={method}", "align.steps=1", "align.updates=1", "align.reference=none", "align.beta=0"]
    words += [f"align.data={pairs}", "align.learning_rate=1e-3"] if method == "reward" else ["align.group=4"]
    one, _ = align(*words)
    two, _ = align(*words, *mesh.split(), ranks=4 if mesh.count("=2") == 2 else 2)
    norms = [[r["value"] for r in read(folder, "ledger") if r["quantity"] in ("gradient_norm", "loss")] for folder in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_toy_is_learned(align):
    """From bad notes to nearly always right; how nearly, the lab book has, and of more seeds."""
    words = ["align=grpo", "align.steps=80", "align.updates=4", "align.prompts=32", "align.group=8", "align.micro_batch=64", "seed=1",
             "align.loss=dapo", "align.clip_high=0.4"]  # fmt: skip
    folder, _ = align(*words, "align.slots=128")
    rewards = [row["value"] for row in read(folder, "ledger") if row["quantity"] == "reward"]
    assert rewards[0] <= 0.45 and np.mean(rewards[-10:]) >= 0.92


@pytest.mark.slow
def test_peft_and_transformers_load_what_was_aligned(align, base, foretold, tmp_path):
    """The adapters in peft and the merged model in transformers say the same; and they are not the base."""
    import transformers
    from peft import PeftModel

    words = ["align.tune=lora", "align.rank=4", "align.placement=async", "align.sync=adapters", "align.learning_rate=1e-2"]
    folder, _ = align(*GRPO, *words, ranks=2)
    common = [*toy.TASK, *RUN, *GRPO, *words, f"align.data={tmp_path / 'questions.jsonl'}", f"start={base}"]
    assert foretold("real", *common, "cluster.gpus_per_node=2", "cluster.cores_per_node=1", f"export={tmp_path / 'merged'}")[0] == 0
    ids = torch.tensor([toy.tokenizer().encode("37=7777").ids])
    kind, options = transformers.AutoModelForCausalLM, {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        before, merged = (kind.from_pretrained(path, **options)(ids).logits for path in (base, tmp_path / "merged"))
        adapted = PeftModel.from_pretrained(kind.from_pretrained(base, **options), folder / "adapter")(ids).logits
    assert float((adapted - merged).abs().max()) < 1e-4
    assert float((adapted - before).abs().max()) > 1e-2


# -- what goes wrong


def test_a_reward_that_fails_costs_its_sample(align, tmp_path):
    (tmp_path / "odd.py").write_text(
        "def reward(prompt, completion, answer):\n    if prompt.startswith('3'):\n        raise ValueError('no threes')\n    return 1.0\n"
    )
    _, told = align(*GRPO, "align.reward=odd.py:reward")
    assert told["align.failed"] > 0 and told["align.reward"] == 1.0
    (tmp_path / "odd.py").write_text("def reward(prompt, completion, answer):\n    return float('nan')\n")
    _, told = align(*GRPO, "align.reward=odd.py:reward", "seed=1")
    assert told["align.failed"] == 4 * 8 * 4 and "align.reward" not in told


def test_mistakes_are_one_line(foretold, base, questions, pairs, tmp_path):
    def refused(*words):
        status, _, err = foretold("real", *toy.TASK, *RUN, "cluster.gpus_per_node=1", *words)
        assert status == 2 and err.strip().count("\n") == 0, err
        return err

    bad = tmp_path / "bad.jsonl"
    start = f"start={base}"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    assert "line 1: chosen equals rejected" in refused("align=dpo", start, f"align.data={bad}")
    bad.write_text('\n{"prompt": "a", "chosen": "b"}\n')
    assert "line 2: rejected is missing" in refused("align=dpo", start, f"align.data={bad}")
    bad.write_text("")
    assert "is empty" in refused("align=dpo", start, f"align.data={bad}")
    assert "holds no pre-trained model" in refused("align=dpo", f"align.data={pairs}")
    assert "a line holds prompt, chosen and rejected" in refused("align=dpo", start)
    assert "leaves a role none of 1 ranks" in refused("align=grpo", start, f"align.data={questions}", "align.placement=async")
    assert "is no file" in refused("align=grpo", start, f"align.data={questions}", "align.template=nowhere.jinja")
    assert "align.reward=nobody is no reward" in refused("align=grpo", start, f"align.data={questions}", "align.reward=nobody")
    assert "align.method=none" in refused()
    assert "a reward model is trained whole" in refused("align=reward", start, f"align.data={pairs}", "align.tune=lora")
    assert "steers a penalty" in refused("align=ppo", start, f"align.data={questions}", "align.beta=0", "align.kl_target=1")
    assert "mesh.pp" in refused("align=grpo", start, f"align.data={questions}", "mesh.pp=2", "cluster.gpus_per_node=2")


@pytest.mark.parametrize("victim", ["learner", pytest.param("generator", marks=pytest.mark.slow)])
def test_a_kill_takes_no_accepted_sample_along(base, questions, tmp_path, victim):
    """A rank is killed between checkpoints: the run goes on to its end, and what was accepted is not made again."""
    words = [*toy.TASK, *RUN, "align=grpo", "align.steps=30", "align.placement=async", "align.staleness=2", f"start={base}",
             f"align.data={questions}", "cluster.gpus_per_node=2", "checkpoint.every=5", f"runs={tmp_path}/runs"]  # fmt: skip
    process = forked(["real", *words], tmp_path / "said")
    try:
        _after(tmp_path, 8)
        ranks = sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
        ranks = [pid for pid in ranks if b"real.rewards" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        journal = next(tmp_path.glob("runs/*/real/align/samples-*.jsonl"))
        os.kill(ranks[0 if victim == "learner" else 1], signal.SIGKILL)
        before = _accepted(journal)
        process.join(240)
    finally:
        process.kill()
    out = (tmp_path / "said").read_text()
    assert process.exitcode == 0, out
    assert "failed after step" in out and "are used again" in out, out
    told = read_summary(journal.parent)["quantities"]
    assert told["align.interruptions"]["value"] == 1 and 0 < told["align.goodput"]["value"] < 1
    after = _accepted(journal)
    assert before <= after and len(after) == len({(prompt, number) for prompt, number, _ in after}), "an accepted sample was made again"
    assert {(prompt, number) for prompt, number, _ in after} >= {(prompt, number) for prompt in range(30 * 8) for number in range(4)}


def _after(folder: Path, steps: int) -> None:
    """Wait until a run has done so many steps."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        rows = [row for path in folder.glob("runs/*/real/align") for row in read(path, "ledger")]
        if sum(row["quantity"] == "reward" for row in rows) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("no steps were done")


def _accepted(journal: Path) -> set[tuple[int, int, tuple[int, ...]]]:
    rows = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    return {(row["prompt"], row["number"], tuple(row["tokens"])) for row in rows if "tokens" in row}


def test_a_cut_alignment_goes_on_to_the_same_bits(align, tmp_path):
    """Stopped after a checkpoint and begun again, or never stopped: the same weights."""
    whole, _ = align("align=grpo", "align.steps=6", "checkpoint.every=3")
    kept = weights(whole)
    last = max((whole / "checkpoints").glob("step-*"))
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again, _ = align("align=grpo", "align.steps=6", "checkpoint.every=3")
    assert again == whole
    same(kept, weights(again))
    assert torch.isfinite(next(iter(kept.values()))).all()
