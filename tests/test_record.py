"""The record: lines while it lives, Parquet after, readable whatever happens in between."""

import json

import pytest

from conf.errors import Refused
from conf.files import write
from conf.record import QUANTITIES, STATES, Record, Value, read, read_summary, seal, state_totals, summarise


def observed(folder, ranks=2):
    for rank in range(ranks):
        record = Record(folder, rank)
        for step in range(3):
            record.observe("pretrain", "loss", 5.0 - step, step, at=float(step))
            record.observe("pretrain", "compute", 0.5, step, at=float(step))
        record.event("pretrain", "end", 3, reason="done")
        record.span("step 1", 0.0, 0.5, "pretrain", 1)
        record.flush()


def test_lines_and_parquet_read_the_same(tmp_path):
    observed(tmp_path)
    alive = sorted(read(tmp_path, "ledger"), key=str)
    seal(tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    assert sorted(read(tmp_path, "ledger"), key=str) == alive and len(alive) == 12
    assert state_totals(alive) == {"compute": 3.0}
    assert json.loads(read(tmp_path, "events")[0]["detail"]) == {"reason": "done"}
    bars = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {b["tid"] for b in bars} == {"rank 0", "rank 1"} and bars[0]["dur"] == 500000


def test_a_torn_last_line_is_dropped(tmp_path):
    observed(tmp_path, ranks=1)
    path = tmp_path / "ledger.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert len(read(tmp_path, "ledger")) == 5
    observed(tmp_path, ranks=1)  # the next attempt begins on a line of its own
    assert len(read(tmp_path, "ledger")) == 11
    seal(tmp_path)
    assert len(read(tmp_path, "ledger")) == 11


def test_a_later_attempt_adds_to_a_sealed_record(tmp_path):
    observed(tmp_path)
    seal(tmp_path)
    observed(tmp_path)
    assert len(read(tmp_path, "ledger")) == 24
    seal(tmp_path)
    assert len(read(tmp_path, "ledger")) == 24
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 4


def test_unknown_quantities_are_refused(tmp_path):
    with pytest.raises(KeyError):
        Record(tmp_path).observe("pretrain", "speed", 1.0)
    assert set(STATES) <= set(QUANTITIES)


def test_summary(tmp_path):
    told = summarise(tmp_path, "p1", "sim", {"pretrain.step_time": Value(0.5, 0.4, 0.6), "run.cost": 2.0, "run.energy": float("nan")})
    assert read_summary(tmp_path) == told
    assert told["quantities"] == {"pretrain.step_time": {"value": 0.5, "unit": "s", "low": 0.4, "high": 0.6},
                                  "run.cost": {"value": 2.0, "unit": "USD", "low": None, "high": None}}  # fmt: skip


def test_spoilt_files_are_named(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(Refused, match=r"summary\.json is no summary"):
        read_summary(tmp_path)
    (tmp_path / "ledger.parquet").write_text("spoilt")
    with pytest.raises(Refused, match=r"ledger\.parquet is no readable Parquet"):
        read(tmp_path, "ledger")


def test_a_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "file"
    write(target, "first")
    with pytest.raises(Refused, match="a file stands where a folder should be"):
        write(target / "below", "second")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]
