"""Kernels in closed form: a product of exactly one wave, its last wave, attention's longest row, what lies outside the measured range."""

import numpy as np
import pandas as pd
import pytest

from analysis.alone import alone, kernel
from analysis.rows import device_of
from conf.program import load
from sim.kernels import ROWS, TILES, Device, Product, Work, attention, beyond, matmul, outside, rates
from tests.conftest import SHARED

B200 = load(["gpu=b200", "train.precision=bf16", "train.compile=true"])
TABLE = SHARED / "validation" / "kernel_efficiency.csv"


def seconds(work: Work, plan=B200) -> float:
    return float(Device([rates(plan)]).seconds(work)[0])


def product(m: int, n: int, k: int, matrices: int = 1) -> Work:
    return Work("matmul.forward", 0.0, 0.0, 0, (Product(m, n, k, matrices),))


def test_exactly_one_wave_takes_one_tile():
    """148 tiles on 148 units take as long as the work of one, at one unit's share of the rate, with the depth of its pipeline."""
    gpu, (rows, columns) = B200.gpu, TILES[0]
    rate = gpu.bf16_peak * gpu.gemm_efficiency
    one = 2 * rows * columns * (8192 + gpu.gemm_depth) / (rate / gpu.units)
    assert seconds(product(rows * gpu.units, columns, 8192)) == pytest.approx(one, rel=1e-12)
    assert seconds(product(rows * gpu.units // 2, columns, 8192)) <= one  # half a wave is never dearer: a smaller tile may be cheaper


def test_half_of_a_last_wave_is_paid_for():
    gpu, (rows, columns) = B200.gpu, TILES[0]
    wave = seconds(product(rows * gpu.units, columns, 8192))
    for tiles, waves in ((2 * gpu.units, 2.0), (2 * gpu.units + 111, 2.875), (3 * gpu.units, 3.0)):
        assert seconds(product(rows * tiles, columns, 8192)) == pytest.approx(waves * wave, rel=1e-12)


def test_experts_share_their_waves():
    """Half a wave of tiles each of two experts is one wave together."""
    gpu, (rows, columns) = B200.gpu, TILES[0]
    together = seconds(product(rows * gpu.units // 2, columns, 8192, matrices=2)) * gpu.grouped_efficiency
    assert together == pytest.approx(seconds(product(rows * gpu.units, columns, 8192)), rel=1e-12)


def test_attention_takes_its_even_share_or_its_longest_row():
    """One head of 4,096 tokens is one row of blocks after the other; a thousand of them fill the device."""
    gpu = B200.gpu
    rate = gpu.bf16_peak * gpu.gemm_efficiency * gpu.attention_efficiency

    def spent(heads: int) -> float:
        return seconds(attention(4096, 4096, heads * 128, 2, "forward", 128)) - 2 * gpu.launch

    even, longest = 2 * 4096**2 * 128 / rate, 4 * ROWS * 4096 * 128 * gpu.units / rate
    assert spent(1) == pytest.approx(np.hypot(even, longest), rel=1e-9) and spent(1) < 1.01 * longest
    assert spent(1024) == pytest.approx(1024 * even, rel=0.01)


def test_sizes_beyond_what_was_measured_are_told():
    assert beyond(B200, {"m": {4096}, "n": {64, 200_000}, "head": {128}}) == ["n=64, 200000 (measured 160 to 129280)"]
    works = [matmul(4096, 4096, 4096, 2, "forward"), matmul(64 * 8, 4096, 4096, 2, "forward", 8), matmul(8, 8, 8, 2, "forward") * 0]
    told = outside(B200.but(**{"train.seq_len": 8192, "model.head": 128}), works)
    assert told == ["expert=64 (measured 128 to 9832)"]
    assert outside(load(["gpu=h100_sxm", "train.precision=bf16"]), works) == []  # nothing was measured, nothing is outside


def test_the_prediction_says_what_lies_outside(tmp_path, monkeypatch, foretold):
    monkeypatch.chdir(tmp_path)
    words = ["gpu=a100_80", "model=llama2_7b", "train.precision=bf16", "price=surveys_2026_06"]
    status, text, error = foretold("sim", *words)
    assert status == 0, error
    assert "outside the calibrated range: " in text and "seq=256 (measured 4096 to 4096)" in text


def test_kernels_are_what_their_rows_count():
    one = kernel({"op": "sdp_fwd", "seq": 4096, "heads": 8, "qk_head_dim": 128, "v_head_dim": 128})
    assert one.flops == 4 * 4096 * 4096 * 8 * 128 and one.work.flops == one.flops / 2
    padded = kernel({"op": "sdp_fwd", "seq": 4096, "heads": 8, "qk_head_dim": 192, "v_head_dim": 128})
    assert padded.flops == 2 * 4096 * 4096 * 8 * (192 + 128) and padded.work.flops == 2 * 4096 * 4096 * 8 * 192
    row = {"op": "group_matmul", "groups": 8, "m": 64, "n": 512, "k": 256, "accumulate": True}
    shapes = {stage: kernel(row | {"stage": stage}).work.products for stage in ("fwd", "bwd_grad_act", "bwd_grad_w")}
    assert shapes == {
        "fwd": (Product(64, 512, 256, 8),), "bwd_grad_act": (Product(64, 256, 512, 8),), "bwd_grad_w": (Product(512, 256, 64, 8),),
    }  # fmt: skip
    assert {kernel(row | {"stage": stage}).flops for stage in shapes} == {2 * 8 * 64 * 512 * 256}


def test_a_moment_is_faster_than_a_training_and_no_call_than_its_host():
    rows = [{"op": "matmul", "m": size, "n": size, "k": size, "batch": 1} for size in (2048, 32768)]
    kernels = [kernel(row) for row in rows] + [kernel({"op": "sdp_fwd", "seq": 128, "heads": 1, "qk_head_dim": 128, "v_head_dim": 128})]
    short, long, call = alone(device_of([B200] * 3), kernels)
    assert short < seconds(kernels[0].work) and long * B200.gpu.alone == pytest.approx(seconds(kernels[1].work), rel=0.05)
    assert call == pytest.approx(3 * B200.gpu.host_launch)


@pytest.mark.skipif(not TABLE.exists(), reason="the tables of published measurements are not here")
def test_no_model_can_be_exact_where_one_key_was_measured_twice():
    """The noise floor of LOG.md: rows that differ in nothing but their measurement."""
    frame = pd.read_csv(TABLE)
    keys = [name for name in frame if name != "efficiency"]
    pairs = frame.groupby(keys, dropna=False)["efficiency"].agg(["size", "min", "max"])
    pairs = pairs[pairs["size"] > 1]
    apart = pairs["max"] / pairs["min"] - 1
    least = apart / (2 + apart)  # of the number between the two, relative to their mean
    assert (len(pairs), int((apart > 0.14).sum())) == (35, 10) and 0.02 < least.mean() < 0.06
