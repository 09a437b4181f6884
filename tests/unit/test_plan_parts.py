"""The plan's parts without a model: the repeating pipeline, messages, step time, files, search, tables."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hf_toy import build_run_config

from lora_dist.base_shapes import count_parameters, count_stage_layers, list_stages
from lora_dist.cli.compose import compose_config
from lora_dist.cli.schema import list_groups
from lora_dist.config import HardwareConfig, LoraConfig, ModelConfig, PlanConfig, RunConfig, TopologyConfig, ZeroConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.measure.collectives import Collective
from lora_dist.plan.clock import ComputeClock, compute_message_seconds
from lora_dist.plan.execute import compute_world_size, require_hardware
from lora_dist.plan.job import compute_checkpoint_bytes, compute_step_seconds, include_own_recompute, list_variants
from lora_dist.plan.process_plan import ProcessPlan, name_stage
from lora_dist.plan.report import render_search
from lora_dist.plan.search import Candidate, compute_weight_bytes, list_candidates, search_topologies
from lora_dist.plan.stages import group_stages
from lora_dist.plan.steady import WatchedBatches, Work, compute_num_executed, count_calls

GIB = 2**30
HARDWARE = compose_config(["data=fake", "hardware=v100_32gb"]).hardware
GPT3 = compose_config(["model=gpt3_175b"]).model
TINY = compose_config(["model=tiny", "data.seq_len=64"]).model


def call(op: str = "all_reduce", group: str = "tp", payload_bytes: int = 10**9, count: int = 1) -> Collective:
    return Collective(op=op, group=group, in_layer=False, payload_bytes=payload_bytes, count=count)


def test_stages_worth_executing() -> None:
    config = build_run_config(replace(TINY, num_layers=8))

    def group(pp_size: int, **options: object) -> list[tuple[int, ...]]:
        topology = replace(config.topology, pp_size=pp_size)
        return group_stages(replace(config, topology=topology, **options))

    assert [group(n) for n in (1, 2, 4)] == [[(0,)], [(0,), (1,)], [(0,), (1, 2), (3,)]]
    assert group(8) == [(0,), (1, 2, 3, 4, 5, 6), (7,)]
    assert group(8, lora=LoraConfig(layers=["2", "5"])) == [(0,), (1, 3, 4, 6), (2, 5), (7,)]
    assert group(8, lora=LoraConfig(layers=["2", "5"]), method="full") == group(8)
    assert group(4, lora=LoraConfig(target_modules=["q_proj", r"layers\.4\.v_proj"])) == [(0,), (1,), (2,), (3,)]
    windows = replace(TINY, num_layers=8, family="mistral", sliding_window=9, full_attention_layers=[3])
    assert group(8, model=windows) == [(0,), (1, 2, 4, 5, 6), (3,), (7,)]
    uneven = replace(config, topology=replace(config.topology, pp_size=4), lora=LoraConfig(layers=["4-5"]))
    assert group_stages(uneven, with_first=True) == [(0, 1), (2,), (3,)]
    assert group_stages(replace(uneven, lora=LoraConfig()), with_first=True) == [(0, 1, 2), (3,)]
    assert [name_stage(0, 1), *(name_stage(i, 3) for i in range(3))] == ["only", "first", "middle", "last"]


def test_stages_with_and_without_experts_or_of_unequal_length_are_kinds_of_their_own() -> None:
    sizes = {"num_experts": 4, "experts_per_token": 2, "num_dense_layers": 3, "dense_ffn_size": 64}
    model = replace(TINY, family="glm4_moe", num_layers=10, **sizes)
    config = build_run_config(model)
    config = replace(config, topology=replace(config.topology, pp_size=5))
    assert group_stages(config) == [(0,), (1,), (2, 3), (4,)]
    assert [count_stage_layers(number, 5) for number in (10, 11, 14)] == [[2] * 5, [2, 2, 2, 3, 2], [2, 3, 3, 3, 3]]
    longer = replace(config, model=replace(model, num_layers=11, num_dense_layers=1))
    assert group_stages(longer) == [(0,), (1, 2), (3,), (4,)]


def test_stages_may_begin_where_an_indexer_is() -> None:
    """Of GLM-5.2, whose layers from the third on share one in four."""
    borrowing = [layer for layer in range(3, 78) if (layer - 2) % 4]
    overrides = ["model=glm5", "data=fake", f"model.layers_without_indexer={borrowing}"]
    plain, moved = (compose_config([*overrides, f"model.stages_begin_at_indexers={on}"]).model for on in (False, True))
    assert [layers.start for layers in list_stages(plain, 4)] == [0, 19, 39, 59]
    assert [layers.start for layers in list_stages(moved, 4)] == [0, 18, 38, 58]
    assert [len(layers) for layers in list_stages(moved, 21)] == [1, 1, *[4] * 19]
    with pytest.raises(ValueError, match=r"topology.pp_size=22 exceeds the 21 layers with an indexer of their own"):
        list_stages(moved, 22)


def test_executes_the_warm_up_and_three_more() -> None:
    assert compute_num_executed(0, 4, 128) == 6
    assert compute_num_executed(3, 4, 128) == 3
    assert compute_num_executed(0, 4, 2) == 2


def take(works: list[Work]) -> WatchedBatches:
    readings = iter(works)
    watched = WatchedBatches([object()] * len(works), lambda: next(readings))  # type: ignore[list-item]
    assert len(list(watched)) == len(works)
    return watched


def test_the_steady_state_is_what_repeats() -> None:
    def at(flops: int, calls: int) -> Work:
        return Work(flops=flops, seconds=flops / 2, collectives=count_calls([call(count=calls)]))

    steady = take([at(0, 1), at(7, 2), at(17, 4), at(27, 6)]).compute_steady(1)
    assert steady == Work(flops=10, seconds=5.0, collectives=Counter({call(): 2}))
    assert take([at(0, 1), at(7, 2)]).compute_steady(0) is None
    with pytest.raises(AssertionError):
        take([at(0, 1), at(10, 2), at(21, 3)]).compute_steady(0)
    more = at(30, 7).plus(steady, 3)
    assert (more.flops, more.list_collectives()) == (60, [call(count=13)])


def test_rings_and_latency() -> None:
    assert HARDWARE is not None
    hardware = replace(HARDWARE, link_gb_s=100, network_gb_s=10, link_latency_us=0, network_latency_us=1e6)
    assert compute_message_seconds(call(), 4, within_node=True, hardware=hardware) == pytest.approx(2 * 0.75 / 100)
    assert compute_message_seconds(call("all_gather"), 4, within_node=True, hardware=hardware) == pytest.approx(0.0075)
    assert compute_message_seconds(call("send"), 2, within_node=False, hardware=hardware) == pytest.approx(1.1)
    assert compute_message_seconds(call(), 1, within_node=True, hardware=hardware) == 0.0


def process(pp_rank: int, pp_size: int, seconds: float, rest: float) -> ProcessPlan:
    return ProcessPlan(
        pp_rank=pp_rank,
        pp_ranks=(pp_rank,),
        stage=name_stage(pp_rank, pp_size),
        num_layers=1,
        num_parameters=1,
        num_trainable=1,
        ledger={},
        peak_bytes=0,
        setup_peak_bytes=0,
        held_bytes=0,
        largest={},
        num_in_flight=1,
        num_microbatches=8,
        num_executed=3,
        flops=0,
        collectives=[],
        compute_seconds=8 * seconds,
        communication_seconds=rest,
        microbatch_seconds=seconds,
    )


def test_a_pipeline_fills_and_drains_at_its_slowest_stage() -> None:
    assert compute_step_seconds([process(0, 1, 2.0, 0.5)], 1) == 16.5
    assert compute_step_seconds([process(0, 2, 2.0, 0.5), process(1, 2, 3.0, 0.1)], 2) == (8 + 1) * 3.0 + 0.5


def test_the_papers_checkpoint() -> None:
    config = build_run_config(GPT3, LoraConfig(rank=4), dtype="fp16")
    sizes = compute_checkpoint_bytes(config, build_adapter_specs(config.lora, GPT3))
    assert sizes["factors fp16"] == 37_748_736
    assert sizes["base model"] == pytest.approx(349.2e9, rel=1e-3)
    full = compute_checkpoint_bytes(replace(config, method="full"), [])
    assert full == {"model": sizes["base model"], "resume state": 6 * sizes["base model"]}


def test_variants_and_world_size() -> None:
    config = build_run_config(TINY, plan=PlanConfig(recompute=["none", "full"]))
    assert [(v.method, v.loop.recompute) for v in list_variants(config)] == [
        ("lora", "none"), ("lora", "full"), ("full", "none"), ("full", "full"),
    ]  # fmt: skip
    assert compute_world_size(config) == 1
    odd = replace(config, topology=replace(config.topology, dp_size=3), plan=PlanConfig(num_gpus=4))
    with pytest.raises(ValueError, match="tp 1 x pp 1 x dp 3 = 3 processes"):
        compute_world_size(odd)


@pytest.mark.parametrize(
    ("own", "shown", "expected"),
    [
        ("none", ["full"], ["full"]),
        ("selective", ["none", "full"], ["none", "selective", "full"]),
        ("full", ["none", "auto"], ["none", "full", "auto"]),
        ("full", ["none"], ["none", "full"]),
        ("auto", ["none", "full"], ["none", "full"]),
        ("auto", ["auto"], ["auto"]),
    ],
)
def test_the_jobs_own_recomputation_is_planned(own: str, shown: list[str], expected: list[str]) -> None:
    """From the least to the most, which is the order in which a search tries them."""
    config = build_run_config(TINY, plan=PlanConfig(recompute=shown))
    config.loop.recompute = own
    planned, left_out = include_own_recompute(config)
    assert planned.plan.recompute == expected
    assert (left_out is None) == (own in expected or own == "none")
    if left_out is not None:
        assert left_out.startswith("loop.recompute=auto is left out: plan.recompute=['none', 'full'] says what is")


def test_hardware_is_asked_for_and_its_dtypes_hold() -> None:
    with pytest.raises(ValueError, match="hardware is not set"):
        require_hardware(build_run_config(TINY))
    with pytest.raises(ValueError, match="dtype=bf16: v100_32gb computes in fp16, fp32"):
        require_hardware(build_run_config(TINY, hardware=HARDWARE, dtype="bf16"))


@pytest.mark.parametrize("name", list_groups()["hardware"])
def test_every_hardware_file_composes(name: str) -> None:
    hardware = compose_config([f"hardware={name}"]).hardware
    assert isinstance(hardware, HardwareConfig)
    assert (hardware.name, "fp32" in hardware.peak_tflops) == (name, True)
    assert hardware.available_gib > 0


def search_config(num_gpus: int | None, **options: object) -> RunConfig:
    return build_run_config(GPT3, hardware=HARDWARE, dtype="fp16", plan=PlanConfig(num_gpus=num_gpus), **options)


def test_weights_of_gpt3() -> None:
    """349.2 GB of fp16 weights; TP8 alone leaves 40.7 GiB a GPU."""
    assert compute_weight_bytes(GPT3, "fp16", tp_size=8, pp_size=1) / GIB == pytest.approx(40.7, abs=0.05)
    assert compute_weight_bytes(GPT3, "fp16", tp_size=1, pp_size=1) == pytest.approx(
        2 * count_parameters(GPT3), rel=1e-4
    )


def test_candidates_divide_the_model() -> None:
    found = list_candidates(search_config(12))
    assert {(one.tp_size, one.pp_size) for one in found if one.tp_size * one.pp_size == 12} == {
        (1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1),
    }  # fmt: skip
    assert all(one.tp_size * one.pp_size * one.dp_size + one.num_idle == 12 for one in found)


def test_what_cannot_hold_the_weights_is_not_executed() -> None:
    found = search_topologies(search_config(8))
    assert all(one.job is None for one in found)
    reasons = {one.name: one.reason for one in found}
    assert reasons["tp8 pp1 dp1"] == "40.7 GiB of weights > 31.8 GiB"
    assert reasons["tp3 pp2 dp1"] == "tp3 does not divide a node of 8 GPUs"
    with pytest.raises(ValueError, match=r"plan.search=true needs plan.num_gpus"):
        search_topologies(search_config(None))


@pytest.mark.parametrize(
    ("zero_stage", "options", "reasons"),
    [
        (3, {}, {"tp1 pp2 dp1": "zero.stage=3 needs topology.pp_size=1, got 2"}),
        (1, {"cuda_graphs": True}, {"tp1 pp2 dp1": "cuda_graphs=true needs topology.pp_size=1"}),
        (1, {"method": "full"}, {"tp2 pp1 dp1": "topology.tp_size=2 keeps each of 1 key-value heads on several"}),
    ],
)
def test_what_the_other_settings_rule_out_is_a_reason(zero_stage: int, options: dict, reasons: dict[str, str]) -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 1, "ffn_hidden_size": 128}
    model = ModelConfig(name="small", family="llama", vocab_size=64, max_position_embeddings=2048, **sizes)
    plan = PlanConfig(num_gpus=2, recompute=["none"])
    zero, hardware = ZeroConfig(stage=zero_stage), replace(HARDWARE, gpus_per_node=8)
    config = build_run_config(model, zero=zero, hardware=hardware, dtype="fp16", plan=plan, **options)
    found = {one.name: one for one in search_topologies(config)}
    assert set(found) == {"tp1 pp1 dp2", "tp1 pp2 dp1", "tp2 pp1 dp1"}
    for name, one in found.items():
        assert (one.reason or "").startswith(reasons.get(name, "")), one.reason
        assert (one.job is None) == (name in reasons)
    assert "fewest GPUs a replica with recompute none: 1 (tp1 pp1)" in render_search(config, list(found.values()))


def test_causal_attention_takes_half_the_time_of_what_is_counted() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    query, clocks = torch.zeros(1, 2, 2048, 64), {}
    for causal in (True, False):
        clock = clocks[causal] = ComputeClock(HARDWARE)
        args = query, query, query, 0.0, causal
        clock.add(attend, args, {}, attend(*args))
    assert clocks[True].flops == clocks[False].flops == 2 * 2 * 2048 * 2048 * 64 * 2
    assert clocks[True].seconds == pytest.approx(clocks[False].seconds / 2)


def test_rows_over_processes_are_of_one_replica() -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 1, "ffn_hidden_size": 128}
    model = ModelConfig(name="small", family="llama", vocab_size=64, max_position_embeddings=2048, **sizes)
    plan, topology = PlanConfig(num_gpus=4, recompute=["none"]), TopologyConfig(cp_size=2)
    config = build_run_config(model, topology=topology, hardware=HARDWARE, dtype="fp16", plan=plan)
    found = search_topologies(config)
    assert {one.name for one in found} == {"tp1 cp2 pp1 dp2", "tp1 cp2 pp2 dp1", "tp2 cp2 pp1 dp1"}
    assert all(one.job is not None and one.job.world_size == one.num_gpus == 4 for one in found)
    assert "fewest GPUs a replica with recompute none: 2 (tp1 cp2 pp1)" in render_search(config, found)


def test_replicas_only_where_rows_divide() -> None:
    config = search_config(32)
    config = replace(config, loop=replace(config.loop, micro_batch_size=1, global_batch_size=6))
    one = next(one for one in list_candidates(config) if (one.tp_size, one.pp_size) == (8, 1))
    assert one == Candidate(tp_size=8, pp_size=1, dp_size=3, num_idle=8, recompute="")
