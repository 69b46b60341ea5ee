"""Tokens: the tokenizer trained once on a sample, then applied to every shard, held-out text included."""

from conf.plan import Plan
from sim.cluster import Course, World, per_second, pool
from sim.extract import Corpus, hands

HELD = 35.0  # bytes a byte of the shard's text: the tokenizer with its tables, texts, tokens


def train_seconds(world: World, text: Corpus) -> float:
    """Training reads the sample with all cores of one server."""
    sample = min(world.plan.tokenizer.sample, text.bytes)
    return sample / (world.rates.train_rate * world.plan.cluster.cores_per_node)


def count(text: Corpus, plan: Plan) -> float:
    """Tokens of the text, those held out for evaluation included.

    >>> from conf.program import load
    >>> count(Corpus((2.9e6,), 1), load(["tokenizer.bytes_per_token=2.9"]))
    1000000.0
    """
    return text.bytes / plan.tokenizer.bytes_per_token


def tokens(world: World, text: Corpus) -> Course[dict[str, float]]:
    """Train the tokenizer, encode every shard on the pool; returns what the stage says of itself."""
    began = world.now
    yield world.env.timeout(train_seconds(world, text))
    yield from pool(world, "tokens", text.seconds(world.rates.encode_rate), text.bytes, world.rates.encode_start)
    seconds, made = world.now - began, count(text, world.plan)
    told = {"seconds": seconds, "bytes": text.bytes, "tokens": made, "tokens_per_s": per_second(made, seconds)}
    return told | hands(text, world.plan, HELD)
