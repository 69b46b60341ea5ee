"""A checkpoint of any mesh goes on on any other, and on its own to the last bit."""

import json
import pickle
import tempfile
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
import torch

from conf.errors import Refused
from conf.plan import Plan
from real import checkpoint
from real.timeline import Timeline
from real.trainer import Trainer
from tests.test_mesh import words
from tests.worlds import Stream, outcome, plan_of, spawn

DENSE = ["", "dp_shard=4", "dp_shard=2 tp=2", "tp=2 pp=2", "dp_shard=2 cp=2"]
MIXED = ["", "dp_shard=2 ep=2", "dp_shard=4 ep=2", "tp=2 ep=2", "dp_shard=2 pp=2 ep=2"]
PAIRS = [
    *(("tiny_llama3", a, b) for a, b in permutations(DENSE, 2)),
    *(("tiny_qwen3_moe", a, b) for a, b in zip(MIXED, MIXED[1:] + MIXED[:1], strict=True)),
    ("tiny_llama3", "pp=2 schedule=interleaved vpp=2", "dp_replicate=2 dp_shard=2"),
    ("tiny_llama3 optimizer=muon", "dp_shard=2 tp=2", "dp_shard=4"),
    ("tiny_llama3 tied=true", "dp_shard=2 pp=2", "tp=2"),
    ("tiny_deepseek_v3", "dp_shard=2 ep=2", "tp=2 pp=2"),
]
FIRST = [p for p in PAIRS if p[1:] in (("", "dp_shard=4"), ("dp_shard=2 tp=2", "tp=2 pp=2"), ("dp_shard=4 ep=2", "tp=2 ep=2"))]
SAVED, STEPS = 3, 5


def go_on(plan: Plan, folder: Path, source: Path | None) -> None:
    """Steps 0 to SAVED and a checkpoint; or from one to STEPS, and the losses."""
    trainer = Trainer(plan, Stream(plan), Timeline())  # type: ignore[arg-type]
    if source:
        checkpoint.load(source, trainer.parts, trainer.optimizer, SAVED)
    told = [trainer.step(step)[:2] for step in (range(SAVED, STEPS) if source else range(SAVED))]
    checkpoint.Writer(folder, plan).save(checkpoint.state(trainer.parts, trainer.optimizer), STEPS if source else SAVED)
    if trainer.axes is None or torch.distributed.get_rank() == 0:
        (folder / "told").write_text(json.dumps(told))


@cache
def half(model: str, mesh: str) -> Path:
    """The folder of a run of SAVED steps."""
    folder = Path(tempfile.mkdtemp())
    spawn(plan_of(*words(model, mesh)), go_on, folder, None)
    return folder


@cache
def unbroken(model: str, mesh: str):
    return outcome(plan_of(*words(model, mesh)), STEPS)


def resumed(model: str, before: str, after: str) -> tuple[list[list[float]], Path]:
    """Loss and norm of the steps after SAVED, and the checkpoint at the end."""
    folder, plan = Path(tempfile.mkdtemp()), plan_of(*words(model, after))
    path, manifest = checkpoint.find(half(model, before))
    assert manifest["step"] == SAVED and manifest["samples"] == SAVED * plan.train.global_batch
    spawn(plan, go_on, folder, path)
    return json.loads((folder / "told").read_text()), folder / f"step-{STEPS:08}"


def check(model: str, before: str, after: str) -> None:
    told, _ = resumed(model, before, after)
    losses = [loss for loss, _ in told]
    assert losses == pytest.approx(unbroken(model, before).losses[SAVED:], rel=1e-6)


@pytest.mark.parametrize(("model", "before", "after"), FIRST)
def test_another_mesh_goes_on(model, before, after):
    check(model, before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "before", "after"), [p for p in PAIRS if p not in FIRST])
def test_every_other_mesh_goes_on(model, before, after):
    check(model, before, after)


@pytest.mark.parametrize(("model", "mesh"), [("tiny_llama3", "dp_shard=2 tp=2 pp=2"), ("tiny_deepseek_v3", "dp_shard=2 ep=2")])
def test_the_same_mesh_goes_on_to_the_last_bit(model, mesh):
    told, path = resumed(model, mesh, mesh)
    whole = unbroken(model, mesh)
    assert told == [list(pair) for pair in zip(whole.losses, whole.norms, strict=True)][SAVED:]
    found = {name: torch.empty(shape) for name, shape in checkpoint.shapes(path).items()}
    checkpoint.read(found, path)
    assert found.keys() == whole.weights.keys() and all(torch.equal(found[n], whole.weights[n]) for n in found)


def test_another_models_checkpoint_is_refused_with_what_differs():
    plan = plan_of(*words("tiny_qwen3", ""))
    trainer = Trainer(plan, Stream(plan), Timeline())  # type: ignore[arg-type]
    path, _ = checkpoint.find(half("tiny_llama3", ""))
    with pytest.raises(Refused) as refused:
        checkpoint.load(path, trainer.parts, trainer.optimizer, SAVED)
    assert "of another model or optimizer" in refused.value.problems[0]
    assert "model.layers.0.self_attn.q_proj.weight: (128, 128) in the checkpoint, (256, 128) in the plan" in refused.value.problems


class Bomb:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_a_checkpoint_from_elsewhere_can_do_no_harm(tmp_path, capsys):
    """Even one whose manifest was forged to fit."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(Refused, match=r"\.metadata names builtins\.print, which none of ours does"):
        checkpoint.shapes(tmp_path)
    assert "ran code" not in capsys.readouterr().out


def test_a_tampered_checkpoint_is_refused(tmp_path):
    import shutil

    folder = tmp_path / "step-00000003"
    shutil.copytree(checkpoint.find(half("tiny_llama3", ""))[0], folder)
    file = next(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match="is corrupt: its digest differs"):
        checkpoint.find(tmp_path)


def asynchronous(plan: Plan, folder: Path) -> None:
    """Save beside three more steps; what is read back is the state at the moment of the save."""
    trainer = Trainer(plan, Stream(plan), Timeline())  # type: ignore[arg-type]
    trainer.step(0)
    writer = checkpoint.Writer(folder, plan)
    then = {name: tensor.clone() for name, tensor in checkpoint.state(trainer.parts, trainer.optimizer).items()}
    assert writer.save(checkpoint.state(trainer.parts, trainer.optimizer), 1) == []
    for step in (1, 2, 3):
        trainer.step(step)
    ((step, size),) = writer.finish()
    assert step == 1 and size > 0 and writer.poll() == []
    checkpoint.load(folder / "step-00000001", trainer.parts, trainer.optimizer, 1)
    now = checkpoint.state(trainer.parts, trainer.optimizer)
    assert all(torch.equal(then[n].to_local(), now[n].to_local()) for n in then)  # type: ignore[attr-defined]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    plan = plan_of(*words("tiny_llama3", "dp_shard=2 tp=2"), "checkpoint.asynchronous=true")
    spawn(plan, asynchronous, tmp_path)


def test_some_checkpoints_are_kept_for_good(tmp_path):
    plan = plan_of(*words("tiny_llama3", ""), "checkpoint.keep=2", "checkpoint.keep_every=4")
    writer = checkpoint.Writer(tmp_path, plan)
    for step in range(1, 11):
        writer.save({"x": torch.zeros(1)}, step)
    assert [int(p.name.split("-")[1]) for p in checkpoint.complete(tmp_path)] == [4, 8, 9, 10]
