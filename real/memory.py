"""Peak memory of a rank, above what it held before the model was built."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


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
