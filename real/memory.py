"""Peak memory of a rank, above what it held before the model was built: measured while it trains, or tracked on fake tensors
that have shapes and no numbers."""

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode


class Gauge:
    """On a GPU the allocator's own peak; on a CPU the process's resident set (Linux keeps a peak that can be reset)."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self.base = float(torch.cuda.memory_allocated())
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.base = _resident("VmRSS:")

    def peak(self) -> float:
        """Bytes."""
        highest = float(torch.cuda.max_memory_allocated()) if self.cuda else _resident("VmHWM:")
        return max(0.0, highest - self.base)

    def reserved(self) -> float | None:
        """Bytes that the GPU's allocator took, in use or not; None on a CPU."""
        return float(torch.cuda.max_memory_reserved()) if self.cuda else None


def _resident(field: str) -> float:
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return float(line.split()[1]) * 1024
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * scale


class Hookless:
    """In place of torch's tracker of modules, whose hooks refuse a module's second forward pass and half of a backward one."""

    is_bw, parents = False, frozenset[str]()

    def register_user_hooks(self, *_: Any) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class Tracker(MemTracker):
    """Torch's tracker of live storages, without its tables by module, and without the whole tensors that DTensor makes up to learn
    the shape of a result."""

    def __init__(self, held: Sequence[nn.Module | torch.optim.Optimizer]) -> None:
        super().__init__()
        self._mod_tracker = Hookless()  # type: ignore[assignment]
        self.aside = False
        self.track_external(*held)

    def peak(self) -> int:
        """Most bytes at once of tensors that are not on the meta device."""
        found = self.get_tracker_snapshot("peak")
        return sum(int(held["Total"]) for device, held in found.items() if device.type != "meta")

    def __enter__(self) -> "Tracker":
        self._told = told = ShardingPropagator._propagate_tensor_meta_non_cached  # where DTensor makes them up

        def untracked(*args: Any) -> Any:
            self.aside = True
            try:
                return told(*args)
            finally:
                self.aside = False

        ShardingPropagator._propagate_tensor_meta_non_cached = untracked  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        ShardingPropagator._propagate_tensor_meta_non_cached = self._told  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if self.aside else super().__torch_dispatch__(func, types, args, kwargs)


class Ones(TorchDispatchMode):
    """Whoever asks a fake tensor for its number is told 1: pipelines ask whether all ranks agree."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


@contextmanager
def fused() -> Iterator[None]:
    """The kernels of a GPU where a CPU has none, for fake tensors: what they take, give and keep for the backward pass.

    Torch's RMSNorm on a CPU is a chain of operations that keeps fp32 copies, and its attention writes every score where keys and
    values differ in width; on a GPU each is one kernel, which keeps its inputs and a number a row.
    """
    norm, attention = F.rms_norm, F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, **options: Any) -> Tensor:
        if q.shape[-1] == v.shape[-1]:
            return attention(q, k, v, is_causal=is_causal, **options)
        out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal)[0]
        return out

    F.rms_norm = lambda x, shape, weight, eps: _Norm.apply(x, weight)
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.rms_norm, F.scaled_dot_product_attention = norm, attention


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
