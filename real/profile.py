"""Torch's own profiler over some steps, which sees every operator and kernel."""

from pathlib import Path

import torch

from real.cluster import rank


class Watched:
    """Profiles from the first to the last of `steps` into one file a rank, which opens in Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, cuda: bool) -> None:
        self.steps, self.folder = steps or (0, 0), folder
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
        self.profiler = torch.profiler.profile(activities=kinds, record_shapes=True) if steps else None

    def before(self, step: int) -> None:
        if self.profiler and step == self.steps[0]:
            self.profiler.start()

    def after(self, step: int) -> None:
        if self.profiler and step == self.steps[1]:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.folder / f"profile.rank{rank()}.json.gz"))
