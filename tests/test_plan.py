"""The plan: composed, checked whole, immutable, with one id."""

import pickle
from math import prod

import pytest

from conf.arithmetic import flops_per_token, parameters, state_bytes
from conf.errors import Refused
from conf.program import choices, from_yaml, load, to_yaml, vary
from conf.schema import keys


def refused(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(Refused) as caught:
        load(overrides)
    return caught.value.problems


def test_every_problem_at_once():
    problems = refused("cluster.nodse=3", "+train.foo=3", "cluster.nic_bandwidth=400 Gbit", "train.seq_len=2k", "gpu.memory=80")
    told = "\n".join(problems)
    assert len(problems) == 5
    assert "cluster.nodse=3 is not a key of cluster; did you mean nodes?" in told
    assert "train.foo=3 is not a key of train" in told
    assert "cluster.nic_bandwidth: '400 Gbit' is in Gbit; expected bit/s" in told
    assert "train.seq_len='2k': expected a whole number" in told
    assert "gpu.memory: '80' has no unit; expected B, as in '80 B'" in told


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["mesh.tp=2", "mesh.dp_shard=2"], "dp_shard 2 × cp 1 × tp 2 = 4 ranks, but cluster.nodes=1 × cluster.gpus_per_node=2 = 2"),
        (
            ["mesh.tp=4", "cluster.gpus_per_node=4", "model.hidden=96", "model.heads=6"],
            "mesh.tp=4 must divide model.heads=6; set mesh.tp=3 or 6",
        ),
        (["model.kv_heads=3"], "model.kv_heads=3 must divide model.heads=4"),
        (["gpu=h100_sxn"], "gpu=h100_sxn is no gpu; did you mean h100_sxm?"),
        (["foo=3"], "foo=3 is not a key of the plan"),
        (["train.steps=null"], "the run would never end"),
        (["train.global_batch=10"], "set train.global_batch="),
        (["train.schedule=cosin"], "train.schedule=cosin is not known; did you mean cosine?"),
        (["model.vocab=100"], "model.vocab=100 is smaller than tokenizer.vocab=512"),
        (["price.as_of=yesterday"], "price.as_of=yesterday is not a date"),
        (["gpu.name=tpu"], "price.gpu_hours has no price for tpu"),
        (["profile=/nowhere"], "profile=/nowhere is no file"),
        (["train.precision=bf16"], "has no bf16 rate"),
        (["data.held_out=2"], "data.held_out=2.0 is a share"),
        (["cluster.nodes=0"], "cluster.nodes=0 must be above 0"),
        (["train.warmup=9000"], "train.warmup=9000 is longer than train.steps=1000"),
        (["~model.heads"], "model.heads is missing (query heads)"),
        (["data.path=null"], "data.path and data.tokens are both null"),
        (["mesh.vpp=2"], "mesh.vpp=2, mesh.schedule=auto: mesh.pp=1 is no pipeline"),
        (["mesh.pp=2", "mesh.schedule=zbv"], "mesh.schedule=zbv needs mesh.vpp=2, it is 1"),
        (["mesh.pp=2", "mesh.vpp=2", "model.layers=5"], "mesh.vpp=2 × mesh.pp=2 = 4 must divide the layers, 5, or"),
        (
            ["mesh.pp=2", "mesh.vpp=2", "train.global_batch=6"],
            "mesh.schedule=interleaved needs a multiple of mesh.pp=2 micro-batches, train.global_batch makes 3; set train.global_batch=8",
        ),
        (
            ["mesh.pp=2", "mesh.vpp=2", "mesh.schedule=dualpipev"],
            "needs 4 or more micro-batches, train.global_batch makes 2; set train.global_batch=8",
        ),
        (["mesh.tp=2", "train.seq_len=257"], "mesh.tp=2 must divide train.seq_len / mesh.cp=257"),
        (["mesh.cp=2", "train.seq_len=257"], "mesh.cp=2 must divide train.seq_len=257"),
        (["model=tiny_mixtral", "mesh.ep=4"], "mesh.ep=4 must divide mesh dp_shard × cp × tp=2"),
        (["model=tiny_mixtral", "model.moe.experts=3", "mesh.ep=2"], "mesh.ep=2 must divide model.moe.experts=3"),
        (["train.first_batch=3"], "train.first_batch=3 must be a multiple of 4"),
        (["data.mixture=['much *.py']"], "data.mixture: 'much *.py' is no weight above 0 and a pattern"),
        (["mesh.cp_kind=star"], "mesh.cp_kind=star is not known"),
        (["-m"], "-m is no option"),
        (["laptop"], "laptop is neither an option nor group=option nor key=value"),
    ],
)
def test_one_clear_line(overrides, part):
    problems = refused(*overrides)
    assert any(part in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_the_same_plan_has_the_same_id_however_it_is_written():
    plan = load(["cluster.nic_bandwidth=10 Gbit/s"])
    assert plan.id == load(["cluster.nic_bandwidth=10e9 bit/s"]).id != load([]).id
    assert plan.id[0] == "p" and len(plan.id) == 11


def test_the_profile_is_part_of_the_id_by_content(tmp_path):
    names = []
    for value, place in ((1.0, "a"), (2.0, "a"), (2.0, "b")):
        path = tmp_path / place
        path.write_text(
            "name: x\nmachine: x\ncreated: x\nprecision: fp32\nranks: 2\n"
            f"parameters:\n  launch: {{value: {value}, unit: s, standard_error: 0.0}}\n"
        )
        names.append(load([f"profile={path}"]).id)
    assert names[0] != names[1] == names[2]


def test_a_plan_cannot_change_and_has_no_stray_keys():
    plan = load([])
    with pytest.raises(AttributeError, match="cannot change nodes"):
        plan.cluster.nodes = 3
    with pytest.raises(AttributeError, match="did you mean nodes"):
        plan.cluster.nodse = 3
    assert plan.but(**{"cluster.nodes": 4, "seed": 1}).cluster.nodes == 4 and plan.cluster.nodes == 1
    assert pickle.loads(pickle.dumps(plan)).id == plan.id


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_and_survives_its_file(experiment, tmp_path):
    plan = load([f"experiment={experiment}"])
    (tmp_path / "plan.yaml").write_text(to_yaml(plan))
    assert from_yaml(tmp_path / "plan.yaml").id == plan.id
    assert prod(plan.axes.values()) == plan.cluster.ranks


def test_every_key_has_a_meaning_and_every_number_a_source():
    assert all(means for _, means, _ in keys().values())
    plan = load([])
    for group in ("gpu", "cluster", "model", "data", "tokenizer", "failures", "power", "grid", "price", "law"):
        assert len(getattr(plan, group).source) > 10, group


@pytest.mark.parametrize(("name", "billions"), [("llama3_8b", 8.030), ("llama3_405b", 405.85), ("llama_1b", 1.236)])
def test_parameters_of_published_models(name, billions):
    model = load([f"model={name}", "tokenizer=llama3"]).model
    assert parameters(model) / 1e9 == pytest.approx(billions, abs=6e-3)
    assert state_bytes(model) == 12 * parameters(model)


def test_flops_of_llama_3_405b_as_its_paper_counts_them():
    """3.8e25 FLOPs for 15.6T tokens (arXiv 2407.21783, section 3.2.1), which leaves attention's square out."""
    plan = load(["experiment=llama3_405b"])
    assert flops_per_token(plan.model, 0) * 15.6e12 == pytest.approx(3.8e25, rel=0.01)


def test_a_plan_file_is_accepted_with_overrides(tmp_path):
    file = tmp_path / "plan.yaml"
    plan = load(["experiment=gpt3_175b"])
    file.write_text(to_yaml(plan))
    assert load([], str(file)) == plan
    assert load(["train.steps=10000", "grid=france"], str(file)) == load(["experiment=gpt3_175b", "train.steps=10000", "grid=france"])
    with pytest.raises(Refused, match=r"plan of its own; leave out plan="):
        load(["experiment=laptop"], str(file))
    with pytest.raises(Refused, match="is no plan"):
        load([], str(tmp_path / "nowhere.yaml"))


def test_vary_is_load_without_composing():
    plan = load(["experiment=llama3_405b"])
    assert vary(plan, {"cluster.nodes": "1024", "train.stop_after": "10 d"}) == load(
        ["experiment=llama3_405b", "cluster.nodes=1024", "train.stop_after=10 d"]
    )
    with pytest.raises(Refused, match=r"cluster\.nodse is no key of the plan"):
        vary(plan, {"cluster.nodse": "3"})


def test_every_fault_of_a_mixture_is_named():
    assert any("spreads experts, but" in p for p in refused("mesh.ep=2"))
    assert any("mesh.ep=48 must divide model.moe.experts=256" in p for p in refused("experiment=deepseek_v3", "mesh.ep=48"))
    assert any("v100-sxm has no fp8 rate" in p for p in refused("experiment=gpt3_175b", "train.precision=fp8"))


def test_prices_regions_and_clusters_must_be_whole():
    assert any("price.as_of is missing" in p for p in refused("~price.as_of"))
    assert any("grid.intensity is missing" in p for p in refused("~grid.intensity"))
    assert any("price.gpu_hours has no price for" in p for p in refused("experiment=gpt3_175b", "price=deepseek_2024_12"))
    assert any("mesh pp 16 ×" in p and "set mesh.dp_shard=-1 to fill" in p for p in refused("experiment=deepseek_v3", "cluster.nodes=1"))
