"""Published runs replayed: every experiment answers, its table stands in the README, and the mixture's step behaves."""

import math
from pathlib import Path

import pytest

from analysis.experiments import markdown, rows
from conf.program import load
from conf.schema import choices
from sim.pace import pace
from sim.parallel import steps
from sim.whatif import changed, parts

README = Path(__file__).parents[1] / "README.md"
NAMES = {"laptop", "h200", "gpt3_175b", "opt_175b", "bloom_176b", "chinchilla_70b", "llama2_70b", "llama3_8b", "llama3_405b",
         "llama3_405b_full", "deepseek_v3", "olmo2_7b", "gopher_280b", "t5_11b"}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return list(rows(choices("experiment")))


def test_all_are_there():
    assert set(choices("experiment")) >= NAMES


def test_the_table_in_the_readme_is_what_the_command_prints(found):
    assert markdown(found) in README.read_text(), "run: foretold analysis experiments, and put its output into README.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in choices("experiment") if not load([f"experiment={name}"]).published])
def test_those_of_which_nothing_was_published_answer_too(foretold, name):
    status, out, err = foretold("sim", f"experiment={name}")
    assert status == 0 and "wall clock" in out, err


def test_step_models_are_within_the_factor(found):
    """Speeds where the publication states the run's own, not sums over unstated other work."""
    speeds = [row for row in found if row.quantity in ("pretrain.step_time", "pretrain.mfu")]
    assert len(speeds) >= 6
    assert all(row.hit for row in speeds), [row for row in speeds if not row.hit]


def test_facts_do_not_change_the_id():
    plan = load(["experiment=gpt3_175b"])
    assert plan.but(published={}).id == plan.id


def one(*overrides):
    return steps([load(["experiment=deepseek_v3", *overrides])])


def test_spreading_experts_costs_traffic_and_saves_memory():
    few, many = one("mesh.ep=8"), one("mesh.ep=64")
    assert many.memory[0] < few.memory[0]
    assert many.communication[0] > few.communication[0]
    assert math.isclose(many.step_time[0], sum(getattr(many, part)[0] for part in ("compute", "communication", "bubble", "optimizer")))


def test_a_node_limit_saves_traffic():
    assert one("model.moe.node_limit=2").communication[0] < one("model.moe.node_limit=8").communication[0]


def test_unfused_attention_is_slower_and_larger():
    fused, unfused = (steps([load(["experiment=gpt3_175b", f"train.fused_attention={flag}"])]) for flag in ("true", "false"))
    assert unfused.step_time[0] > fused.step_time[0] and unfused.memory[0] > fused.memory[0]


def test_an_oversubscribed_spine_slows_only_groups_that_cross_it():
    free = steps([load(["experiment=llama3_405b", "cluster.oversubscription=1"])])
    tight = steps([load(["experiment=llama3_405b", "cluster.oversubscription=100"])])
    assert tight.communication[0] > free.communication[0]
    inside = ["experiment=llama3_405b", "cluster.nodes=128", "mesh.dp_shard=8"]
    same = [steps([load([*inside, f"cluster.oversubscription={x}"])]).step_time[0] for x in (1, 100)]
    assert same[0] == same[1]


def test_what_if_names_the_change_and_its_causes(foretold):
    status, out, _ = foretold("sim", "experiment=gpt3_175b", "vs=mesh.pp=8 train.steps=9637")
    assert status == 0
    assert {"mesh.pp 16 → 8", "train.steps 96371 → 9637"} <= set(out.splitlines())
    assert any("bubble" in line and "−" in line for line in out.split("why a step")[1].splitlines())
    status, _, err = foretold("sim", "vs=cluster.nodse=3")
    assert status == 2 and err.strip() == "foretold sim: cluster.nodse=3 is not a key of cluster; did you mean nodes?"
    status, _, err = foretold("sim", "vs='open")
    assert status == 2 and err.startswith("foretold sim: vs='open: no closing quotation; write for example")


def test_causes_add_up_to_the_difference():
    plans = load(["experiment=llama3_405b"]), load(["experiment=llama3_405b", "cluster.nodes=1024", "mesh.tp=4", "gpu=b200"])
    one, other = map(pace, plans)
    assert math.isclose(sum(parts(one, other).values()), other.step_time - one.step_time, rel_tol=1e-9)
    assert changed(*plans).keys() >= {"cluster.nodes", "mesh.tp", "gpu.name"} and "model.layers" not in changed(*plans)
