"""The simulator's collectives against the trainer's own word: its code traced on fake ranks, equal to the byte."""

from multiprocessing import get_context

import pytest

from conf.program import load
from real.dry import collectives
from sim.traffic import totals, traffic

TINY = [
    "cluster.gpus_per_node=8",
    "train.micro_batch=1",
    "train.seq_len=64",
    "data.path=null",
    "data.tokens=1000000",
    "tokenizer.vocab=256",
]
FEW = [
    "model=tiny_llama3 train.global_batch=32 mesh.dp_replicate=2",
    "model=tiny_llama3 train.global_batch=8 mesh.cp=2 mesh.cp_kind=ulysses",
    "model=tiny_llama3 train.global_batch=16 mesh.tp=2 mesh.cp=2 train.recompute=full",
    "model=tiny_llama3 train.global_batch=16 mesh.pp=2 mesh.tp=2 train.recompute=full train.recompute_share=0.5",
    "model=tiny_llama3 train.global_batch=16 mesh.pp=2 mesh.vpp=2 mesh.schedule=zbv mesh.dp_replicate=2",
    "model=tiny_llama3 train.global_batch=8 model.tied=true mesh.tp=2",
    "model=tiny_qwen3_moe train.global_batch=16 mesh.tp=2 mesh.ep=4",
    "model=tiny_qwen3_moe train.global_batch=16 mesh.pp=2 mesh.cp=2 mesh.ep=2",
    "model=tiny_deepseek_v3 train.global_batch=8 mesh.tp=2 mesh.ep=4",
]
MORE = [
    "model=tiny_llama3 train.global_batch=16",
    "model=tiny_llama3 train.global_batch=16 mesh.tp=2",
    "model=tiny_llama3 train.global_batch=16 mesh.tp=2 train.precision=bf16 gpu=h100_sxm",
    "model=tiny_llama3 train.global_batch=8 mesh.cp=2",
    "model=tiny_llama3 train.global_batch=8 mesh.cp=4 mesh.cp_kind=gather",
    "model=tiny_llama3 train.global_batch=8 mesh.tp=2 train.recompute=selective",
    "model=tiny_llama3 train.global_batch=16 mesh.pp=2 mesh.tp=2",
    "model=tiny_qwen3_moe train.global_batch=8 mesh.ep=8 train.recompute=full",
    "model=tiny_deepseek_v3 train.global_batch=8 mesh.cp=2 mesh.ep=2",
]
MANY = [
    "model=llama3_8b cluster.nodes=64 mesh.tp=8 mesh.cp=2 train.seq_len=4096 train.global_batch=64",
    "model=llama3_8b cluster.nodes=64 mesh.dp_replicate=8 mesh.tp=2 mesh.cp=2 mesh.pp=2 train.seq_len=4096 train.global_batch=256",
    "model=gpt3_175b cluster.nodes=64 mesh.tp=8 mesh.pp=8 train.seq_len=2048 train.global_batch=256",
    "model=mixtral_8x7b cluster.nodes=64 mesh.tp=2 mesh.ep=8 mesh.pp=4 train.seq_len=2048 train.global_batch=256",
    "model=qwen3_30b_a3b cluster.nodes=16 mesh.ep=16 train.seq_len=2048 train.global_batch=256",
    "model=deepseek_v3 cluster.nodes=64 mesh.tp=2 mesh.pp=8 mesh.ep=16 train.seq_len=2048 train.global_batch=256",
]


def both(task):
    """Collectives by kind, axis and ranks on the first rank of a pipeline rank, traced and counted; axes of the same ranks share a
    group, which the trace cannot tell apart."""
    words, rank = task
    plan = load([*TINY, *words.split()])
    traced = collectives(plan, rank * plan.ranks // plan.mesh.pp)
    joint = {name: call["axis"] for call in traced for name in call["axis"].split("/")}
    counted = totals([call._replace(axis=joint.get(call.axis, call.axis)) for call in traffic(plan, rank)])
    return {(c["kind"], c["axis"], c["ranks"]): (c["calls"], c["bytes"]) for c in traced}, counted


def compare(meshes):
    tasks = [(words, rank) for words in meshes for rank in sorted({0, load([*TINY, *words.split()]).mesh.pp - 1})]
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:  # a process group outlives its world in a process
        for task, (traced, counted) in zip(tasks, pool.imap(both, tasks), strict=True):
            assert counted == traced and counted, task


def test_every_collective_of_small_meshes_is_foretold():
    compare(FEW)


@pytest.mark.slow
def test_and_every_one_of_simpler_meshes():
    compare(MORE)


@pytest.mark.slow
def test_every_collective_of_512_ranks_is_foretold():
    compare(MANY)


def test_a_rank_alone_sends_nothing():
    assert traffic(load([*TINY, "model=tiny_llama3", "cluster.gpus_per_node=1", "train.global_batch=4"])) == []
