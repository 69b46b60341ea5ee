"""Exchange with Hugging Face: `transformers` computes the same logits from what is exported, and what it saves is read back."""

import json
from pathlib import Path

import pytest
import torch

from conf.errors import Refused
from real import checkpoint, huggingface
from real.initial import initialise
from real.model import Decoder
from real.optim import Optimizer
from tests.worlds import plan_of

transformers = pytest.importorskip("transformers")
LLAMA3 = ["model.rope_scaling.kind=llama3", "model.rope_scaling.factor=8", "model.rope_scaling.original=16"]
GROUPED = ["model.mla.q_rank=0", "model.moe.groups=4", "model.moe.node_limit=2"]
MODELS = [
    ["tiny_llama3"], ["tiny_llama3", "model.tied=true"], ["tiny_llama3", *LLAMA3], ["tiny_qwen3"], ["tiny_qwen3_moe"], ["tiny_mixtral"],
    ["tiny_deepseek_v3"], ["tiny_deepseek_v3", *GROUPED], ["tiny_gpt3"],
]  # fmt: skip


def saved(words: list[str], folder: Path):
    """A plan, a model with every parameter drawn, and its checkpoint."""
    plan = plan_of(f"model={words[0]}", *words[1:], "train.seq_len=32", "mesh.dp_shard=1")
    model = Decoder(plan.model)
    initialise(model, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)):
            if tensor.dim() == 1:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    writer = checkpoint.Writer(folder, plan)
    writer.save(checkpoint.state([model], Optimizer([model], plan.train)), 0)
    return plan, model.eval(), folder / "step-00000000"


@pytest.mark.parametrize("words", MODELS, ids=" ".join)
def test_transformers_computes_the_same_logits(words, tmp_path):
    plan, model, path = saved(words, tmp_path / "checkpoints")
    huggingface.export(path, plan.model, 32, tmp_path / "out", None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(plan.model.vocab, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, other = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    back = Decoder(plan.model)
    huggingface.refuse_other(tmp_path / "again", plan.model)
    huggingface.load(tmp_path / "again", plan.model, [back])
    names = {n for n, _ in model.named_buffers() if "correction" in n}
    for (name, one), (_, other) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(one, other), (name, names)


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "FILE_BYTES", 300_000)
    plan, model, path = saved(["tiny_llama3"], tmp_path / "checkpoints")
    huggingface.export(path, plan.model, 32, tmp_path / "out", None)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].endswith(f"-of-{len(files):05}.safetensors")
    back = Decoder(plan.model)
    huggingface.load(tmp_path / "out", plan.model, [back])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_what_fits_no_family_is_refused(tmp_path):
    for words in (
        ["tiny_deepseek_v3", "model.moe.score=softmax"],
        ["tiny_mixtral", "model.moe.shared=1"],
        ["tiny_gpt3", "model.tied=false"],
    ):
        plan, _, path = saved(words, tmp_path / "-".join(words))
        with pytest.raises(Refused, match="train it here"):
            huggingface.export(path, plan.model, 32, tmp_path / "out", None)
        assert not (tmp_path / "out").exists()


def test_another_models_files_are_refused_with_what_differs(tmp_path):
    plan, _, path = saved(["tiny_llama3"], tmp_path / "checkpoints")
    huggingface.export(path, plan.model, 32, tmp_path / "out", None)
    with pytest.raises(Refused) as refused:
        huggingface.refuse_other(tmp_path / "out", plan.model.but(hidden=192, heads=6))
    assert "hidden_size is 128 in config.json, 192 in the plan" in refused.value.problems
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "model.safetensors").write_bytes(b"torn")
    assert told["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(Refused, match="copy the folder again"):
        huggingface.load(tmp_path / "out", plan.model, [Decoder(plan.model)])
