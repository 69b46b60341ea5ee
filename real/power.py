"""The meter: joules since it was started, from the sensor that is there, or from none.

NVML's energy counter for a GPU, RAPL's for a CPU package. Without a sensor the null meter answers None, and the
record says nothing about energy rather than something made up.
"""

from pathlib import Path
from typing import Protocol

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
        import pynvml

        pynvml.nvmlInit()
        self.nvml = pynvml
        self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self.start = self._millijoules()

    def _millijoules(self) -> float:
        return float(sum(self.nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self.handles))

    def joules(self) -> float | None:
        return (self._millijoules() - self.start) * 1e-3


def meter(kind: str) -> Meter:
    """The best meter for a device kind on this machine."""
    try:
        if kind == "cuda":
            return NvmlMeter()
        rapl = RaplMeter()
        return rapl if rapl.zones else NullMeter()
    except Exception:  # no library, no driver, no permission: the sensor is not there
        return NullMeter()
