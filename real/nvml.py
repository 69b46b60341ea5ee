"""Energy and power of an NVIDIA GPU, read from the driver's own library; None where there is none.

libnvidia-ml is spoken to directly: it comes with every driver, its Python bindings do not. It counts GPUs as the machine does, torch as
CUDA_VISIBLE_DEVICES says, so that a device is asked for by its UUID.
"""

import ctypes
from ctypes import byref, c_char_p, c_uint, c_ulonglong, c_void_p
from functools import cache

import torch

LIBRARY = "libnvidia-ml.so.1"


def joules(device: torch.device) -> float | None:
    """Energy that the device has drawn since the driver was loaded [J]; Volta and newer count it, in steps of some 20 to 100 ms."""
    milli = _ask(device, "nvmlDeviceGetTotalEnergyConsumption", c_ulonglong())
    return None if milli is None else milli * 1e-3


def watts(device: torch.device) -> float | None:
    """Power that the device draws [W]; from Ampere on a mean over one second, save on A100 (NVML API, nvmlDeviceGetPowerUsage)."""
    milli = _ask(device, "nvmlDeviceGetPowerUsage", c_uint())
    return None if milli is None else milli * 1e-3


def _ask(device: torch.device, question: str, answer: "c_uint | c_ulonglong") -> int | None:
    handle = _handle(device)
    if handle is None:
        return None
    library, which = handle
    return answer.value if getattr(library, question)(which, byref(answer)) == 0 else None


@cache
def _handle(device: torch.device) -> tuple[ctypes.CDLL, c_void_p] | None:
    """The library, and what it calls the device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    which = c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(c_char_p(uuid.encode()), byref(which)):
        return None
    return library, which
