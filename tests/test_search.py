"""The search for a mesh: its rules are the plan's, its winner is the winner of all, its reasons hold."""

import itertools
import json

import numpy as np
import pytest

from conf.errors import Refused
from conf.program import load, main
from conf.rules import problems
from sim import search as module
from sim.advice import advise, no_room, pinned, words
from sim.parallel import steps
from sim.search import NAMES, PARTS, search

SMALL = ["model=llama3_8b", "model.layers=6", "model.heads=8", "model.kv_heads=4", "model.hidden=1024", "model.ffn=2816", "gpu=h100_sxm",
         "cluster=dgx_h100", "cluster.nodes=2", "cluster.gpus_per_node=4", "train.seq_len=1024", "train.global_batch=24",
         "train.micro_batch=1", "train.precision=bf16"]  # fmt: skip
MIXED = [*SMALL, "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=512"]
GPT3 = ["model=gpt3_175b", "gpu=a100_80", "cluster=dgx_a100", "cluster.nodes=64", "train.seq_len=2048", "train.global_batch=1536",
        "train.micro_batch=1", "train.compile=true", "train.precision=bf16"]  # fmt: skip


def placed(plan, mesh):
    """The plan on a mesh of the search."""
    axes = {name: int(mesh[name]) for name in NAMES if name not in ("schedule", "recompute", "micro_batch")}
    return plan.but(
        mesh=plan.mesh.but(**axes, schedule=str(mesh["schedule"])),
        train=plan.train.but(micro_batch=int(mesh["micro_batch"]), recompute=str(mesh["recompute"])),
    )


@pytest.mark.parametrize("said", [SMALL, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["dense", "mixed"])
def test_legal_is_what_the_rules_of_a_plan_call_legal(said, monkeypatch):
    monkeypatch.setattr(module, "NEAR", 1e9)
    plan = load(said)
    plan = plan.but(gpu=plan.gpu.but(memory=1e18))
    found = search(plan, {"recompute": "none"}, prune=False)
    told = {tuple(row) for row in found.meshes[list(NAMES)].itertuples(index=False)}
    assert len(told) == len(found.meshes) == found.predicted
    wanted = set()
    folds = [("auto", 1), ("1f1b", 1), ("zbv", 2), ("dualpipev", 2)]
    folds += [(schedule, n) for schedule in ("interleaved", "zero_bubble") for n in (2, 3, 4, 6, 8)]
    sizes = (1, 2, 4, 8)
    for tp, cp, pp, ep, micro, (schedule, vpp), zero, copies in itertools.product(
        sizes, sizes, sizes, (1, 2, 4) if said is MIXED else (1,), (1, 2, 3, 4, 6, 8, 12, 24), folds, range(4), sizes
    ):
        if tp * cp * pp * copies > 8 or 8 % (tp * cp * pp * copies) or (pp == 1) != (schedule == "auto") or (zero < 3 and copies > 1):
            continue
        shard = 8 // (tp * cp * pp * copies)
        mesh = dict(zip(NAMES, (tp, cp, pp, ep, micro, schedule, vpp, zero, copies, shard, "none"), strict=True))
        if not problems(placed(plan, mesh)) and (copies * shard > 1 or zero == 3):
            wanted.add(tuple(mesh.values()))
    assert told == wanted and len(told) > 300


def test_the_grid_predicts_what_a_plan_of_its_own_is_predicted():
    plan = load(MIXED)
    found = search(plan, prune=False).meshes
    some = found.iloc[:: max(1, len(found) // 50)]
    alone = steps([placed(plan, mesh) for _, mesh in some.iterrows()])
    for name in ("step_time", *PARTS, "memory", "mfu"):
        np.testing.assert_allclose(some[name], getattr(alone, name), rtol=1e-9)


def test_pruning_finds_the_same_winners_as_looking_at_all():
    for said in (GPT3, [*GPT3, "train.seq_len=1024", "cluster.nodes=16"], MIXED):
        plan = load(said)
        some, every = search(plan), search(plan, prune=False)
        assert some.predicted <= every.predicted
        np.testing.assert_array_equal(some.meshes.to_numpy(), every.meshes.to_numpy())


def test_the_published_mesh_is_near_the_best_of_its_kind_and_the_difference_is_explained():
    plan = load(["experiment=llama3_405b"])
    told = advise(plan, {})
    own, best = told["own"], told["meshes"][0]
    assert {axis: own[axis] for axis in ("tp", "cp", "pp", "dp_shard")} == {"tp": 8, "cp": 1, "pp": 16, "dp_shard": 128}
    assert sum(own["parts"].values()) == pytest.approx(own["slower"], abs=1e-6)
    assert own["step_time"] == pytest.approx(best["step_time"] * (1 + own["slower"]))


def test_neighbours_lose_and_their_parts_add_up():
    plan = load(GPT3)
    told = advise(plan, {})
    assert {"mesh.tp", "mesh.pp", "train.micro_batch", "train.recompute"} <= {neighbour["key"] for neighbour in told["neighbours"]}
    for neighbour in told["neighbours"]:
        if neighbour["slower"] is None:
            assert neighbour["over"] > 0
        else:
            assert neighbour["slower"] >= -1e-9
            assert sum(neighbour["parts"].values()) == pytest.approx(neighbour["slower"], abs=1e-6)


def test_words_pin_a_choice_and_the_answer_can_be_said_again():
    pins, rest = pinned(["model=llama3_8b", "mesh.tp=2", "train.recompute=full", "mesh.dp_shard=-1", "mesh.zero=0", "mesh.schedule=auto"])
    assert (pins, rest) == ({"tp": 2, "recompute": "full", "zero": 0}, ["model=llama3_8b"])
    best = search(load(SMALL), {"tp": 2, "recompute": "full"}).meshes.iloc[0].to_dict()
    assert (best["tp"], best["recompute"]) == (2, "full")
    again = load([*SMALL, *words(best)])
    assert steps([again]).step_time[0] == pytest.approx(best["step_time"])


def test_when_nothing_fits_the_line_says_what_would():
    plan = load([*GPT3, "cluster.nodes=2"])
    found = search(plan)
    assert found.meshes.empty
    line = no_room(plan, {}, found)
    nodes = int(line.split("cluster.nodes=")[1].split()[0])
    assert not search(load([*GPT3, f"cluster.nodes={nodes}"])).meshes.empty
    assert search(load([*GPT3, f"cluster.nodes={nodes // 2}"])).meshes.empty
    with pytest.raises(Refused, match="no mesh fits: the leanest"):
        advise(plan, {})
    with pytest.raises(Refused, match=r"with mesh\.tp=3"):
        advise(plan, {"tp": 3})


def test_the_command(capsys):
    small = [*SMALL, "mesh.zero=3"]
    assert main(["sim", "search=true", *small]) == 0
    text = capsys.readouterr().out
    assert "why its neighbours lose" in text and "the plan's own" in text and "next:   foretold sim model=llama3_8b" in text
    assert main(["sim", "search=true", "json=true", *small]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["meshes"][0]["zero"] == 3 and told["predicted"] > 100
    assert main(["sim", "search=true", "mesh.tp=two", *small]) == 2
    assert "mesh.tp=two: it must be a whole number above 0" in capsys.readouterr().err
