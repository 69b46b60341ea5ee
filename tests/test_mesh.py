"""Every mesh trains as one process does: same losses, same gradient norms, same weights after five steps.

fp32, AdamW with epsilon 1e-6 (below it the noise of rare tokens' gradients is what one compares), learning rate 1e-3.
`python -m tests.test_mesh` prints the table of ARCHITECTURE.md.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from real.moe import Router
from real.timeline import Timeline
from real.trainer import Trainer
from tests.worlds import Outcome, Stream, outcome, plan_of

# With this seed no token's choice of experts is close: 8e-6 of a score, a hundred times the rounding, part the last chosen
# from the first that is not. A choice that flips is no wrong gradient.
COMMON = ("seed=54", "train.seq_len=32", "train.global_batch=8", "train.epsilon=1e-6", "train.warmup=1", "train.learning_rate=0.001")
# The model (with what differs from its preset), and the mesh: axes above 1, and further words of the plan.
CASES = [
    # one axis alone
    ("tiny_llama3", "dp_shard=2"),
    ("tiny_llama3", "dp_shard=4"),
    ("tiny_llama3", "dp_replicate=2"),
    ("tiny_llama3", "dp_replicate=2 dp_shard=2"),
    ("tiny_llama3", "tp=2"),
    ("tiny_llama3", "cp=2"),
    ("tiny_llama3", "cp=4"),
    ("tiny_llama3", "cp=2 cp_kind=gather"),
    ("tiny_llama3", "cp=2 cp_kind=ulysses"),
    ("tiny_llama3", "pp=2 schedule=gpipe"),
    ("tiny_llama3", "pp=2 schedule=1f1b"),
    ("tiny_llama3", "pp=4 schedule=1f1b"),
    ("tiny_llama3", "pp=2 schedule=interleaved vpp=2"),
    ("tiny_llama3", "pp=2 schedule=zero_bubble vpp=2"),
    ("tiny_llama3", "pp=2 schedule=zbv vpp=2"),
    ("tiny_llama3", "pp=2 schedule=dualpipev vpp=2"),
    ("tiny_qwen3_moe", "dp_shard=2 ep=2"),
    ("tiny_qwen3_moe", "dp_shard=4 ep=4"),
    # pairs
    ("tiny_llama3", "dp_shard=2 tp=2"),
    ("tiny_llama3", "dp_replicate=2 tp=2"),
    ("tiny_llama3", "dp_shard=2 cp=2"),
    ("tiny_llama3", "dp_replicate=2 cp=2"),
    ("tiny_llama3", "cp=2 tp=2"),
    ("tiny_llama3", "cp=2 tp=2 cp_kind=gather"),
    ("tiny_llama3", "dp_shard=2 pp=2"),
    ("tiny_llama3", "dp_replicate=2 pp=2"),
    ("tiny_llama3", "tp=2 pp=2"),
    ("tiny_llama3", "cp=2 pp=2"),
    ("tiny_llama3", "tp=2 pp=2 schedule=zero_bubble vpp=2"),
    ("tiny_llama3", "dp_shard=2 pp=2 schedule=dualpipev vpp=2 micro=1"),
    ("tiny_qwen3_moe", "dp_shard=2"),
    ("tiny_qwen3_moe", "dp_shard=4 ep=2"),
    ("tiny_qwen3_moe", "dp_replicate=2 dp_shard=2 ep=2"),
    ("tiny_qwen3_moe", "tp=2 ep=2"),
    ("tiny_qwen3_moe", "tp=2"),
    ("tiny_qwen3_moe", "cp=2 ep=2"),
    ("tiny_qwen3_moe", "dp_shard=2 pp=2 ep=2"),
    ("tiny_qwen3_moe", "pp=2 schedule=zero_bubble vpp=2"),
    ("tiny_qwen3_moe", "dp_shard=2 pp=2 ep=2 schedule=dualpipev vpp=2 micro=1"),
    # three and more
    ("tiny_llama3", "dp_shard=2 tp=2 pp=2"),
    ("tiny_llama3", "dp_shard=2 cp=2 tp=2"),
    ("tiny_llama3", "cp=2 tp=2 pp=2"),
    ("tiny_qwen3_moe", "dp_shard=2 tp=2 ep=4"),
    ("tiny_qwen3_moe", "cp=2 tp=2 ep=2"),
    # other models
    ("tiny_deepseek_v3", "dp_shard=2 ep=2"),
    ("tiny_deepseek_v3", "tp=2 ep=2"),
    ("tiny_deepseek_v3", "cp=2 ep=2"),
    ("tiny_deepseek_v3", "dp_shard=2 tp=2 pp=2 ep=2"),
    ("tiny_mixtral", "dp_shard=2 ep=2"),
    ("tiny_gpt3", "dp_shard=2 tp=2 pp=2"),
    ("tiny_gpt3", "cp=2 tp=2"),
    ("tiny_qwen3", "tp=2 pp=2"),
    # what goes with a mesh
    ("tiny_llama3 tied=true", "dp_shard=2 tp=2"),
    ("tiny_llama3 tied=true", "dp_shard=2 pp=2"),
    ("tiny_llama3 tied=true", "pp=2 schedule=zbv vpp=2"),
    ("tiny_llama3", "dp_shard=2 tp=2 recompute=full"),
    ("tiny_llama3", "dp_shard=2 tp=2 recompute=selective"),
    ("tiny_qwen3_moe", "dp_shard=2 ep=2 recompute=selective"),
    ("tiny_llama3 z_loss=0.001", "tp=2"),
    ("tiny_llama3 document_mask=true", "dp_shard=2"),
    ("tiny_llama3 document_mask=true", "cp=2"),
    ("tiny_llama3 document_mask=true", "cp=2 cp_kind=gather"),
    ("tiny_llama3 document_mask=true", "cp=2 cp_kind=ulysses"),
    ("tiny_llama3 document_mask=true", "cp=2 tp=2 pp=2"),
    ("tiny_llama3 optimizer=muon", "dp_shard=2 tp=2"),
    ("tiny_llama3", "dp_shard=2 tp=2 compile=true"),
    ("tiny_llama3", "dp_shard=2 tp=2 compile=true recompute=selective"),
    ("tiny_qwen3_moe", "dp_shard=2 ep=2 compile=true"),
]  # fmt: skip
FIRST = [
    "dp_shard=4", "dp_replicate=2 dp_shard=2", "cp=2", "cp=2 cp_kind=ulysses", "pp=2 schedule=1f1b", "pp=2 schedule=dualpipev vpp=2",
    "dp_shard=2 tp=2", "cp=2 tp=2", "dp_shard=2 ep=2", "dp_shard=2 tp=2 pp=2", "dp_shard=2 pp=2 ep=2", "dp_shard=2 tp=2 ep=4",
]  # fmt: skip
GROUPS = {"tied": "model", "z_loss": "train", "document_mask": "train", "optimizer": "train", "recompute": "train", "compile": "train"}


def words(model: str, mesh: str) -> list[str]:
    name, *settings = model.split()
    found = [f"model={name}", *COMMON, "mesh.dp_shard=1"]
    for word in (*settings, *mesh.split()):
        key, value = word.split("=")
        found.append(f"train.micro_batch={value}" if key == "micro" else f"{GROUPS.get(key, 'mesh')}.{key}={value}")
    return [w for w in found if w != "mesh.dp_shard=1" or "dp_shard" not in mesh]


@cache
def alone(model: str) -> Outcome:
    """The same plan in one process that shards nothing."""
    return outcome(plan_of(*words(model, "")))


def differences(model: str, mesh: str) -> tuple[float, float, float]:
    """Largest relative difference of losses, of gradient norms, and of tensors (in L2) from one process."""
    one, other = alone(model), outcome(plan_of(*words(model, mesh)))
    assert one.weights.keys() == other.weights.keys()
    assert len(set(one.losses)) == len(one.losses) == 5
    loss, norm = (
        max(abs(b / a - 1) for a, b in zip(*pair, strict=True)) for pair in ((one.losses, other.losses), (one.norms, other.norms))
    )
    # The softmax does not see a bias of all keys: its gradient is rounding alone, which AdamW makes large.
    names = [name for name in one.weights if name.startswith("model.") and not name.endswith("k_proj.bias")]
    return loss, norm, max(_apart(one, other, name) for name in names)


def _apart(one: Outcome, other: Outcome, name: str) -> float:
    a, b = one.weights[name], other.weights[name]
    return float((a - b).norm() / a.norm()) if a.any() else float(b.abs().max())


def check(model: str, mesh: str) -> None:
    if ("zbv" in mesh or "dualpipev" in mesh) and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("gloo before torch 2.13 cannot send to itself")
    loss, norm, weights = differences(model, mesh)
    assert loss <= 1e-5 and norm <= 1e-5 and weights <= 1e-4, (loss, norm, weights)


@pytest.mark.parametrize("mesh", FIRST)
def test_a_mesh_trains_as_one_process(mesh):
    check("tiny_qwen3_moe" if "ep=" in mesh else "tiny_llama3", mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh"), [case for case in CASES if case[1] not in FIRST or " " in case[0]])
def test_every_mesh_trains_as_one_process(model, mesh):
    check(model, mesh)


def test_no_choice_of_experts_is_close(monkeypatch):
    gaps = []

    def choose(router: Router, scores: torch.Tensor) -> torch.Tensor:
        best = scores.topk(router.moe.top_k + 1, -1)
        gaps.append(float((best.values[:, -2] - best.values[:, -1]).min()))
        return best.indices[:, :-1]

    monkeypatch.setattr(Router, "_choose", choose)
    for model in ("tiny_qwen3_moe", "tiny_deepseek_v3", "tiny_mixtral"):
        plan = plan_of(*words(model, ""))
        trainer = Trainer(plan, Stream(plan), Timeline())  # type: ignore[arg-type]
        for step in range(5):
            trainer.step(step)
    assert min(gaps) > 5e-6


def test_a_wrong_gradient_would_show(monkeypatch):
    """The comparison must be able to fail: with a loss that ignores half of the tensor-parallel ranks it does."""
    from real import loss

    wrong = staticmethod(lambda ctx, grad_N: (ctx.saved_tensors[0] * grad_N.unsqueeze(-1), None, None, None))
    monkeypatch.setattr(loss._CrossEntropy, "backward", wrong)
    assert max(differences("tiny_llama3", "tp=2")) > 1e-3


def table() -> str:
    rows = ["| model | mesh |", "|---|---|", *(f"| {model} | {mesh} |" for model, mesh in CASES)]
    return "\n".join(rows)


def test_the_table_is_in_the_documentation():
    assert table() in (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()


if __name__ == "__main__":
    print(table())
