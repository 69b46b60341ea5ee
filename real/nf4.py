"""Weights in four bits: NF4 with double quantisation (Dettmers et al. 2023, QLoRA, section 3), in plain torch.

Of every 64 numbers the largest magnitude is their scale, and each is the nearest of 16 quantiles of a normal distribution times it.
Scales less their mean are kept in 8 bits, each the nearest of 256 steps (Dettmers et al. 2022, 8-bit optimizers, section 1.3) times the
largest magnitude of 256 of them: 4 + 8/64 + 32/(64·256) = 4.127 bits a number. All of a matrix lies in one string of bytes.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK, GROUP = 64, 256
FP32 = 4
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # QLoRA, appendix E


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two numbers of every byte, [256, 2]."""
    byte = torch.arange(256, device=device)
    return _levels(device)[torch.stack((byte >> 4, byte & 15), 1)]


@cache
def _steps(device: torch.device) -> Tensor:
    """The 256 numbers of 8 bits: seven decades, each with twice as many steps as the one below; [256] from −1 to 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def size(numbers: int) -> int:
    """Bytes of so many numbers, a multiple of 4."""
    scales = numbers // BLOCK
    return -(-(numbers // 2 + scales) // FP32) * FP32 + FP32 * (-(-scales // GROUP) + 1)


def fits(numbers: int) -> bool:
    return numbers % BLOCK == 0


def quantise(weight: Tensor) -> Tensor:
    """A matrix as its bytes, uint8 [size]: codes (the first of two in the upper half), scales, largest scales, and the scales' mean."""
    blocks = weight.float().flatten().view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    codes = _nearest(blocks / scales.clamp(min=1e-38).unsqueeze(1), _levels(weight.device)).flatten()
    mean = scales.mean()
    rest = torch.nn.functional.pad(scales - mean, (0, -len(scales) % GROUP)).view(-1, GROUP)
    largest = rest.abs().amax(1)
    eighths = _nearest(rest / largest.clamp(min=1e-38).unsqueeze(1), _steps(weight.device)).flatten()[: len(scales)]
    told = torch.zeros(size(weight.numel()), dtype=torch.uint8, device=weight.device)
    told[: len(codes) // 2] = codes[::2] << 4 | codes[1::2]
    told[len(codes) // 2 :][: len(scales)] = eighths
    told[-FP32 * (len(largest) + 1) :] = torch.cat((largest, mean.view(1))).view(torch.uint8)
    return told


def dequantise(told: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix again, as near as four bits are."""
    numbers = shape[0] * shape[1]
    scales, half = numbers // BLOCK, numbers // 2
    tops = told[-FP32 * (-(-scales // GROUP) + 1) :].contiguous().view(torch.float32)
    eighths = _steps(told.device).index_select(0, told[half : half + scales].int())
    each = eighths * tops[:-1].repeat_interleave(GROUP)[:scales] + tops[-1]
    found = _pairs(told.device).index_select(0, told[:half].int())
    return (found.view(-1, BLOCK) * each.unsqueeze(1)).view(shape).to(dtype)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Which of the sorted levels is nearest, uint8."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
