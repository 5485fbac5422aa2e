"""Arithmetic and memory of a step, against what torch counts and what a run needs."""

import pytest
import torch
from tiny import random_ids, tiny_mistral, tiny_quiet_star
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import bench
import cost
from model import MistralConfig
from thoughts import ThoughtConfig, quiet_star_loss


@pytest.mark.parametrize("tied", [False, True])
def test_parameters(tied):
    config = MistralConfig(50, 16, 32, 3, 4, 2, tie_word_embeddings=tied)
    from model import Mistral
    from thoughts import QuietStar

    model = QuietStar(Mistral(config), ThoughtConfig(init_id=0))
    assert cost.parameters(config)[2] == sum(p.numel() for p in model.parameters())


def test_flops_of_a_step():
    """Within 10 % of the matrix products that torch counts, which include what is done twice."""
    aten = torch.ops.aten
    fused = {  # torch counts the fused attention of other devices only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda d_out, q, k, v, *_, **__: sdpa_backward_flop_count(d_out, q, k, v)
        ),
    }
    config = MistralConfig(64, 64, 128, 2, 4, 2)
    from model import Mistral
    from thoughts import QuietStar

    torch.manual_seed(0)
    model = QuietStar(Mistral(config), ThoughtConfig(2, 4, 2, init_id=0, policy_weight=1.0))
    T, J = 40, 38
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with counter:
        quiet_star_loss(model(random_ids(1, T, 64)), model.config)[0].backward()
    counted = cost.step_flops(config, model.config, cost.Work(1, 1, T, J))
    assert abs(counter.get_total_flops() / counted - 1) < 0.1


@pytest.mark.skipif(not bench.Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_plan_of_a_scaled_down_run(checkpointing):
    """What a step of the small model needs over its weights is within a factor 1.6 of the plan."""
    case = bench.Case(96, checkpointing=checkpointing)
    needed = bench.in_its_own_process(bench.peak_bytes, case)
    work = cost.Work(1, 1, case.T, case.T - case.A)
    plan = cost.memory_plan(bench.SMALL, ThoughtConfig(), work, 4, 0, checkpointing)
    assert 1 / 1.6 < needed / (plan["gradients"] + plan["activations"]) < 1.6


def test_mistral_7b_fits_80_gb_with_the_papers_settings():
    config = MistralConfig(32000, 4096, 14336, 32, 32, 8)
    work = cost.Work(batch=8, at_once=1, T=256, J=252)
    plan = cost.memory_plan(config, ThoughtConfig(), work, 2, 4, checkpointing=True)
    assert 55e9 < plan["total"] < 80e9
    masters = cost.memory_plan(config, ThoughtConfig(), work, 2, 12, checkpointing=True)
    assert masters["total"] > 80e9


def test_peak_and_free_memory():
    assert cost.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert cost.free_memory(torch.device("cpu")) > 1e8
    assert tiny_quiet_star().model.config == tiny_mistral().config
