"""Decoders of many sizes, dense or mixtures of experts: layers and width in the proportions that published models have."""

from collections.abc import Iterator
from typing import NamedTuple

from conf.arithmetic import active_parameters
from conf.plan import Model

LAYERS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128)
STRAY = 1.3  # times wider or narrower for its depth than the rule
WIDEST = 18432
SOURCE = "analysis size: proportions of analysis/shapes.py"


class Shape(NamedTuple):
    params: float  # that a token visits: of a dense model, all
    model: Model


def shapes(like: Model) -> list[Shape]:
    """Models with the vocabulary and the rest of `like`, by size; of the same size within 3% the one nearest to the rule."""
    found = sorted((float(active_parameters(model)), stray, index, model) for index, (stray, model) in enumerate(_all(like)))
    kept: list[tuple[float, float, Model]] = []
    for params, stray, _, model in found:
        if kept and params < 1.03 * kept[-1][0]:
            if stray < kept[-1][1]:
                kept[-1] = params, stray, model
            continue
        kept.append((params, stray, model))
    return [Shape(params, model) for params, _, model in kept]


def aspect(hidden: int) -> float:
    """Width over depth: 32 at 256 and 128 at 4,096, as Llama 3 8B has; 130 at most, as its 405B has.

    >>> aspect(256), aspect(4096), aspect(16384)
    (32.0, 128.0, 130.0)
    """
    return float(min(130.0, 32 * (hidden / 256) ** 0.5))


def _all(like: Model) -> Iterator[tuple[float, Model]]:
    hidden, kind = 16, "moe" if like.moe.experts else "dense"
    while hidden <= WIDEST:
        head = 16 if hidden < 128 else 32 if hidden < 512 else 64 if hidden < 1024 else 128
        heads = hidden // head
        for layers in LAYERS:
            stray = max(hidden / layers / aspect(hidden), aspect(hidden) * layers / hidden)
            if stray <= STRAY:
                yield stray, like.but(name=f"{kind}_{hidden}x{layers}", hidden=hidden, layers=layers, heads=heads, kv_heads=_shared(heads),
                                      ffn=_ffn(hidden), source=SOURCE, **_experts(like, hidden, layers))  # fmt: skip
        hidden += 16 if hidden < 64 else 64 if hidden < 512 else 128 if hidden < 1024 else 512 if hidden < 4096 else 1024


def _experts(like: Model, hidden: int, layers: int) -> dict[str, int]:
    """As many experts as `like` has, as wide for the model's width; a dense model has none."""
    if not like.moe.experts:
        return {}
    width = max(64, round(like.moe.ffn / like.hidden * hidden / 64) * 64)
    return {"moe.ffn": width, "moe.dense_layers": min(like.moe.dense_layers, layers - 1)}


def _shared(heads: int) -> int:
    """Heads of keys and values: 8, as Llama 3 has, or as many as divide the others."""
    return next(n for n in (8, 4, 2, 1) if heads % n == 0 and n <= heads)


def _ffn(hidden: int) -> int:
    """3.5 times the width from 2,048 on, as Llama 3 has, and 2.75 below; whole multiples of 64."""
    return round((3.5 if hidden >= 2048 else 2.75) * hidden / 64) * 64
