"""Whole runs through the program: large meshes on small machines, resumed on others, exported, compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conf.record import read
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
WORDS = [
    *TINY, "train.steps=20", "train.global_batch=8", "train.micro_batch=1", "checkpoint.every=10", "checkpoint.keep=3",
    "train.evaluate_every=10", "cluster.cores_per_node=2", "model.layers=4", "train.epsilon=1e-6",
]  # fmt: skip
MOE = ["model.moe.experts=8", "model.moe.top_k=2", "model.moe.ffn=64", "model.moe.balance=loss", "model.tied=false", "model.qk_norm=true"]


def foretold(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-20000:]  # all ranks tell, the first to fall first
    return done.stdout


def losses(run: Path, quantity: str = "loss") -> dict[int, float]:
    return {r["step"]: r["value"] for r in read(run, "ledger") if r["quantity"] == quantity and r["stage"] == "pretrain"}


def run(tmp_path: Path, words: list[str], *options: str) -> Path:
    """A plan predicted, executed and compared; its record."""
    runs = tmp_path / "-".join(w.replace("mesh.", "").replace("=", "") for w in words if w.startswith("mesh."))
    foretold("sim", f"runs={runs}", *words)
    foretold("real", f"runs={runs}", *options, *words)
    told = foretold("analysis", "compare", f"runs={runs}")
    assert {"pretrain.step_time", "pretrain.peak_memory", "compute", "communication", "sum"} <= {
        line.split()[0] for line in told.splitlines() if line
    }
    assert "bubble" in told or "mesh.pp=2" not in words
    return next(runs.glob("*/real"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["mesh.pp=2", "mesh.dp_shard=2", "mesh.tp=2", "cluster.gpus_per_node=8"], ["mesh.dp_shard=2", "cluster.gpus_per_node=2"]),
        (["mesh.dp_shard=4", "mesh.ep=2", "cluster.gpus_per_node=4", *MOE], ["mesh.tp=2", "mesh.ep=2", "cluster.gpus_per_node=2", *MOE]),
    ],
)
def test_a_run_goes_on_on_another_mesh_with_the_same_curve(corpus, tmp_path, before, after):
    one = run(tmp_path, [*WORDS, f"data.path={corpus}", *before])
    half = one / "checkpoints" / "step-00000010"
    assert half.is_dir()
    other = run(tmp_path, [*WORDS, f"data.path={corpus}", *after], f"start={half}")
    whole, rest = losses(one), losses(other)
    assert list(rest) == list(range(11, 21)) and list(whole) == list(range(1, 21))
    assert [rest[step] for step in rest] == pytest.approx([whole[step] for step in rest], rel=2e-5)
    assert losses(other, "held_out_loss")[20] == pytest.approx(losses(one, "held_out_loss")[20], rel=2e-5)
    events = [e for e in read(other, "events") if e["event"] == "restart" and e["rank"] == 0]
    assert [e["step"] for e in events] == [10]


@pytest.mark.slow
def test_the_exported_model_writes_text(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = [*WORDS, f"data.path={corpus}", "train.learning_rate=0.01", f"runs={tmp_path / 'runs'}"]
    foretold("real", *words)
    told = foretold("real", f"export={tmp_path / 'out'}", *words)
    assert "step-00000020" in told and "llama" in told
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("the cat sees", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0])
    assert text.startswith("the cat sees") and len(text) > len("the cat sees") + 10
    # and back: a run that starts from the folder has its loss at once
    begun = [*WORDS, f"data.path={corpus}", "train.learning_rate=1e-12", "train.steps=1", "train.warmup=0"]
    begun.append(f"runs={tmp_path / 'again'}")
    foretold("real", f"start={tmp_path / 'out'}", *begun)
    runs = next((tmp_path / "runs").glob("*/real")), next((tmp_path / "again").glob("*/real"))
    assert losses(runs[1], "held_out_loss")[1] == pytest.approx(losses(runs[0], "held_out_loss")[20], rel=1e-5)


@pytest.mark.slow
def test_a_rehearsal_says_what_a_run_holds_and_sends(tmp_path):
    words = [
        "experiment=llama3_8b",
        "cluster.nodes=64",
        "cluster.gpus_per_node=8",
        "mesh.tp=8",
        "mesh.dp_shard=64",
        "train.global_batch=64",
    ]
    foretold("sim", f"runs={tmp_path}", *words)
    told = json.loads(foretold("real", "dry=true", "json=true", f"runs={tmp_path}", *words))
    (rank,) = told["rehearsed"]
    found = {(c["kind"], c["ranks"]): c["calls"] for c in rank["collectives"]}
    # A block: two gathers forward, their two reduce-scatters and twice that backward; embedding and head one pair each.
    assert found["all-gather", 8] == found["reduce-scatter", 8] == 4 * 32 + 2
    # FSDP: 32 blocks gathered forward and backward, the head's and the root's units once; every unit reduced once.
    assert found["all-gather", 64] == 2 * 32 + 2 and found["reduce-scatter", 64] == 32 + 2
    norms, tables = (2 * 32 + 1) * 4096, 2 * 128_256 * 4096
    rows = -(-128_256 // 8 // 64)  # of a table's shard of 250.5 rows the first ranks hold one more
    assert rank["parameters"] == (8_030_261_248 - norms - tables) // 512 + norms // 64 + 2 * rows * 4096
    assert told["fits"] and told["predicted"]["step_time"] > 0


def test_a_rehearsal_of_thousands_of_ranks(tmp_path):
    few = ["mesh.zero=3", "train.global_batch=256"]  # two micro-batches a step
    told = foretold("real", "dry=true", f"runs={tmp_path}", "experiment=llama3_405b", *few)
    assert "on 16384 × h100-sxm (pp 16 × dp_shard 128 × tp 8)" in told and "rank 15360: stages 15, 31" in told
