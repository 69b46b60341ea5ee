"""Arithmetic in fewer bits: how far it may be from the exact one, and that it trains."""

import pytest
import torch

from real import checkpoint
from real.fp8 import product
from real.timeline import Timeline
from real.trainer import Trainer
from tests.test_mesh import words
from tests.worlds import Outcome, Stream, outcome, plan_of


def test_fp8_products_are_as_far_off_as_their_formats_say():
    """A mantissa of m bits errs by 2^-(m+1) / sqrt(3) at most, root mean square: two factors of e4m3, or one of e5m2 besides."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(96, 128, dtype=torch.bfloat16) / 11).requires_grad_()
    out = product(x, weight)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = x.float() @ weight.float().T, grad.float() @ weight.float(), grad.flatten(0, 1).float().T @ x.flatten(0, 1).float()
    four, five = 2**-4 / 3**0.5, 2**-3 / 3**0.5
    bounds = (2 * four**2) ** 0.5, (four**2 + five**2) ** 0.5, (four**2 + five**2) ** 0.5
    for found, wanted, bound in zip((out, x.grad, weight.grad), exact, bounds, strict=True):
        error = float((found.float() - wanted).norm() / wanted.norm())
        assert 0.5 * bound < error < bound


def lower(*settings: str, mesh: str = "dp_shard=2") -> Outcome:
    peaks = ["gpu.bf16_peak='10 GFLOP/s'", "gpu.fp8_peak='10 GFLOP/s'"]
    return outcome(plan_of(*words("tiny_llama3", mesh), *peaks, *settings), 8)


def test_lower_precision_stays_near_fp32():
    exact = outcome(plan_of(*words("tiny_llama3", "")), 8).losses
    for precision, bound in (("bf16", 2e-3), ("fp8", 5e-3)):
        for mesh in ("", "dp_shard=2 tp=2"):
            assert lower(f"train.precision={precision}", mesh=mesh).losses == pytest.approx(exact, rel=bound), (precision, mesh)


def eight(plan, folder, exact: list[float]) -> None:
    """AdamW with 8-bit moments learns as AdamW does, and goes on from a checkpoint, where they are in fp32, within their rounding."""
    trainer = Trainer(plan, Stream(plan), Timeline())  # type: ignore[arg-type]
    losses = [trainer.step(step)[0] for step in range(4)]
    checkpoint.Writer(folder, plan).save(checkpoint.state(trainer.parts, trainer.optimizer), 4)
    losses += [trainer.step(step)[0] for step in range(4, 8)]
    assert losses == pytest.approx(exact, rel=5e-3)
    again = Trainer(plan, Stream(plan), Timeline())  # type: ignore[arg-type]
    checkpoint.load(folder / "step-00000004", again.parts, again.optimizer, 4)
    assert [again.step(step)[0] for step in range(4, 8)] == pytest.approx(losses[4:], rel=5e-6)


@pytest.mark.slow
def test_moments_in_eight_bits(tmp_path):
    pytest.importorskip("torchao")
    from tests.worlds import spawn

    exact = outcome(plan_of(*words("tiny_llama3", "")), 8).losses
    spawn(plan_of(*words("tiny_llama3 optimizer=adamw8bit", "")), eight, tmp_path, exact, timeout=300)
