"""Prediction beside measurement, from records written as sim and real write them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import plot
from analysis.compare import STAGES, columns, large, learning, quantities, sentence, states, stragglers, unaccounted, verdict
from analysis.figures import figures
from analysis.pair import open_pair
from analysis.report import page
from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from conf.profile import Parameter, Profile, profile_yaml
from conf.program import load, to_yaml
from conf.record import STATES, Record, Value, seal, summarise
from conf.schema import groups, keys

Foretold = Callable[..., tuple[int, str, str]]
PREDICTED = {"init": 2.0, "compute": 16.0, "communication": 2.0}  # rank-seconds of 2 ranks over 10 s
STEPS = (0.9, 1.0, 1.1, 1.3)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load(["train.steps=8", "train.warmup=2"])


def predict(runs: Path, plan: Plan) -> Path:
    """A prediction: steps of 1 s, 8 of them, and 10 s in all."""
    folder = runs / plan.id / "sim"
    record = Record(folder, rank=None, live=False)
    record.event("run", "start", at=0.0)
    record.event("pretrain", "start", at=1.0)
    record.event("pretrain", "checkpoint", step=8, at=9.5)
    record.event("pretrain", "end", at=10.0)
    record.event("run", "end", at=10.0)
    for state, seconds in PREDICTED.items():
        record.observe("pretrain", state, seconds, at=10.0)
    for at, watts in ((0.0, 12.0), (1.0, 25.0)):
        record.observe("pretrain", "power", watts, at=at)
    write(folder / "plan.yaml", to_yaml(plan))
    seal(folder, [record])
    told: Mapping[str, float | Value] = {
        "pretrain.step_time": Value(1.0, 0.9, 1.05), "run.wall_clock": 10.0, "run.energy": 200.0, "run.interruptions": 0.0,
        "run.cost": Value(0.5, 0.2, 2.0), "run.carbon_location": 30.0, "run.carbon_embodied": 4.0, "state.compute": 16.0,
    }  # fmt: skip
    summarise(folder, plan.id, "sim", told)
    return folder


def measure(runs: Path, plan: Plan, finish: bool = True, step_time: float = 1.1) -> Path:
    """A measurement: four steps of two ranks, half of each in computing."""
    folder = runs / plan.id / "real"
    ranks = [Record(folder, rank=rank) for rank in range(2)]
    ranks[0].event("run", "start", at=0.0)
    ranks[0].event("pretrain", "start", at=0.0)
    at = 0.0
    for step, seconds in enumerate(STEPS, 1):
        at += seconds
        for record in ranks:
            record.observe("pretrain", "step_time", seconds + 0.5 * (record.rank or 0), step, at)
            record.observe("pretrain", "compute", seconds / 2, step, at)
            record.observe("pretrain", "communication", seconds / 2, step, at)
        ranks[0].observe("pretrain", "loss", 8.0 - step, step, at)
    ranks[0].observe("pretrain", "held_out_loss", 4.1, len(STEPS), at)
    ranks[0].event("pretrain", "failure", step=2, at=2.0, cause="killed")
    if finish:
        ranks[0].event("run", "end", at=at)
    for record in ranks:
        record.flush()
    write(folder / "plan.yaml", to_yaml(plan))
    if finish:
        seal(folder)
        told: Mapping[str, float | Value] = {
            "pretrain.step_time": step_time, "run.wall_clock": at, "pretrain.final_loss": 4.1, "run.interruptions": 1.0,
            "pretrain.held_out_bits_per_byte": 2.05, "pretrain.bigram_bits_per_byte": 2.5,
        }  # fmt: skip
        summarise(folder, plan.id, "real", told)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def both(runs: Path, plan: Plan) -> Path:
    predict(runs, plan)
    measure(runs, plan)
    return runs


def test_ratio_is_measured_over_predicted(both: Path, plan: Plan) -> None:
    rows = {row.name: row for row in quantities(open_pair(str(both), ""))}
    assert rows["pretrain.step_time"].ratio == pytest.approx(1.1)
    assert rows["run.wall_clock"].ratio == pytest.approx(0.43)
    assert (rows["pretrain.step_time"].low, rows["pretrain.step_time"].high) == (0.9, 1.05)
    assert rows["run.energy"].measured is rows["run.energy"].ratio is rows["pretrain.final_loss"].predicted is None
    assert rows["run.interruptions"].ratio is None  # nothing was predicted to happen: no ratio
    assert "state.compute" not in rows
    assert [name.partition(".")[0] for name in rows] == sorted((n.partition(".")[0] for n in rows), key=STAGES.index)


def test_states_add_up_to_ranks_times_wall_clock(both: Path) -> None:
    pair = open_pair(str(both), "")
    found = {state.name: state for state in states(pair)}
    assert sum(s.predicted or 0 for s in found.values()) == pytest.approx(2 * 10.0)
    assert sum(s.measured or 0 for s in found.values()) == pytest.approx(2 * sum(STEPS))
    assert found["compute"].difference == pytest.approx(sum(STEPS) - 16)
    assert found["init"].measured == 0
    assert sum(s.share for s in found.values()) == pytest.approx(1)
    assert unaccounted(pair) == []


def test_keeping_a_slow_rank_has_a_price(both: Path, plan: Plan) -> None:
    record = Record(both / plan.id / "real", rank=0)
    record.event("pretrain", "straggler", 4, culprit=1, factor=1.8, cost=0.5)
    record.flush()
    (said,) = stragglers(open_pair(str(both), ""))  # 4 more steps of 1 s, as foretold
    assert said.startswith("Rank 1 was slow by step 4, 1.8 times the work of the others: steps 50% longer; kept for the 4 that followed")
    assert "costs 2 s and" in said


def test_time_in_no_state_is_said(runs: Path, plan: Plan) -> None:
    folder = predict(runs, plan)
    record = Record(folder, rank=None)
    record.event("run", "end", at=12.5)
    record.flush()
    assert unaccounted(open_pair(str(runs), "")) == ["20.0% of the predicted time is in no state."]


def test_verdict_in_one_sentence(both: Path, plan: Plan) -> None:
    assert verdict(open_pair(str(both), "")) == (
        "A step took 1.1 s, where 1 s was predicted: 10.0% longer than predicted, outside the predicted 10–90% band (900 ms – 1.05 s)."
    )
    measure(both, plan, step_time=0.95)
    assert verdict(open_pair(str(both), "")).startswith("A step took 950 ms, where 1 s was predicted: 5.0% shorter than predicted, inside")
    assert learning(open_pair(str(both), "")) == (
        "On text that it never saw, the model needs 2.05 bit/B: 18% less than a bigram of the same tokens (2.5 bit/B)."
    )


def test_where_only_an_alignment_was_measured_that_is_told(runs: Path, plan: Plan) -> None:
    folder = predict(runs, plan)
    told: Mapping[str, float | Value] = {
        "pretrain.step_time": 1.0,
        "align.step_time": 0.5,
        "align.energy": 3.0,
        "align.held_out_reward": 0.9,
    }
    summarise(folder, plan.id, "sim", {name: value for name, value in told.items() if name != "align.held_out_reward"})
    summarise(measure(runs, plan), plan.id, "real", {"align.step_time": 0.6, "align.held_out_reward": 0.9})
    pair = open_pair(str(runs), "")
    assert verdict(pair) == "A step of alignment took 600 ms, where 500 ms was predicted: 20.0% longer than predicted."
    text = " ".join(checked(page(pair)).text)
    assert (
        "Only predicted, not measured: all of pretrain, align.energy." in text and "Step of alignment" in text and "Held-out reward" in text
    )


def test_compare_prints_tables_and_both_sums(both: Path, plan: Plan, foretold: Foretold) -> None:
    status, out, err = foretold("analysis", "compare", f"runs={both}")
    assert (status, err) == (0, "")
    assert out.startswith(f"{plan.id}  {sentence(plan)}\n")
    cells = {line.split("  ")[0]: [cell.strip() for cell in line.split("  ")[1:] if cell.strip()] for line in out.splitlines()}
    assert cells["pretrain.step_time"] == ["1 s", "900 ms – 1.05 s", "1.1 s", "1.100"]
    assert cells["run.energy"] == ["0.0556 Wh", "–", "–", "–"]
    assert cells["sum"] == cells["2 ranks × wall clock"] == ["20 s", "8.6 s"]


def test_json_is_one_object(both: Path, plan: Plan, foretold: Foretold) -> None:
    status, out, _ = foretold("analysis", "compare", f"runs={both}", "json=true")
    told = json.loads(out)
    assert status == 0
    assert (told["plan"], told["unfinished"]) == (plan.id, False)
    step = {"unit": "s", "predicted": 1.0, "low": 0.9, "high": 1.05, "measured": 1.1, "ratio": 1.1}
    assert told["quantities"]["pretrain.step_time"] == pytest.approx(step)
    assert told["states"]["communication"] == pytest.approx({"predicted": 2.0, "measured": 4.3, "difference": 2.3, "share": 0.5})


@pytest.mark.parametrize(("write_side", "said"), [(predict, "nothing was measured: run foretold real"), (measure, "nothing was predicted")])
def test_one_side_alone(runs: Path, plan: Plan, write_side: Callable[[Path, Plan], Path], said: str, foretold: Foretold) -> None:
    write_side(runs, plan)
    status, out, _ = foretold("analysis", "compare", f"runs={runs}")
    assert status == 0
    assert said in out
    assert foretold("analysis", "report", f"runs={runs}")[0] == 0


def test_unfinished_run_is_compared_as_far_as_it_got(runs: Path, plan: Plan, foretold: Foretold) -> None:
    predict(runs, plan)
    folder = measure(runs, plan, finish=False)
    with (folder / "ledger.rank0.jsonl").open("a") as out:
        out.write('{"at": 4.9, "stage": "pretrain", "quanti')
    pair = open_pair(str(runs), "")
    assert pair.real
    assert not pair.real.finished
    assert pair.real.value("pretrain.step_time") == pytest.approx(1.05)  # rank 0's median of 0.9, 1.0, 1.1, 1.3
    assert pair.real.last_step == 4
    assert sum(s.measured or 0 for s in states(pair)) == pytest.approx(2 * sum(STEPS))
    status, told, _ = foretold("analysis", "compare", f"runs={runs}")
    assert status == 0
    assert "unfinished (4 steps so far)" in told
    assert json.loads(foretold("analysis", "compare", f"runs={runs}", "json=true")[1])["unfinished"] is True
    assert "did not reach its end" in page(pair)


def test_a_step_done_twice_counts_as_done_last(runs: Path, plan: Plan) -> None:
    folder = measure(runs, plan, finish=False)
    again = Record(folder, rank=0)
    again.observe("pretrain", "step_time", 7.0, step=4, at=99.0)
    again.flush()
    real = open_pair(str(runs), "").real
    assert real
    assert real.series("pretrain", "step_time") == [(1.0, 0.9), (2.0, 1.0), (3.0, 1.1), (4.0, 7.0)]


def test_a_loss_that_was_not_finite_is_left_out(runs: Path, plan: Plan) -> None:
    folder = measure(runs, plan, finish=False)
    record = Record(folder, rank=0)
    record.observe("pretrain", "loss", float("nan"), step=5, at=5.0)
    record.flush()
    pair = open_pair(str(runs), "")
    assert pair.real
    assert len(pair.real.series("pretrain", "loss")) == len(STEPS)
    assert "What the model learns" in page(pair)


def test_default_plan_is_the_one_measured_last(runs: Path) -> None:
    older, measured, newer = (load([f"seed={seed}"]) for seed in (1, 2, 3))
    for age, plan in ((300, older), (200, measured), (100, newer)):
        folder = (predict if plan is newer else measure)(runs, plan)
        for path in folder.iterdir():
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert open_pair(str(runs), "").id == measured.id
    assert open_pair(str(runs), older.id).id == older.id


def refusal(*args: str, foretold: Foretold) -> str:
    """The one line that a refused command prints."""
    status, out, err = foretold("analysis", *args)
    assert (status, out) == (2, "")
    assert err.startswith("foretold analysis: ")
    assert err.count("\n") == 1
    return err


def test_nothing_to_compare(runs: Path, plan: Plan, foretold: Foretold) -> None:
    assert "foretold sim && foretold real" in refusal("compare", f"runs={runs}", foretold=foretold)
    (runs / plan.id / "measure").mkdir(parents=True)
    assert "holds neither" in refusal("compare", f"runs={runs}", f"plan={plan.id}", foretold=foretold)
    predict(runs, plan)
    assert f"did you mean {plan.id}?" in refusal("report", f"runs={runs}", f"plan={plan.id[:-1]}", foretold=foretold)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", b"{"),
        ("summary.json", b"\xff\xfe"),
        ("summary.json", b"[]"),
        ("summary.json", b'{"plan": "p1", "quantities": {"run.tokens": {"value": "many"}}}'),
        ("summary.json", b'{"plan": "p1", "quantities": [1]}'),
        ("summary.json", b'{"plan": "p1", "quantities": {}}'),
        ("ledger.parquet", b"PAR1"),
        ("events.parquet", b""),
        ("ledger.rank0.jsonl", b'{"at": 1.0}\n'),
        ("events.rank0.jsonl", b'{"at": 1.0}\n'),
        ("plan.yaml", b"a: [1"),
        ("plan.yaml", b"a: 1"),
    ],
)
def test_corrupt_files_are_one_clear_line(both: Path, plan: Plan, file: str, content: bytes, foretold: Foretold) -> None:
    folder = both / plan.id / "sim"
    (folder / file).write_bytes(content)
    said = refusal("compare", f"runs={both}", foretold=foretold)
    assert str(folder) in said
    assert "run" in said


def test_actions_options_and_help(foretold: Foretold) -> None:
    assert "did you mean compare?" in refusal("compar", foretold=foretold)
    assert "did you mean runs?" in refusal("report", "rnus=x", foretold=foretold)
    assert "json=maybe" in refusal("compare", "json=maybe", foretold=foretold)
    for args in ((), ("--help",), ("compare", "--help"), ("report", "-h"), ("calibrate", "--help")):
        status, out, _ = foretold("analysis", *args)
        assert status == 0
        assert "foretold analysis" in out


def test_actions_load_only_what_they_need() -> None:
    code = "import sys; from conf.program import main; main(['analysis', 'compare']); print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "torch", "simpy", "hydra", "scipy"} & set(out)


_LOADING = ("src", "srcset", "href", "xlink:href", "data", "action", "background", "poster")


class Checker(HTMLParser):
    """Balanced elements, unique ids, and whatever would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        self._attributes(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def _attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.loads += [value or "" for name, value in attrs if name in _LOADING and not (value or "").startswith("#")]
        assert not any(name.startswith("on") for name, _ in attrs)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert html.startswith("<!DOCTYPE html>")
    assert checker.open == checker.loads == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert "@import" not in html
    assert "url(http" not in html
    return checker


def test_page_is_whole_and_loads_nothing(both: Path, plan: Plan) -> None:
    pair = open_pair(str(both), "")
    text = " ".join(checked(page(pair)).text)
    titles = [figure.title for figure in figures(pair)]
    assert titles[:4] == ["What the model learns", "How long a step takes", "What happens when", "How much power it draws"]
    assert titles[4:] == ["Where the time goes", "Where the money goes", "What it emits"]
    assert all(title in text for title in titles)
    assert "Only predicted, not measured: run.energy, run.carbon_location, run.carbon_embodied, run.cost." in text
    assert f"Prices are of {plan.price.as_of}, the grid's intensity of world, 2023." in text


def test_page_names_every_source_and_key(both: Path, plan: Plan) -> None:
    text = "".join(checked(page(open_pair(str(both), ""))).text)
    for group, kind in groups().items():
        if "source" in kind.__dataclass_fields__:
            assert getattr(plan, group).source in text
        table = keys(kind)
        assert all(name.split(".")[-1] in text and means in text for name, (_, means, _) in table.items() if name != "source"), group
    assert "481 gCO2e/kWh" in text


def test_page_escapes_what_users_write(runs: Path, plan: Plan) -> None:
    hostile = "<script>alert('1')</script>&\"$a$"
    evil = plan.but(**{"model.name": hostile, "gpu.source": hostile, "data.path": hostile, "cluster.name": hostile})
    predict(runs, evil)
    folder = measure(runs, evil)
    record = Record(folder, rank=0)
    record.event("pretrain", hostile, at=1.0)
    record.flush()
    html = page(open_pair(str(runs), ""))
    assert "<script" not in html
    assert "".join(checked(html).text).count(hostile) >= 5  # title, sentence, source, value, and in the timeline


def test_same_records_same_bytes(both: Path, plan: Plan, foretold: Foretold) -> None:
    first, second = both / "a.html", both / "deep" / "b.html"
    for out in (first, second):
        assert foretold("analysis", "report", f"runs={both}", f"out={out}") == (0, f"{out}\n", "")
    assert first.read_bytes() == second.read_bytes()
    assert foretold("analysis", "report", f"runs={both}")[1] == f"{both / plan.id / 'report.html'}\n"
    assert (both / plan.id / "report.html").read_bytes() == first.read_bytes()


def test_figures_only_where_there_is_data(runs: Path, plan: Plan) -> None:
    measure(runs, plan)
    assert [figure.title for figure in figures(open_pair(str(runs), ""))][2:] == ["What happens when", "Where the time goes"]


def test_ages_of_samples_stand_side_by_side(runs: Path, plan: Plan) -> None:
    for folder, who, young in ((predict(runs, plan), "sim", 0.25), (measure(runs, plan), "real", 0.5)):
        told = json.loads((folder / "summary.json").read_text())["quantities"]
        kept = {name: quantity["value"] for name, quantity in told.items()}
        summarise(folder, plan.id, who, kept | {"align.stale_0": young, "align.stale_1": 1 - young})
    pair = open_pair(str(runs), "")
    rows = {row.name: (row.predicted, row.measured) for row in quantities(pair) if ".stale_" in row.name}
    assert rows == {"align.stale_0": (0.25, 0.5), "align.stale_1": (0.75, 0.5)}
    (svg,) = (figure.svg for figure in figures(pair) if figure.title == "How old samples are")
    assert svg.count("% of samples") == 1 and "predicted" in svg and "measured" in svg


def test_profile_is_shown(both: Path, plan: Plan) -> None:
    profile = Profile("bench", "x86_64 Linux", "2026-11-22", "fp32", 2, {"matmul.rate": Parameter(8.1e10, "FLOP/s", 1.2e9)})
    (both / plan.id / "real" / "profile.yaml").write_text(profile_yaml(profile))
    text = " ".join(checked(page(open_pair(str(both), ""))).text)
    assert "81 GFLOP/s" in text
    assert "± 1.2 GFLOP/s" in text
    (both / plan.id / "real" / "profile.yaml").write_text("a: [")
    with pytest.raises(Refused, match="is no profile"):
        page(open_pair(str(both), ""))


def test_bigram_is_drawn_in_nats(both: Path) -> None:
    svg = figures(open_pair(str(both), ""))[0].svg
    assert "bigram" in svg
    assert "currentColor" in svg
    assert "DejaVu" not in svg


def test_long_runs_make_small_figures() -> None:
    steps = [(float(step), 1.0 + step % 7 / 10) for step in range(100_000)]
    assert len(plot.step_time(steps, 1.2, (1.0, 1.5))) < 60_000
    failures = [float(at) for at in range(0, 10**6, 50)]
    assert len(plot.timeline({"pretrain": {"predicted": (0.0, 1e6)}}, {"failure": {"predicted": failures}})) < 60_000


def test_every_state_has_a_colour() -> None:
    assert set(STATES) < set(plot.STATE_COLOURS)
    assert len(set(plot.STATE_COLOURS.values())) == len(plot.STATE_COLOURS)


def test_columns_and_large_counts() -> None:
    assert columns([("a", "b"), ("long", "1"), ("x", "22")]) == ["a      b", "────  ──", "long   1", "x     22"]
    assert [large(n) for n in (1500, 2_020_000, 8.03e9, 405_853_388_800)] == ["1.5 k", "2.0 M", "8.0 B", "406 B"]
