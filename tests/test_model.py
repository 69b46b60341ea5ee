"""The decoder against arithmetic and against its own parts; its meshes are in test_mesh."""

import math

import pytest
import torch
import torch.nn.functional as F

from conf.arithmetic import parameters
from conf.program import load
from real import initial
from real.initial import initialise
from real.loss import loss_sum
from real.model import Decoder, rotary, rotate
from real.optim import learning_rate

SHAPE = ["model.layers=2", "model.hidden=48", "model.heads=6", "model.kv_heads=2", "model.ffn=80", "model.vocab=512", "tokenizer.vocab=512"]


def decoder(*overrides: str) -> Decoder:
    model = Decoder(load([*SHAPE, *overrides]).model)
    initialise(model, seed=0)
    return model


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_are_what_the_plan_counts(tied):
    plan = load([*SHAPE, f"model.tied={tied}"])
    assert sum(p.numel() for p in Decoder(plan.model).parameters()) == parameters(plan.model)


def test_names_and_layouts_are_hugging_faces():
    names = dict(decoder("model.tied=false").named_parameters())
    assert names["layers.0.self_attn.k_proj.weight"].shape == (16, 48) and names["layers.1.mlp.down_proj.weight"].shape == (48, 80)
    assert {"embed_tokens.weight", "norm.weight", "lm_head.weight", "layers.0.input_layernorm.weight"} <= names.keys()


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = rotary(torch.arange(16), 8, 1e4)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turned = [rotate(x.expand(1, 1, 16, 8), cos, sin)[0, 0] for x in (q, k)]
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(16))
    scores = turned[0] @ turned[1].T
    torch.testing.assert_close(scores.diagonal(3), scores[0, 3].expand(13), atol=1e-5, rtol=1e-5)


def test_the_future_does_not_matter():
    model, tokens = decoder(), torch.randint(512, (1, 12))
    other = tokens.clone()
    other[0, 7:] = torch.randint(512, (5,))
    torch.testing.assert_close(model(tokens)[0, :7], model(other)[0, :7])


def test_logits_equal_a_decoder_written_out():
    """The same numbers from a plain transcription of the Llama equations, heads looped, no fused kernel."""
    model, tokens = decoder(), torch.randint(512, (2, 9))
    shape, w = model.shape, dict(model.named_parameters())

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.norm_epsilon) * weight

    x = w["embed_tokens.weight"][tokens]
    cos, sin = rotary(torch.arange(9), 8, shape.rope_theta)
    for i in range(shape.layers):
        at = f"layers.{i}."
        y = norm(x, w[at + "input_layernorm.weight"])
        heads = []
        for h in range(shape.heads):
            g = h // (shape.heads // shape.kv_heads)
            q = rotate(y @ w[at + "self_attn.q_proj.weight"][h * 8 : h * 8 + 8].T, cos, sin)
            k = rotate(y @ w[at + "self_attn.k_proj.weight"][g * 8 : g * 8 + 8].T, cos, sin)
            v = y @ w[at + "self_attn.v_proj.weight"][g * 8 : g * 8 + 8].T
            scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = y @ w[at + "mlp.gate_proj.weight"].T, y @ w[at + "mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    expected = norm(x, w["norm.weight"]) @ w["embed_tokens.weight"].T
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)


def test_an_untrained_model_guesses_evenly():
    model, tokens = decoder(), torch.randint(512, (4, 33))
    loss = loss_sum(model(tokens[:, :-1]), tokens[:, 1:]).detach() / 128
    assert float(loss) == pytest.approx(math.log(512), abs=0.1)


def test_recomputing_changes_nothing():
    tokens, gradients = torch.randint(512, (2, 17)), []
    for recompute, share in (("none", 1.0), ("selective", 1.0), ("full", 1.0), ("full", 0.5)):
        model = Decoder(load(SHAPE).model, recompute, share=share)
        assert sum(block.recompute == "full" for block in model.layers.values()) == (recompute == "full") * share * len(model.layers)
        initialise(model, 0)
        loss_sum(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *again in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in again)


def test_schedules():
    train = load(["train.steps=100", "train.warmup=10", "train.final_rate=0.1", "train.learning_rate=1.0"]).train
    assert [learning_rate(train, s) for s in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert learning_rate(train, 55) == pytest.approx(0.55) and learning_rate(train, 100) == pytest.approx(0.1)
    wsd = train.but(schedule="wsd", decay=0.2)
    assert learning_rate(wsd, 70) == 1.0 and learning_rate(wsd, 91) == pytest.approx(0.55) and learning_rate(wsd, 100) == pytest.approx(0.1)
    assert learning_rate(train.but(schedule="constant", steps=None), 10**6) == 1.0


def test_weights_are_the_same_however_many_threads_draw_them(monkeypatch):
    monkeypatch.setattr(initial, "BLOCK", 1 << 12)  # several blocks a matrix
    drawn, before = [], torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            model = Decoder(load(SHAPE).model)
            initialise(model, 3)
            drawn.append([*model.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
