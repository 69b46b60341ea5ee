"""Energy of a GPU as the driver's library tells it: units, and None where nothing tells."""

import pytest
import torch

from real import nvml, power

GPU = torch.device("cuda", 0)


class Library:
    """The driver's answers: a status, and a number where the caller wants it."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.millijoules = status, 5_000

    def nvmlDeviceGetTotalEnergyConsumption(self, which, answer):
        answer._obj.value = self.millijoules
        return self.status

    def nvmlDeviceGetPowerUsage(self, which, answer):
        answer._obj.value = 345_600
        return self.status


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(nvml, "_handle", lambda device: (found, None))
    return found


def test_joules_and_watts(library):
    assert nvml.joules(GPU) == 5.0 and nvml.watts(GPU) == 345.6


def test_what_the_driver_does_not_support_is_none(library):
    library.status = 3  # NVML_ERROR_NOT_SUPPORTED
    assert nvml.joules(GPU) is None and nvml.watts(GPU) is None


def test_the_meter_counts_from_its_start_over_all_devices(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    meter = power.meter("cuda")
    library.millijoules += 1_500
    assert meter.name == "NVML" and meter.joules() == 3.0
    library.status = 15  # NVML_ERROR_GPU_IS_LOST
    assert meter.joules() is None


def test_without_a_gpu_there_is_nothing():
    assert nvml.joules(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert nvml.watts(GPU) is None and power.meter("cuda").joules() is None
