"""Alignment, foretold: engines against hand-made arithmetic, what is conserved, what bounds the age of samples, and roles' memory."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.alignment import ages
from conf.arithmetic import adapter_parameters, parameters
from conf.plan import Cause
from conf.program import load, vary
from sim.align import align, live, parts
from sim.alignment import run
from sim.checkpoint import save
from sim.kernels import rates
from sim.memory import memory
from sim.parallel import columns
from sim.roles import misfits, roles
from sim.rollout import Completion, Decode, Engine, cached, knee, lengths
from sim.sync import CHANGED, PLACE, sync
from tests.conftest import SHARED

GRPO = ["experiment=llama3_8b_grpo", "align.prompts=24", "align.group=8", "align.updates=1", "align.steps=40", "train.global_batch=192"]
SERVING = SHARED / "data" / "serving"


BASE = load(GRPO)


def plan_of(*words):
    """The plan with other values; composed anew only for other groups."""
    pairs = dict(word.split("=", 1) for word in words)
    return vary(BASE, pairs) if all("." in name for name in pairs) else load([*GRPO, *words])


# -- one engine


WORK = Decode(step=np.array([0.0, 0.10, 0.11, 0.13, 0.16]), held=1e-4, prefill=1e-3)


def served(lengths_, slots=4, room=1e9, prompt=10, work=WORK):
    """One engine that is given completions of these lengths at once: when it is done, in which order, and itself."""
    env, done = simpy.Environment(), []
    settings_ = load(["align=grpo", "align.data=README.md"], rules=lambda _: []).align.but(slots=slots, prompt_tokens=prompt)
    engine = Engine(env, settings_, work, room, 0.0, lambda: 0, lambda one: done.append((one.length, float(env.now))))
    for length in lengths_:
        engine.take(Completion(0, length))
    env.run()
    return done, engine


def steps(count, riders, tokens):
    """Seconds of so many steps of so many completions that hold so many tokens at their start: added up step by step."""
    return sum(WORK.step[riders] + WORK.held * (tokens + step * riders) for step in range(count))


def test_completions_of_one_length_are_exact_arithmetic():
    done, engine = served([50] * 4)
    expected = 4 * 10 * WORK.prefill + steps(50, 4, 40)
    assert [length for length, _ in done] == [50] * 4 and done[-1][1] == pytest.approx(expected, rel=1e-12)
    assert engine.busy() == pytest.approx(expected) and engine.tokens == 0 and engine.load == 0


def test_more_completions_than_slots_come_in_waves():
    done, _ = served([50] * 8)
    assert done[-1][1] == pytest.approx(2 * (40 * WORK.prefill + steps(50, 4, 40)), rel=1e-12)


def test_a_free_slot_is_filled_when_someone_ends():
    done, _ = served([5, 9, 7], slots=2)
    first = 20 * WORK.prefill + steps(5, 2, 20)
    second = first + 10 * WORK.prefill + steps(4, 2, 15 + 10)  # the one of 9 holds 15, the new one its prompt
    third = second + steps(3, 1, 14)
    assert done == [(5, pytest.approx(first)), (9, pytest.approx(second)), (7, pytest.approx(third))]


def test_a_full_cache_makes_the_youngest_give_way_and_loses_no_token():
    roomy, engine = served([40] * 4)
    tight, pressed = served([40] * 4, room=120)  # two of them fit with all they have
    assert engine.preempted == 0 and pressed.preempted > 0
    assert len(tight) == 4 and pressed.tokens == 0
    assert tight[-1][1] > roomy[-1][1]
    assert served([40], room=1)[0][0][1] == pytest.approx(10 * WORK.prefill + steps(40, 1, 10))  # alone it goes on


def test_an_engine_that_is_held_stops_at_the_end_of_a_step_and_reads_again():
    env, done = simpy.Environment(), []
    settings_ = load(["align=grpo", "align.data=README.md"], rules=lambda _: []).align.but(slots=4, prompt_tokens=10)
    engine = Engine(env, settings_, WORK, 1e9, 0.0, lambda: 0, lambda one: done.append(float(env.now)))
    engine.take(Completion(0, 50))

    def hold():
        yield env.timeout(1.0)
        yield engine.hold(at_once=True)
        stood.append(float(env.now))
        yield env.timeout(5.0)
        engine.go_on()

    stood: list[float] = []
    env.process(hold())
    env.run()
    made = next(count for count in range(50) if 10 * WORK.prefill + steps(count, 1, 10) >= 1.0)
    assert stood == [pytest.approx(10 * WORK.prefill + steps(made, 1, 10))]
    assert done == [pytest.approx(stood[0] + 5 + (10 + made) * WORK.prefill + steps(50 - made, 1, 10 + made))]


# -- lengths


@pytest.mark.parametrize(("mean", "sigma"), [(100.0, 0.5), (900.0, 0.8), (1000.0, 0.0), (1500.0, 1.0)])
def test_lengths_have_the_mean_that_the_plan_expects(mean, sigma):
    settings_ = plan_of(f"align.mean_tokens={mean}", f"align.sigma={sigma}", "align.new_tokens=2000").align
    drawn = lengths(settings_, 4096, 0, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(mean, rel=5e-3) and drawn.max() <= 2000 and drawn.min() >= 1
    grown = lengths(settings_.but(growth=0.2), 4096, 50, np.random.default_rng(1))
    assert grown.mean() == pytest.approx(1.1 * mean, rel=5e-3)


def test_lengths_that_were_seen_keep_their_tail(tmp_path):
    """As many completions as the file has are the file; more or fewer have its quantiles, growth scales them, and new_tokens cuts them."""
    counts = [3, 5, 8, 13, 21, 34, 900, 5000]
    (tmp_path / "seen.csv").write_text("id,made\n" + "".join(f"{i},{count}\n" for i, count in enumerate(reversed(counts))))
    own = plan_of("align.mean_tokens=null", f"align.lengths={tmp_path / 'seen.csv'}:made", "align.new_tokens=2000")
    drawn = lengths(own.align, 8, 0, np.random.default_rng(1))
    assert sorted(drawn) == [*counts[:-1], 2000] and own.align.expected == np.mean(sorted(drawn))
    assert sorted(lengths(own.align.but(growth=1.0), 8, 100, np.random.default_rng(1))) == [2 * count for count in counts[:-2]] + [
        1800,
        2000,
    ]
    assert lengths(own.align, 4096, 0, np.random.default_rng(1)).mean() == own.align.expected
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "prompts": [1]}\n' + "".join(
        json.dumps({"tokens": list(range(count)), "reward": 1.0}) + "\n" for count in counts))  # fmt: skip
    journal = own.but(**{"align.lengths": str(tmp_path / "samples.jsonl")})
    assert journal.align.expected == own.align.expected and live(journal).tokens == live(own).tokens
    before = own.id
    (tmp_path / "seen.csv").write_text("made\n7\n")
    assert plan_of("align.mean_tokens=null", f"align.lengths={tmp_path / 'seen.csv'}").id != before  # what the file holds is in the id


@pytest.mark.parametrize(("content", "column", "said"), [
    (None, "", "is no file"), ("", "", "holds no token counts"), ("made\n", "", "holds no token counts"),
    ("a,b\n1,2\n", "", "has the columns a, b; choose one with"), ("a,b\n1,2\n", ":c", "is no column of the file; it has a, b"),
    ("made\n12\nmany\n", "", "line 3: 'many' is no count of tokens"), ("12\n-1\n", "", "line 2: -1 is no count of tokens"),
    ('{"tokens": 3}\n{"text": "x"}\n', "", "line 2 has no tokens; it has text"), ('{"tokens": 3}\n{"tok', "", "line 2: "),
])  # fmt: skip
def test_a_file_of_lengths_that_is_none_is_one_line(foretold, tmp_path, content, column, said):
    if content is not None:
        (tmp_path / "seen").write_text(content)
    status, _, err = foretold("sim", *GRPO, "align.mean_tokens=null", f"align.lengths={tmp_path / 'seen'}{column}")
    assert status == 2 and said in err and len(err.splitlines()) == 1


@pytest.mark.skipif(not SERVING.is_dir(), reason="needs ../shared/data/serving")
def test_measured_lengths_are_no_lognormal():
    """Answers of a public service (Splitwise, 19,366 conversations) end at 1,000 tokens: a lognormal of their mean and spread has a tail
    that they have not, and engines would be busy for a third longer."""
    file = SERVING / "splitwise_conv.csv"
    own = plan_of("align.mean_tokens=null", f"align.lengths={file}:num_decode_tokens")
    seen = pd.read_csv(file)["num_decode_tokens"]
    drawn = lengths(own.align, 2048, 0, np.random.default_rng(1))
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(drawn, quantile) == pytest.approx(seen.quantile(quantile), rel=0.02, abs=1)
    assert drawn.mean() == pytest.approx(seen.mean(), rel=0.01)
    lognormal = live(plan_of(f"align.mean_tokens={seen.mean()}", f"align.sigma={np.log(seen).std()}"))
    told = live(own)
    assert told.busy < 0.8 * lognormal.busy and told.tail / told.busy < 0.8 * lognormal.tail / lognormal.busy


# -- the loop


PLACED = [("colocated", ""), ("split_ref", ""), ("disaggregated", ""), ("async", "pace"), ("async", "discard")]


@settings(max_examples=40, deadline=None)
@given(placed=st.sampled_from(PLACED), staleness=st.integers(0, 8), share=st.sampled_from([0.25, 0.5, 0.75]), partial=st.booleans(),
       sigma=st.sampled_from([0.0, 0.5, 1.0]), slots=st.sampled_from([4, 64]), mean=st.sampled_from([100, 1000]))  # fmt: skip
def test_nothing_is_lost_and_nothing_is_older_than_the_bound(placed, staleness, share, partial, sigma, slots, mean):
    placement, stale = placed
    plan = plan_of(f"align.placement={placement}", f"align.staleness={staleness}", f"align.rollout_share={share}", "align.score_share=0.25",
                   f"align.partial={str(partial).lower()}", f"align.sigma={sigma}", f"align.slots={slots}", f"align.mean_tokens={mean}",
                   *([f"align.stale={stale}"] if stale else []))  # fmt: skip
    lived = live(plan)
    assert lived.made == lived.trained + lived.discarded + lived.flying
    assert max(lived.stale) <= plan.align.lag and min(lived.stale) >= 0
    shares = ages(lived.stale, plan.align.lag)
    assert len(shares) == (plan.align.lag + 1) * (plan.align.lag > 0)
    assert not shares or math.isclose(sum(i * share for i, share in enumerate(shares.values())), np.mean(lived.stale), abs_tol=1e-9)
    assert math.isclose(sum(lived.spent.values()), plan.ranks * lived.wall, rel_tol=1e-9)
    assert min(lived.spent.values()) > -1e-6
    assert (lived.discarded == 0) or stale == "discard"
    assert len(lived.stale) == lived.steps * plan.align.sequences


def test_generation_that_waits_is_the_sum_and_that_which_runs_ahead_the_longer():
    """Constant lengths, apart: in step generation and training come one after the other, ahead of it the longer of them remains."""
    words = ("align.sigma=0", "align.mean_tokens=1000")
    apart, ahead = (live(plan_of(*words, f"align.placement={placement}")) for placement in ("disaggregated", "async"))
    told = apart.parts
    work = told.train + told.scored + told.logprob
    generation = apart.busy / apart.generators / apart.steps
    assert apart.step_time == pytest.approx(generation + work + told.sync.seconds, rel=1e-3)
    assert ahead.step_time == pytest.approx(max(generation, work) + told.sync.seconds, rel=0.05)


def test_colocated_is_the_sum_of_its_parts():
    lived = live(plan_of("align.sigma=0"))
    told, generation = lived.parts, lived.busy / lived.generators / lived.steps
    expected = generation + told.train + told.scored + told.logprob + told.swap + told.sync.seconds
    assert lived.step_time == pytest.approx(expected, rel=1e-3)


def test_running_ahead_pays_where_generation_is_long_and_not_where_trainers_are_few():
    long, short = ("align.mean_tokens=1000", "align.rollout_share=0.25"), ("align.mean_tokens=50", "align.rollout_share=0.75")
    placements = ("colocated", "disaggregated", "async")
    for words, wins in ((long, True), (short, False)):
        together, apart, ahead = (live(plan_of(f"align.placement={name}", *words)).step_time for name in placements)
        assert ahead < apart and (ahead < together) == wins


def test_a_discarding_queue_throws_away_what_pacing_never_begins():
    words = ("align.placement=async", "align.rollout_share=0.75", "align.staleness=1", "align.mean_tokens=100")
    paced, discarding = live(plan_of(*words)), live(plan_of(*words, "align.stale=discard"))
    assert paced.discarded == 0 < discarding.discarded
    assert discarding.made > paced.made and discarding.step_time == pytest.approx(paced.step_time, rel=0.1)


def test_interrupting_beats_draining_where_the_tail_is_long():
    words = ("align.placement=async", "align.staleness=4", "align.sigma=1.0", "align.rollout_share=0.25", "align.mean_tokens=800")
    interrupted, drained = (live(plan_of(*words, f"align.partial={partial}")) for partial in ("true", "false"))
    assert interrupted.step_time < drained.step_time


def test_ranks_that_share_cores_gain_nothing_by_working_at_once():
    """Four ranks on two cores: in step each role has the cores to itself, ahead of it they take turns."""
    laptop = load(["align=grpo", "cluster.gpus_per_node=4", "cluster.cores_per_node=2", "train.global_batch=8", "align.prompts=32"])
    apart, ahead = (live(laptop.but(**{"align.placement": placement})).step_time for placement in ("disaggregated", "async"))
    assert ahead == pytest.approx(apart, rel=0.05)
    roomy = [laptop.but(**{"align.placement": placement, "cluster.cores_per_node": 4}) for placement in ("disaggregated", "async")]
    assert live(roomy[1]).step_time < 0.8 * live(roomy[0]).step_time


def test_training_is_slowed_only_while_engines_share_its_cores():
    """Three ranks on two cores: while two generate each has two thirds of a core, which costs the trainer half of their time alone."""
    words = ["align=grpo", "cluster.gpus_per_node=3", "cluster.cores_per_node=2", "train.global_batch=6", "align.prompts=32"]
    apart, ahead = (live(load([*words, f"align.placement={placement}"])) for placement in ("disaggregated", "async"))
    assert (len(ahead.plan.roles.trainers), ahead.generators) == (1, 2)
    generated = apart.busy / apart.generators / apart.steps
    assert ahead.parts.train == pytest.approx(apart.parts.train + 0.5 * generated, rel=1e-6)
    assert ahead.step_time < apart.step_time - 0.4 * generated


def test_more_staleness_never_costs_time():
    """Long tails and engines that are short of time: each step of staleness lets them be filled better, until training is the limit."""
    words = ("align.placement=async", "align.rollout_share=0.25", "align.sigma=1.0", "align.mean_tokens=1500")
    steps_ = [live(plan_of(*words, f"align.staleness={staleness}")).step_time for staleness in (0, 1, 2, 4, 8)]
    assert all(later <= 1.02 * earlier for earlier, later in pairwise(steps_)) and steps_[-1] < 0.7 * steps_[0]


def test_an_even_tail_is_no_tail():
    assert live(plan_of("align.sigma=0")).tail == 0 < live(plan_of("align.sigma=1")).tail


def test_a_longer_window_says_the_same(monkeypatch):
    words = ("align.placement=async", "align.staleness=2", "align.rollout_share=0.25")
    short = live(plan_of(*words)).step_time
    monkeypatch.setattr("sim.align.MEASURED", 24)
    assert live(plan_of(*words)).step_time == pytest.approx(short, rel=0.03)


# -- what strikes it


FREE = {f"failures.{phase}": 0.0 for phase in ("detect", "abort", "diagnose", "reallocate", "init")}


def struck(mtbf, down, every, steps):
    """A plan of so many steps under one cause without memory, and rates with which only saving takes time."""
    plan = plan_of(f"align.steps={steps}").but(**FREE | {"failures.detect": down, "checkpoint.every": every,
                                                         "failures.causes": {"fault": Cause(per="job", rate=1 / mtbf)}})  # fmt: skip
    return plan, replace(rates(plan), storage_read=math.inf, load_start=0.0, load_tensor=0.0, init=0.0)


@pytest.mark.parametrize(("mtbf", "down", "every"), [(800.0, 60.0, 20), (2000.0, 300.0, 10), (500.0, 5.0, 50)])
def test_falls_cost_what_mathematics_says(mtbf, down, every):
    """Failures without memory, also while it restarts, saves of C every tau: each stretch takes M e^(R / M) (e^((tau + C) / M) − 1) on
    average (Daly 2006, equation 13)."""
    plan, speed = struck(mtbf, down, every, 400)
    lives = [run(plan, 10.0, seed=seed, speed=speed) for seed in range(100)]
    walls, saves = np.array([life.wall for life in lives]), 400 // every
    expected = saves * mtbf * math.exp(down / mtbf) * math.expm1((every * 10.0 + save(plan, speed)) / mtbf)
    assert abs(walls.mean() - expected) < 4 * walls.std(ddof=1) / math.sqrt(len(walls)), (walls.mean(), expected)
    assert run(plan, 10.0, seed=3, speed=speed) == lives[3] and len({life.wall for life in lives}) > 50


def test_steps_done_again_wait_for_no_samples_where_a_journal_has_them():
    """One fall: what is replayed are whole steps at their own pace, and the part of the step that was torn."""
    plan, speed = struck(3000.0, 10.0, 50, 100)
    for seed in range(40):
        usual, quick = (run(plan, 10.0, again, seed, speed) for again in (1.0, 0.25))
        if usual.interruptions == quick.interruptions == 1:
            torn = usual.replayed % 10.0
            assert quick.replayed == pytest.approx((usual.replayed - torn) * 0.25 + torn)
            assert usual.wall - quick.wall == pytest.approx(0.75 * (usual.replayed - torn))
    assert sum(run(plan, 10.0, 0.25, seed, speed).wall < run(plan, 10.0, 1.0, seed, speed).wall for seed in range(40)) > 10


@pytest.mark.parametrize("how", ["stop", "slow", "corrupt", "hang"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_time_is_conserved_whatever_strikes(how, asynchronous):
    """Each life asserts it of itself; some of them are struck."""
    causes = {"server": Cause(per="node", rate=1 / 10_000, how=how, factor=1.3, silent=True), "device": Cause(per="gpu", rate=1 / 100_000)}
    plan = plan_of("align.steps=300").but(**{"checkpoint.every": 10, "checkpoint.asynchronous": asynchronous, "cluster.spares": 1,
                                             "failures.causes": causes})  # fmt: skip
    lives = [run(plan, 30.0, again, seed) for again in (1.0, 0.3) for seed in range(8)]
    assert all(life.useful == pytest.approx(300 * 30.0) for life in lives)
    assert sum(life.interruptions for life in lives) > 4 and any(life.dragged > 0 for life in lives) == (how == "slow")


def test_without_causes_nothing_strikes_and_with_them_the_stage_is_told_whole():
    quiet = plan_of("align.placement=async", "align.steps=200")
    told = align(quiet)
    assert not {"goodput", "lost", "interruptions"} & set(told)
    stormy = quiet.but(**{"failures.causes": {"gpu": Cause(per="gpu", rate=1 / (16 * 2 * told["seconds"] / 10))}, "checkpoint.every": 10})
    lives = [align(stormy, seed) for seed in range(6)]
    for life in lives:
        assert {name: life[name] for name in told if name not in ("seconds", "cost", "energy")} == {
            name: value for name, value in told.items() if name not in ("seconds", "cost", "energy")}  # fmt: skip
        assert life["seconds"] > told["seconds"] and life["seconds"] > life["lost"] + life["goodput"] * life["seconds"]
        assert life["cost"] == pytest.approx(told["cost"] * life["seconds"] / told["seconds"])
        assert told["energy"] < life["energy"] < told["energy"] * life["seconds"] / told["seconds"]
    assert align(stormy, 4) == lives[4] and len({life["seconds"] for life in lives}) == len(lives)
    assert sum(life["interruptions"] for life in lives) > 6


def test_lives_of_an_alignment_are_told_with_their_band(foretold):
    words = ("failures=opt_175b", "checkpoint.every=20", "align.steps=40", "replicas=8", "json=true")
    status, out, _ = foretold("sim", *GRPO, *words, "failures.causes.host.rate='2 1/d'")
    told = json.loads(out)["quantities"]
    assert status == 0 and told["align.seconds"]["low"] < told["align.seconds"]["high"] and told["align.interruptions"]["high"] >= 1
    status, _, err = foretold("sim", *GRPO, "failures=opt_175b", "checkpoint.every=50", "align.steps=40")
    assert status == 2 and "checkpoint.every=50 is longer than the run, align.steps=40" in err


# -- parts, sync and memory


def test_each_pass_is_counted_once():
    plain, reference, corrected = (parts(plan_of(*words)) for words in (
        ("align.reference=none", "align.correction=none"), ("align.correction=none",), ("align.reference=none",)))  # fmt: skip
    assert plain.logprob == plain.scored == 0
    assert reference.score > 0 == reference.logprob and corrected.logprob > 0 == corrected.score
    assert corrected.logprob == reference.score < plain.train / 2  # a forward pass beside three or four
    lora = parts(plan_of("align.tune=lora", "align.reference=adapter_off"))
    assert lora.judge > 0 == lora.score
    ppo = parts(
        plan_of("align=ppo", "align.data=null", "align.reference=none", "align.group=1", "align.prompts=192", "align.micro_batch=1")
    )
    assert ppo.judge > 0 and ppo.train == pytest.approx(2 * ppo.step.step_time)


def test_a_sync_sends_what_its_kind_says():
    plan = plan_of("align.placement=async")
    whole = 2 * parameters(plan.model)
    assert sync(plan).bytes == whole
    adapted = plan_of("align.placement=async", "align.tune=lora", "align.sync=adapters", "align.reference=none")
    assert sync(adapted).bytes == 2 * adapter_parameters(plan.model, adapted.align.targets, adapted.align.rank)
    assert sync(plan_of("align.placement=async", "align.sync=delta")).bytes == pytest.approx(whole * CHANGED * (2 + PLACE) / 2)
    full, tensors, sharded = (sync(plan_of("align.placement=async", "align.engine_tp=2", f"align.sync={kind}"))
                              for kind in ("full", "per_tensor", "sharded"))  # fmt: skip
    assert tensors.pieces > full.pieces * 1.0 and sharded.seconds < full.seconds <= tensors.seconds
    assert sync(adapted).seconds < 0.1 * full.seconds


def test_roles_hold_what_they_must():
    plan = plan_of("align.placement=async", "align.slots=16")
    held = roles(plan, plan.aligned)
    assert held.trainer == float(memory(columns([plan.aligned])).total.max())
    cache = 16 * plan.align.longest * cached(plan)
    assert cached(plan) == 32 * 2 * 8 * 128 * 2  # Llama 3 8B: 131,072 bytes a token
    assert held.generator == 2 * parameters(plan.model) + 4 * 16 * plan.model.vocab + cache
    halves = plan_of("align.placement=async", "align.slots=16", "align.engine_tp=2")
    assert roles(halves, halves.aligned).generator == held.generator / 2
    fuller = plan_of("align.offload=false", "align.slots=16")
    assert roles(fuller, fuller.aligned).room < held.room  # what trainers keep takes room from the cache
    lora = plan_of("align.tune=lora", "align.reference=adapter_off", "align.placement=async")
    assert roles(lora, lora.aligned).trainer < held.trainer and roles(lora, lora.aligned).scorer == 0


def test_what_does_not_fit_is_said_with_what_would(foretold):
    assert misfits(plan_of()) == []
    large = ("model=llama3_70b", "align.placement=async", "align.tune=lora", "align.reference=adapter_off")
    (line,) = misfits(plan_of(*large))
    assert "a generator has room for 0 tokens of 80.7 GB usable on each h100-sxm" in line
    assert line.endswith("set align.engine_tp=2") and misfits(plan_of(*large, "align.engine_tp=2")) == []
    status, _, err = foretold("sim", *GRPO, "model=llama3_70b", "align.engine_tp=8", "json=true")
    assert status == 0 and "alignment does not fit: training needs" in err and "align.tune=lora or a mesh that cuts more" in err


def test_preferences_are_an_update_and_the_references_pass():
    base = ["experiment=llama3_8b_grpo", "align=dpo", "align.data=null", "align.prompts=96", "align.micro_batch=2",
            "train.global_batch=192"]  # fmt: skip
    by = {name: align(load([*base, *words])) for name, words in {
        "model": (), "asked once": ("align.reference=precomputed",), "apart": ("align.placement=split_ref", "align.score_share=0.25"),
        "off": ("align.tune=lora", "align.reference=adapter_off")}.items()}  # fmt: skip
    assert by["model"]["step_time"] == pytest.approx(by["asked once"]["step_time"] + by["model"]["score_time"])
    assert by["asked once"]["score_time"] == by["asked once"]["scorer_memory"] == 0
    assert by["off"]["score_time"] > 0 == by["off"]["scorer_memory"]
    assert by["apart"]["idle_time"] > 0
    for told in by.values():
        assert sum(told[f"{name}_time"] for name in ("train", "score", "idle")) == pytest.approx(told["step_time"])


# -- what a person sees


def test_the_stage_is_told_and_costs_nothing_when_it_is_off(foretold):
    status, out, _ = foretold("sim", *GRPO, "json=true")
    told = json.loads(out)["quantities"]
    assert status == 0
    each = sum(told[name]["value"] for name in told if name.startswith("align.") and name.endswith("_time") and name != "align.step_time")
    assert each == pytest.approx(told["align.step_time"]["value"])
    assert told["align.seconds"]["value"] == pytest.approx(rates(load(GRPO)).init + 40 * told["align.step_time"]["value"], rel=0.01)
    status, out, _ = foretold("sim", *GRPO)
    assert status == 0 and "\nalignment\n" in out and "generator utilisation" in out
    status, out, _ = foretold("sim", "json=true")
    assert status == 0 and not any(name.startswith("align.") for name in json.loads(out)["quantities"])


def test_how_many_samples_are_how_old_is_one_line(foretold):
    status, out, _ = foretold("sim", *GRPO, "align.placement=async", "align.staleness=2", "align.sigma=1.0")
    (line,) = (line for line in out.splitlines() if line.startswith("  samples by staleness"))
    shares = [int(part.split()[-1].rstrip("%")) for part in line.split(", ")]
    assert status == 0 and len(shares) == 3 and abs(sum(shares) - 100) <= 1
    assert ages([0, 12, 9], 12) == {f"stale_{age}": (1 / 3 if age == 0 else 0.0) for age in range(9)} | {"stale_more": 2 / 3}


def test_a_sweep_shows_the_stage_that_it_varies(foretold, tmp_path):
    status, out, _ = foretold("sim", "-m", *GRPO, "align.placement=async", "align.rollout_share=0.25,0.5")
    assert status == 0 and "generator utilisation" in out.splitlines()[0] and "mfu" not in out.splitlines()[0]
    (line,) = (line for line in out.splitlines() if line.startswith("table: "))
    frame = pd.read_parquet(line.removeprefix("table: "))
    assert len(frame) == 2 and frame["align.step_time"].nunique() == 2
    assert foretold("analysis", "sweep", "out=picture.png")[0] == 0 and (tmp_path / "picture.png").is_file()


# -- measured products


@pytest.mark.skipif(not SERVING.is_dir(), reason="needs ../shared/data/serving")
@pytest.mark.parametrize(("gpu", "file", "most"), [("h100_sxm", "h100", 0.12), ("a100_80", "a100", 0.10)])
def test_the_knee_is_that_of_measured_products(gpu, file, most):
    """Vidur's times of Llama 2's matrix products by tokens and tensor parallelism, with the rates that conf/gpu has from trainings."""
    device = load([f"gpu={gpu}"], rules=lambda _: []).gpu
    found = []
    for size in ("7b", "70b"):
        frame = pd.read_csv(SERVING / f"{file}_Llama-2-{size}-hf_mlp.csv")
        h, ffn, tp, n = (frame[name].to_numpy(float) for name in ("n_embd", "n_expanded_embd", "num_tensor_parallel_workers", "num_tokens"))
        shapes = {"mlp_up_proj": (2 * ffn / tp, h), "mlp_down_proj": (h, ffn / tp), "attn_post_proj": (h, h / tp)}
        for name, (outputs, inputs) in shapes.items():
            moved = 2 * (outputs * inputs + n * (outputs + inputs)) / (device.memory_bandwidth * device.memory_efficiency)
            told = knee(moved, 2 * n * outputs * inputs / (device.bf16_peak * device.gemm_efficiency)) + 5e-6  # a launch
            seen = frame[f"time_stats.{name}.median"].to_numpy(float) * 1e-3
            found.append((told / seen - 1)[seen > 0])
    assert np.abs(np.concatenate(found)).mean() < most
