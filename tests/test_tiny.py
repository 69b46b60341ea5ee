"""Read this first: the whole loop on one page. A plan is foretold, executed, and compared."""

import json


def test_one_plan_foretold_executed_and_compared(foretold, tiny, tmp_path):
    status, out, _ = foretold("sim", "json=true", *tiny)
    predicted = json.loads(out)
    assert status == 0 and predicted["program"] == "sim"

    status, out, err = foretold("real", "json=true", *tiny)
    assert status == 0, err
    measured = json.loads(out)
    assert measured["program"] == "real" and measured["plan"] == predicted["plan"]  # the same plan has the same id

    # What is certain is predicted exactly.
    for name in ("pretrain.parameters", "run.tokens", "run.interruptions", "extract.bytes"):
        assert predicted["quantities"][name]["value"] == measured["quantities"][name]["value"], name
    # The rest is predicted and measured under the same names.
    for name in (
        "pretrain.step_time",
        "pretrain.mfu",
        "pretrain.peak_memory",
        "run.wall_clock",
        "run.cost",
        "state.compute",
        "tokens.tokens_per_s",
    ):
        assert predicted["quantities"][name]["value"] > 0 and measured["quantities"][name]["value"] > 0, name
    # Every second of every rank is in exactly one state.
    for summary in (predicted, measured):
        states = sum(q["value"] for n, q in summary["quantities"].items() if n.startswith("state."))
        assert abs(states - 2 * summary["quantities"]["run.wall_clock"]["value"]) < 1e-6 * states

    status, out, _ = foretold("analysis", "compare")
    assert status == 0 and "pretrain.step_time" in out and "communication" in out
    status, out, _ = foretold("analysis", "report")
    assert status == 0
    page = (tmp_path / "runs" / predicted["plan"] / "report.html").read_text()
    assert predicted["plan"] in page and "<svg" in page
