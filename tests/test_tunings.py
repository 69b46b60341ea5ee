"""Published fine-tunings predicted from what their rows say, without a number fitted to them."""

import json

import pandas as pd
import pytest

from analysis.tunings import scored, tunings_of
from conf.program import main
from tests.conftest import SHARED

TABLE = SHARED / "validation" / "alignment.csv"
needs_shared = pytest.mark.skipif(not TABLE.is_file(), reason="needs ../shared/validation/alignment.csv")
COLUMNS = ["source", "model sizes", "gpus", "placement", "algo", "seq lens", "batch", "metric", "value"]
QWEN = ["QwenLM/Qwen README.md Profiling of Memory and Speed", "Qwen-7B", "1 A100-80G (1 node)", "trainer"]
ROWS = [  # Qwen's README: 7B on one A100, with and without four bits
    [*QWEN, "LoRA", "1024", "bs 1 x grad-accum 8", "memory_GB", 21.5], [*QWEN, "LoRA", "1024", "bs 1 x grad-accum 8", "s/iter", 2.8],
    [*QWEN, "Q-LoRA", "1024", "bs 1 x grad-accum 8", "memory_GB", 12.3], [*QWEN, "Q-LoRA", "2048", "bs 1 x grad-accum 8", "s/iter", 7.0],
    [*QWEN, "LoRA (emb)", "256", "bs 1 x grad-accum 8", "memory_GB", 33.7],
    [*QWEN[:2], "1x4090", "trainer", "LoRA", "256", "bs 2", "s/iter", 1.0],
    ["NVIDIA-NeMo/RL", "LLAMA3.1_8B", "16", "colocated", "GRPO", "max 4,096", "G-GBS 2,048", "step_time_s", 97.7],
    ["someone", "Qwen-7B", "1 A100-80G", "trainer", "LoRA", "256", "bs 1", "s/iter", 1.2], [*QWEN, "LoRA", "", "bs 1", "s/iter", 1.2],
    [*QWEN, "LoRA", "256", "some", "s/iter", 1.2], [*QWEN, "LoRA", "256", "bs 1", "adapter_file_bytes", 1.2],
]  # fmt: skip


def test_rows_are_predicted_or_say_why_not(tmp_path, capsys):
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(tmp_path / "rows.csv", index=False)
    assert main(["analysis", "published", f"table={tmp_path / 'rows.csv'}", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["table"], told["rows"], told["predicted"]) == ("alignment", 10, 4)  # a file's size is no row
    assert told["by_kind"]["memory"]["mean_abs_pct"] < 10 and told["by_kind"]["time"]["mean_abs_pct"] < 15
    reasons = " | ".join(entry["reason"] for entry in told["failed"])
    for part in ("embedding and head are trained", "gpu=x4090 is not in conf/gpu", "gpu=16 is not in", "software does is not known",
                 "its length is not said", "batch=some is not said in sequences"):  # fmt: skip
        assert part in reasons


@pytest.fixture(scope="module")
def played():
    frame = pd.read_csv(TABLE)
    frame = scored(frame[~frame["source"].astype(str).str.contains("NeMo")])  # those are in test_rollouts.py
    frame = frame.assign(value=pd.to_numeric(frame["value"], errors="coerce")).dropna(subset=["value"])
    rows = tunings_of(frame).rows.join(frame[[*COLUMNS]])
    return rows.assign(error=rows["predicted"] / rows["value"] - 1)


@needs_shared
@pytest.mark.slow
def test_qwens_grid_of_memory(played):
    """7B on one GPU, six lengths, with and without four bits: asked 15%."""
    rows = played[(played["metric"] == "memory_GB") & played["gpus"].str.startswith("1 ") & played["algo"].isin(["LoRA", "Q-LoRA"])]
    assert len(rows) == 12 and rows["error"].abs().mean() <= 0.08 and rows["error"].abs().max() <= 0.2


@needs_shared
@pytest.mark.slow
def test_mlperfs_adapters(played):
    """Llama 2 70B: samples a second on 8 GPUs (asked 15%), and how well 64 and 1,024 are used (asked 10 points)."""
    rows = played[played["source"].str.contains("mlcommons") & (played["metric"] == "samples/s")]
    eight = rows[rows["gpus"].str.match("8 NVIDIA (H100|H200|Blackwell)")]
    assert len(eight) > 20 and eight["error"].abs().mean() <= 0.15

    def used(column, large, small):
        of = {n: rows[rows["gpus"].str.match(f"{n} NVIDIA H100")][column].max() for n in (large, small)}
        return of[large] / of[small] * small / large

    assert used("predicted", 64, 8) == pytest.approx(used("value", 64, 8), abs=0.12)
    assert used("predicted", 1024, 64) == pytest.approx(used("value", 1024, 64), abs=0.12)
