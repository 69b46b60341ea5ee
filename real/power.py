"""The meter: joules since it was started, from the sensor that is there, or from none.

NVML's energy counter for a GPU, RAPL's for a CPU package. Without a sensor the null meter answers None, and the
record says nothing about energy rather than something made up.
"""

from pathlib import Path
from typing import Protocol

import torch

from real import nvml

RAPL = Path("/sys/class/powercap")


class Meter(Protocol):
    name: str

    def joules(self) -> float | None:
        """Energy since the start [J], or None when nothing measures it."""


class NullMeter:
    name = "none"

    def joules(self) -> float | None:
        return None


class RaplMeter:
    """Energy of all CPU packages; the counters wrap around."""

    name = "RAPL"

    def __init__(self) -> None:
        self.zones = sorted(zone for zone in RAPL.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self.last, self.total = [self._read(z) for z in self.zones], 0.0

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def joules(self) -> float | None:
        for i, zone in enumerate(self.zones):
            now = self._read(zone)
            wrapped = now < self.last[i]
            self.total += (now - self.last[i] + (int((zone / "max_energy_range_uj").read_text()) if wrapped else 0)) * 1e-6
            self.last[i] = now
        return self.total


class NvmlMeter:
    """Energy counters of the GPUs."""

    name = "NVML"

    def __init__(self) -> None:
        self.devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        self.start = self._read()

    def _read(self) -> float | None:
        """Of all of them, where all tell."""
        told = [nvml.joules(device) for device in self.devices]
        return sum(each for each in told if each is not None) if told and None not in told else None

    def joules(self) -> float | None:
        now = self._read()
        return None if now is None or self.start is None else now - self.start


def meter(kind: str) -> Meter:
    """The best meter for a device kind on this machine."""
    try:
        if kind == "cuda":
            return NvmlMeter()
        rapl = RaplMeter()
        return rapl if rapl.zones else NullMeter()
    except Exception:  # no library, no driver, no permission: the sensor is not there
        return NullMeter()
