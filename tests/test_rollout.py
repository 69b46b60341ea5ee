"""Completions against full passes of the model that drew them, and against themselves drawn in other company."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from conf.errors import Refused
from conf.program import load
from real import rollout
from real.initial import initialise
from real.model import Decoder
from real.rollout import Engine, Request, Sample, draw, uniform

SMALL = ["model.layers=2", "model.hidden=64", "model.ffn=96"]
SHAPES = {
    "grouped": ["model=tiny_llama3", *SMALL, "model.heads=4", "model.kv_heads=2", "model.tied=false"],
    "tied": ["model=tiny_llama3", *SMALL, "model.heads=4", "model.kv_heads=1", "model.tied=true"],
    "longer": ["model=tiny_llama3", *SMALL, "model.heads=4", "model.kv_heads=4", "model.rope_scaling.kind=linear"],
    "learned": ["model=tiny_gpt3", *SMALL],
    "normed": ["model=tiny_qwen3", *SMALL],
    "mixture": ["model=tiny_qwen3_moe", *SMALL],
    "shared": ["model=tiny_mixtral", *SMALL],
}
END, VOCAB = 3, 512


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores wait long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decoder(kind: str = "grouped", seed: int = 0, sharp: float = 7.0) -> Decoder:
    """One whose probabilities differ: an untrained head says almost the same of all tokens, and a tied one hears itself."""
    model = Decoder(load(SHAPES[kind]).model)
    initialise(model, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0 if model.shape.tied else sharp)
    return model


def engine(model: Decoder, slots: int = 4, end: int = END, new_tokens: int = 12, temperature: float = 0.7, longest: int = 32) -> Engine:
    return Engine(model, slots=slots, longest=longest, new_tokens=new_tokens, end=end, temperature=temperature, device="cpu")


def requests(count: int = 9, first: int = 0) -> list[Request]:
    """Prompts of 1 to 16 tokens, two completions each."""
    lengths = [1, 5, 16, 2, 9]
    return [
        Request(i // 2, i % 2, tuple((31 * (i // 2) + 7 * j) % VOCAB for j in range(lengths[i // 2 % 5])), 100 + i)
        for i in range(first, first + count)
    ]


def by_request(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: (sample.request.prompt, sample.request.number))


def full(model: Decoder, sample: Sample, temperature: float = 0.7) -> list[float]:
    """Log-probabilities of a sample's tokens by one pass over all of it."""
    tokens = torch.tensor([[*sample.request.ids, *sample.tokens]])
    model.eval()
    with torch.no_grad():
        logp = (model(tokens[:, :-1])[0] / temperature).log_softmax(-1)
    first = len(sample.request.ids) - 1
    return [float(logp[first + i, token]) for i, token in enumerate(sample.tokens)]


@pytest.mark.parametrize("kind", SHAPES)
def test_what_the_cache_says_is_what_a_full_pass_says(kind):
    model = decoder(kind)
    done = _run(engine(model), requests())
    assert len(done) == 9 and all(len(s.tokens) == len(s.logp) == len(s.versions) > 0 for s in done)
    for sample in done:
        assert sample.logp == pytest.approx(full(model, sample), abs=1e-5)
    assert len({token for sample in done for token in sample.tokens}) > 20


def _run(engine: Engine, work: list[Request | Sample]) -> list[Sample]:
    engine.submit(work)
    return by_request(engine.run())


@pytest.mark.parametrize("kind", ["grouped", "learned", "mixture"])
def test_company_does_not_matter(kind):
    model = decoder(kind)
    together, alone = (_run(engine(model, slots), requests(20)) for slots in (7, 1))
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)
    assert len({tuple(s.tokens) for s in together}) == 20  # the seeds differ, so the two of a prompt do


def test_prompts_are_filled_in_portions_and_once_for_a_group(monkeypatch):
    model, filled = decoder(), []
    whole = _run(engine(model, slots=9), requests())
    monkeypatch.setattr(rollout, "FILL", 16)
    one, blocks = engine(model, slots=9), Engine._blocks
    monkeypatch.setattr(Engine, "_blocks", lambda self, tokens, at: filled.append(tuple(tokens.shape)) or blocks(self, tokens, at))
    again = _run(one, requests())
    assert [s.tokens for s in again] == [s.tokens for s in whole]
    # Of lengths 1, 5, 16, 2 and 9 all but the newest token, two samples of each but the last: 0, 4, 15, 1 and 8.
    assert filled[:4] == [(2, 4), (1, 8), (1, 15), (9, 1)]


def test_a_free_slot_is_filled_at_the_next_step():
    model = decoder()
    one = engine(model, slots=3, end=-1, new_tokens=4)
    one.submit(requests(2))
    one.step()
    one.submit(requests(5, first=2))
    counts = []
    while one.live or one.waiting:
        done = len(one.step())
        counts.append((one.live, one.waiting, done))
    # The first two leave at their fourth token, the third a step later; two and then one take their seats, and so on.
    assert counts == [
        (3, 4, 0),
        (3, 4, 0),
        (1, 4, 2),
        (2, 2, 1),
        (3, 1, 0),
        (3, 1, 0),
        (1, 1, 2),
        (1, 0, 1),
        (1, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
    ]


def test_it_ends_by_its_token_or_by_the_limit():
    model = decoder()
    free = _run(engine(model, end=-1), requests(20))
    assert all(len(s.tokens) == 12 and not s.ended for s in free)
    end = free[4].tokens[5]
    for sample, longer in zip(_run(engine(model, end=end), requests(20)), free, strict=True):
        stop = longer.tokens.index(end) + 1 if end in longer.tokens else 12
        assert sample.tokens == longer.tokens[:stop] and sample.ended == (end in longer.tokens)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_what_was_interrupted_goes_on_elsewhere_as_if_nothing_had_been(after):
    model = decoder()
    whole = _run(engine(model), requests())
    first, second = engine(model), engine(model, slots=2)
    first.submit(requests())
    done = [sample for _ in range(after) for sample in first.step()]
    taken = first.interrupt()
    assert first.live == first.waiting == 0 and len(done) + len(taken) == 9
    second.version = 1
    resumed = by_request([*done, *_run(second, taken)])
    assert [s.tokens for s in resumed] == [s.tokens for s in whole]
    for one, other in zip(resumed, whole, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)
        assert one.versions == sorted(one.versions) and set(one.versions) <= {0, 1}
    assert sum(version == 0 for s in resumed for version in s.versions) == sum(len(s.tokens) for s in [*done, *taken])


def test_new_weights_are_heard_at_once():
    model, new = decoder(seed=0), decoder(seed=1)
    one = engine(model, end=-1)
    one.submit(requests(4))
    for _ in range(5):
        one.step()
    old = Decoder(model.shape)
    old.load_state_dict(model.state_dict())
    model.load_state_dict(new.state_dict())
    one.refresh(3)
    for sample in by_request(one.run()):
        assert sample.versions == [0] * 5 + [3] * 7
        before, after = full(old, sample), full(new, sample)
        assert sample.logp == pytest.approx([*before[:5], *after[5:]], abs=1e-5)
        assert max(abs(b - a) for b, a in zip(before, after, strict=True)) > 0.1


def test_without_a_refresh_old_keys_would_be_heard():
    """The check above can fail: the same without the refresh does."""
    model, new = decoder(seed=0), decoder(seed=1)
    one = engine(model, end=-1)
    one.submit(requests(4))
    for _ in range(5):
        one.step()
    model.load_state_dict(new.state_dict())
    wrong = [abs(a - b) for s in one.run() for a, b in zip(s.logp[5:], full(new, s)[5:], strict=True)]
    assert max(wrong) > 1e-2


def test_it_sleeps_without_its_cache_and_wakes_with_it():
    model = decoder()
    plain, sleeper = engine(model), engine(model)
    assert sleeper.cache_bytes == 2 * 2 * 4 * 2 * 32 * 16 * 4  # layers, keys and values, slots, heads, longest, width, fp32
    sleeper.submit(requests())
    done = [sample for _ in range(4) for sample in sleeper.step()]
    sleeper.sleep()
    assert sleeper.cache_bytes == 0 and sleeper.live == 4
    sleeper.wake()
    assert [s.tokens for s in by_request([*done, *sleeper.run()])] == [s.tokens for s in _run(plain, requests())]


def test_the_model_is_as_it_was():
    model, tokens = decoder("mixture"), torch.randint(VOCAB, (2, 9))
    model.train()
    before, loads = model(tokens), [block.mlp.gate.load.clone() for block in model.layers.values()]
    _run(engine(model), requests())
    assert model.training and all(torch.equal(block.mlp.gate.load, load) for block, load in zip(model.layers.values(), loads, strict=True))
    after = model(tokens)
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_draws_follow_the_probabilities():
    """Chi-squared of 20,000 draws over 32 tokens: below its 99.9th percentile at 31 degrees of freedom, 61.1."""
    logits = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 1.5
    luck = torch.tensor([uniform(seed, 0) for seed in range(20_000)], dtype=torch.float64)
    tokens, logp = draw(logits.expand(20_000, 32), luck)
    expected = logits.softmax(-1) * 20_000
    counts = torch.bincount(tokens.long(), minlength=32)
    assert float(((counts - expected) ** 2 / expected).sum()) < 61.1
    assert float(((counts - expected.flip(0)) ** 2 / expected.flip(0)).sum()) > 1e3
    torch.testing.assert_close(logp, logits.log_softmax(-1)[tokens.long()].double())


def test_the_engine_draws_by_the_models_probabilities_at_its_temperature():
    """The first token of 4,000 completions of a prompt, in 16 classes of about equal probability; 99.9th percentile at 15: 37.7."""
    model = decoder(sharp=20.0)
    ids = (5, 9, 11)
    done = _run(engine(model, slots=500, new_tokens=1, temperature=1.3), [Request(0, i, ids, i) for i in range(4_000)])
    with torch.no_grad():
        chances = (model(torch.tensor([ids]))[0, -1] / 1.3).softmax(-1).double()
    order = chances.argsort()
    classes = torch.empty(VOCAB, dtype=torch.long)
    classes[order] = ((chances[order].cumsum(0) * 16).long()).clamp(max=15)
    expected = torch.zeros(16, dtype=torch.float64).index_add(0, classes, chances) * 4_000
    counts = torch.bincount(classes[torch.tensor([s.tokens[0] for s in done])], minlength=16)
    keep = expected > 5
    assert float(((counts - expected) ** 2 / expected)[keep].sum()) < 37.7
    assert float(chances.max()) > 3 / VOCAB


def test_extreme_luck_draws_no_token_of_probability_nought():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, 5)
    tokens, logp = draw(logits, torch.tensor([0.0, 0.5, 1 - 2.0**-48], dtype=torch.float64))
    assert tokens.tolist() == [1, 3, 3] and logp.tolist() == pytest.approx([math.log(0.5)] * 3)


def test_what_it_cannot_do_is_one_line():
    with pytest.raises(Refused, match="latent attention"):
        engine(Decoder(load(["model=tiny_deepseek_v3"]).model))
    with pytest.raises(Refused, match="ALiBi"):
        engine(Decoder(load(["model=tiny_bloom"]).model))
    with pytest.raises(Refused, match="context=16"):
        engine(Decoder(load([*SHAPES["learned"], "model.context=16", "train.seq_len=16"]).model))
    one = engine(decoder())
    for ids, words in (
        ((), "0 tokens"),
        ((1,) * 21, "21 tokens; an engine for 32 takes 1 to 20"),
        ((1, 512), "token 512, model.vocab=512"),
    ):
        with pytest.raises(Refused, match=words):
            one.submit([Request(0, 0, ids, 0)])
    broken = decoder()
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    with pytest.raises(Refused, match="version 0 give no numbers"):
        _run(engine(broken, new_tokens=1), requests(1))


def test_a_sample_that_is_handed_on_is_not_changed():
    model = decoder()
    one = engine(model)
    one.submit(requests(1))
    one.step()
    (taken,) = one.interrupt()
    kept = dataclasses.replace(taken, tokens=[*taken.tokens])
    _run(engine(model), [taken])
    assert taken.tokens == kept.tokens and len(taken.logp) == 1
