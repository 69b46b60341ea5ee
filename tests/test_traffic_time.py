"""Time of the traffic of a step: how sequences and experts are spread, and what of it compute hides, in closed forms."""

import numpy as np
import pytest

from conf.arithmetic import flops_per_token, parameters
from conf.errors import Refused
from conf.program import load
from sim.kernels import Device, rates
from sim.network import Network
from sim.parallel import columns, pieces, steps

MIXTURE = ["model=mixtral_8x7b", "gpu=h100_sxm", "cluster=dgx_h100", "train=large", "train.precision=bf16", "data=prepared",
           "train.seq_len=4096", "train.micro_batch=1", "train.global_batch=256", "train.compile=true", "mesh.zero=1"]  # fmt: skip
LONG = ["model=llama3_8b", "gpu=h100_sxm", "cluster=dgx_h100", "cluster.nodes=2", "train=large", "train.precision=bf16", "data=prepared",
        "train.micro_batch=1", "train.global_batch=64", "train.compile=true"]  # fmt: skip


def parts(words):
    plan = load(words)
    device = Device([rates(plan)])
    p, network = columns([plan]), Network([plan], device)
    return p, device, network, pieces(p, device, network)


def test_copies_go_to_every_expert_and_tokens_once_to_a_server_and_a_rank():
    """Of d servers k random choices meet d (1 − (1 − 1 / d)^k), and a rank keeps what is its own."""
    _, device, network, _ = parts([*MIXTURE, "cluster.nodes=4", "mesh.ep=8"])
    size, links, nic = 1e8, float(device["link.all_to_all"][0]), float(network.nic[0])
    inside = float(network.latency("all_to_all", np.array([8.0]))[0])
    copies = network.all_to_all(np.array([8.0]), 2.0, size)
    assert copies[0] == pytest.approx(inside + 2 * 7 / 8 * size / links)
    once = network.all_to_all(np.array([8.0]), 2.0, size, once=True)
    assert once[0] == pytest.approx(inside + 8 * (1 - (7 / 8) ** 2) * 7 / 8 * size / links)
    outside = float(network.latency("all_to_all", np.array([32.0]))[0])
    met = 4 * (1 - (3 / 4) ** 8)
    assert network.all_to_all(np.array([32.0]), 8.0, size, once=True)[0] == pytest.approx(outside + met * 3 / 4 * size / nic)
    assert network.all_to_all(np.array([32.0]), 8.0, size)[0] == pytest.approx(outside + 8 * 3 / 4 * size / nic)
    strided = network.all_to_all(np.array([8.0]), 2.0, size, stride=4.0)  # two members a server, four servers
    assert strided[0] == pytest.approx(outside + 2 * 3 / 4 * size / nic)


def test_ranks_that_share_experts_hold_less_and_send_more():
    words = [*MIXTURE, "cluster.nodes=4", "mesh.tp=4", "mesh.ep=8"]
    whole, shared = (steps([load([*words, f"mesh.etp={n}"])]) for n in (1, 4))
    assert shared.memory[0] < whole.memory[0]
    assert shared.communication[0] > whole.communication[0]
    assert parts(words)[3].forward[0] == pytest.approx(parts([*words, "mesh.etp=4"])[3].forward[0], rel=0.2)  # the same arithmetic


def test_expert_traffic_beside_compute_costs_what_it_slows():
    words = [*MIXTURE, "cluster.nodes=4", "mesh.ep=8"]
    (_, device, _, shown), (_, _, _, hidden) = parts(words), parts([*words, "mesh.overlap_experts=true"])
    assert hidden.traffic[0] == pytest.approx(float(device["slowdown"][0]) * shown.traffic[0])
    assert shown.traffic[0] < shown.forward[0] + shown.backward[0]


def test_experts_in_one_kernel_take_less_time():
    slow, fast = (steps([load([*MIXTURE, "cluster.nodes=1", f"train.fused_experts={said}"])]).compute[0] for said in ("false", "true"))
    assert fast < slow


def test_a_ring_hides_behind_long_attention_and_gathered_keys_are_waited_for():
    """A ring of two sends keys and values once a pass and their fp32 gradients twice; behind long attention that costs what it slows."""
    for seq, hidden in ((128, False), (131072, True)):
        p, device, network, found = parts([*LONG, f"train.seq_len={seq}", "mesh.cp=2", "mesh.cp_kind=ring", "gpu.host_launch=0 s"])
        keys = seq / 2 * 2 * p.kv_heads * p.head_dim * 2
        spent = 32 * float(2 * network.send("cp", np.array([keys]))[0] + 2 * network.send("cp", np.array([2 * keys]))[0])
        least = float(device["slowdown"][0]) * spent
        assert found.traffic[0] == pytest.approx(least) if hidden else least < found.traffic[0] <= spent
    p, _, network, found = parts([*LONG, "train.seq_len=8192", "mesh.cp=2", "mesh.cp_kind=gather"])
    keys = 2 * 8192 * p.kv_heads * p.head_dim * 2
    pair = sum(float(network.collective(kind, "cp", keys)[0]) for kind in ("all_gather", "reduce_scatter"))
    assert found.traffic[0] == pytest.approx(32 * pair)
    traded = parts([*LONG, "train.seq_len=8192", "mesh.cp=2", "mesh.cp_kind=ulysses"])[3].traffic[0]
    assert 0 < traded < found.traffic[0] * 4


def test_gradients_that_add_up_in_their_products_cost_nothing_more():
    slow, fast = (parts([*LONG, "train.seq_len=4096", f"train.fused_gradients={said}"])[3].added[0] for said in ("false", "true"))
    assert slow > 0 and fast == 0


def test_one_more_predicted_token_is_a_block_and_a_head_more():
    base, more = (load(["model=deepseek_v3", f"model.mtp={n}", "train.micro_batch=1", "train.global_batch=2"]) for n in (0, 1))
    added = parameters(more.model) - parameters(base.model)
    assert added == pytest.approx(11.5e9, rel=0.05)  # the 14 B of the release hold embedding and head once more (0.9 B each)
    ratio = flops_per_token(more.model, 4096) / flops_per_token(base.model, 4096)
    assert 1.02 < ratio < 1.06  # +4% in Megatron-Bridge's own count
    assert steps([more]).step_time[0] > steps([base]).step_time[0]


def test_what_only_sim_does_is_told_in_one_line():
    from real.parallel import refuse_unbuilt

    words = ["model=tiny_qwen3_moe", "train.global_batch=8", "cluster.gpus_per_node=4", "mesh.tp=2", "train.micro_batch=1"]
    with pytest.raises(Refused) as refused:
        refuse_unbuilt(load([*words, "mesh.etp=2", "mesh.dispatch=tokens", "mesh.overlap_experts=true", "train.fused_experts=true"]))
    said = "\n".join(refused.value.problems)
    assert all(f"{key}: real cannot execute it" in said for key in ("mesh.etp=2", "mesh.dispatch=tokens", "train.fused_experts=true"))
    with pytest.raises(Refused, match=r"mesh\.etp=3 must divide mesh\.tp=2; set mesh\.etp=2"):
        load([*words, "mesh.etp=3"])


def test_the_fullest_rank_of_experts_is_waited_for():
    even, uneven = (parts([*MIXTURE, "cluster.nodes=4", "mesh.ep=8", f"model.moe.imbalance={n}"])[3] for n in (1, 1.5))
    assert 1.4 < uneven.traffic[0] / even.traffic[0] < 1.6
    assert 1.1 < uneven.forward[0] / even.forward[0] < 1.5  # attention has no part in it
    with pytest.raises(Refused, match=r"model\.moe\.imbalance=0\.9 is below 1"):
        load([*MIXTURE, "cluster.nodes=4", "model.moe.imbalance=0.9"])


def test_graphs_take_the_host_out_and_blocks_quantise_both_ways_at_once():
    shape = ["model.hidden=1024", "model.heads=8", "model.kv_heads=8", "model.ffn=2048", "train.seq_len=256", "train.global_batch=4"]
    small = ["model=llama3_8b", "gpu=h100_sxm", "cluster=one_gpu", "train=large", "train.precision=bf16", "data=prepared",
             "train.micro_batch=1", *shape]  # fmt: skip
    waits, never = (parts([*small, f"train.graphs={said}"])[3] for said in ("false", "true"))
    assert waits.waiting[0] == 1 and never.waiting[0] == 0 and never.around[0] == 0
    assert never.forward[0] < 0.5 * waits.forward[0]
    tensor, block = (
        steps([load([*LONG, "train.seq_len=4096", "train.precision=fp8", f"train.scaling={kind}"])]) for kind in ("tensor", "block")
    )
    assert 0.97 < block.compute[0] / tensor.compute[0] < 1
