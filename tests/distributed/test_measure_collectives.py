"""The counter sees every kind of call, and LoRA issues no collective that the frozen base does not."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import run_distributed
from tiers import exhaustive, few_of
from toy import ALL_TARGETS, MODEL, SEVEN_TARGETS, Case, build_batches, build_case

from lora_dist.config import LoraConfig, TopologyConfig
from lora_dist.gradients import sum_tp_partial_gradients
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.collectives import Collective, compute_count_per_layer, count_collectives

NUM_MICROBATCHES = 2
NUM_FLOATS = 4
CPU = torch.device("cpu")


def issue_each_kind() -> list[Collective]:
    topology = build_topology(TopologyConfig(tp_size=2), device=CPU, local_rank=dist.get_rank(), seed=0)
    group, peer = topology.tp_group, 1 - topology.tp_rank
    x, wide = torch.ones(NUM_FLOATS), torch.empty(2 * NUM_FLOATS)
    with count_collectives(topology) as counter:
        dist.all_reduce(x, group=group, async_op=True).wait()
        dist.all_reduce(x)
        dist.all_gather_into_tensor(wide, x, group=group)
        dist.all_gather(list(wide.chunk(2)), x, group=group)
        dist.reduce_scatter_tensor(x, wide, group=group)
        dist.broadcast(x, 0, group=group)
        pair = [dist.P2POp(dist.isend, x, peer, group), dist.P2POp(dist.irecv, wide[:NUM_FLOATS].clone(), peer, group)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        with dist._coalescing_manager(group=group, async_ops=True) as manager:
            dist.all_reduce(x, group=group)
            dist.all_reduce(wide, group=group)
        manager.wait()
        dist.barrier(group=group)
    dist.all_reduce(x)
    return counter.read()


def test_every_kind_is_counted_with_its_bytes_and_group() -> None:
    narrow, wide = 4 * NUM_FLOATS, 8 * NUM_FLOATS
    expected = {
        ("all_reduce", "tp", narrow): 1,
        ("all_reduce", "tp", narrow + wide): 1,
        ("all_reduce", "world", narrow): 1,
        ("all_gather", "tp", wide): 2,
        ("reduce_scatter", "tp", wide): 1,
        ("broadcast", "tp", narrow): 1,
        ("send", "tp", narrow): 1,
        ("recv", "tp", narrow): 1,
        ("barrier", "tp", 0): 1,
    }
    for collectives in run_distributed(issue_each_kind, 2):
        assert {(one.op, one.group, one.payload_bytes): one.count for one in collectives} == expected


def count_step(
    case: Case, targets: list[str], input_grad: bool, use_dora: bool = False
) -> tuple[list[Collective], list[Collective]]:
    """Collectives of forward and backward, and of the sums after it; no targets leave the frozen base."""
    case.lora = LoraConfig(rank=3, target_modules=targets or ["q_proj"], use_dora=use_dora)
    gpt, trainable, topology = build_case(case)
    if not targets:
        remove_adapters(gpt)
        trainable = []
    if input_grad and topology.is_first_stage:
        gpt.embedding.register_forward_hook(require_grad)
    with count_collectives(topology, gpt.decoder.layers) as step:
        forward_backward(gpt, build_batches(topology), seed=0, step=0, scale_loss=None)
    with count_collectives(topology) as after:
        sum_tp_partial_gradients(trainable, topology)
    return step.read(), after.read()


def remove_adapters(gpt: ShardedGpt) -> None:
    for layer in gpt.decoder.layers:
        layer.self_attention.linear_qkv.lora = None


def require_grad(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    """The frozen base has a backward only where its input asks for a gradient."""
    return output if output.requires_grad else output.requires_grad_()


def count_by_kind(collectives: list[Collective]) -> Counter[tuple[str, str, bool]]:
    counts: Counter[tuple[str, str, bool]] = Counter()
    for one in collectives:
        counts[one.op, one.group, one.in_layer] += one.count
    return counts


@pytest.mark.parametrize(
    ("targets", "recompute"),
    [(ALL_TARGETS, "none"), (ALL_TARGETS, "full"), (["q_proj", "v_proj"], "none"), (["o_proj", "up_proj"], "none")],
    ids=["all", "all-recompute", "qv", "o-up"],
)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_lora_adds_no_collective(sequence_parallel: bool, targets: list[str], recompute: str) -> None:
    case = Case(tp_size=2, sequence_parallel=sequence_parallel, recompute=recompute)
    base, _ = run_distributed(count_step, 2, case, [], True)[0]
    lora, after = run_distributed(count_step, 2, case, targets, True)[0]
    assert count_by_kind(lora) == count_by_kind(base)
    assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)]
    per_layer = compute_count_per_layer(
        lora, group="tp", num_layers=MODEL.num_layers, num_microbatches=NUM_MICROBATCHES
    )
    # Two linears end in a reduction and two begin with its adjoint; with SP each is a gather or a scatter both ways.
    forward, backward = (4, 4) if sequence_parallel else (2, 2)
    assert per_layer == forward + backward + (forward if recompute == "full" else 0)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_nor_to_gated_layers_with_shared_heads(sequence_parallel: bool) -> None:
    model = replace(MODEL, family="qwen3", num_kv_heads=2, tied_output=False)
    case = Case(model=model, tp_size=2, sequence_parallel=sequence_parallel)
    base, _ = run_distributed(count_step, 2, case, [], True)[0]
    lora, after = run_distributed(count_step, 2, case, SEVEN_TARGETS, True)[0]
    assert count_by_kind(lora) == count_by_kind(base)
    assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)]


def test_dora_adds_one_small_one_a_forward_of_a_split_row() -> None:
    """[32] fp64 squares of o_proj's and of down_proj's rows; nothing for the linears whose rows are whole."""
    lora, _ = run_distributed(count_step, 2, Case(tp_size=2), ALL_TARGETS, True)[0]
    dora, _ = run_distributed(count_step, 2, Case(tp_size=2), ALL_TARGETS, True, True)[0]
    assert set(lora) < set(dora)
    [added] = set(dora) - set(lora)
    assert (added.op, added.group, added.in_layer, added.payload_bytes) == ("all_reduce", "tp", True, 32 * 8)
    assert added.count == 2 * MODEL.num_layers * NUM_MICROBATCHES


def test_counted_on_every_microbatch_and_layer() -> None:
    """The same numbers per call: four activation-sized all-reduces a layer and microbatch, none of another size."""
    lora, _ = run_distributed(count_step, 2, Case(tp_size=2), ALL_TARGETS, True)[0]
    batch, activation_bytes = 2, 16 * 32 * 8
    in_layers = [one for one in lora if one.in_layer]
    assert [(one.op, one.group, one.payload_bytes) for one in in_layers] == [
        ("all_reduce", "tp", batch * activation_bytes)
    ]
    assert in_layers[0].count == 4 * MODEL.num_layers * NUM_MICROBATCHES


def test_the_lowest_adapted_layer_saves_one() -> None:
    """Without a gradient for the embedding, the first layer's projection need not reduce one: one call less each."""
    with_grad, _ = run_distributed(count_step, 2, Case(tp_size=2), ALL_TARGETS, True)[0]
    without, _ = run_distributed(count_step, 2, Case(tp_size=2), ALL_TARGETS, False)[0]
    difference = count_by_kind(with_grad)
    difference.subtract(count_by_kind(without))
    assert {kind: n for kind, n in difference.items() if n} == {("all_reduce", "tp", True): NUM_MICROBATCHES}


def test_pipelines_send_activations_only() -> None:
    base = run_distributed(count_step, 4, Case(tp_size=2, pp_size=2), [], True)
    lora = run_distributed(count_step, 4, Case(tp_size=2, pp_size=2), ALL_TARGETS, True)
    for (base_step, _), (lora_step, _) in zip(base, lora, strict=True):
        assert count_by_kind(lora_step) == count_by_kind(base_step)
        assert sum(one.count for one in lora_step if one.op in ("send", "recv")) == 2 * NUM_MICROBATCHES


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_latents_enter_the_heads_as_one_narrow_tensor(sequence_parallel: bool) -> None:
    """In place of the hidden one that enters a dense layer's attention; queries without a latent enter beside them."""
    sizes = {"head_size": 10, "kv_latent_size": 12, "rope_head_size": 4, "value_head_size": 6}
    latent = replace(MODEL, family="deepseek_v3", num_experts=3, experts_per_token=2, **sizes)
    models = replace(latent, query_latent_size=10), latent, replace(MODEL, family="mistral")
    steps = [
        run_distributed(count_step, 2, Case(model=model, tp_size=2, sequence_parallel=sequence_parallel), targets, True)
        for model, targets in zip(models, (["all"], ["all"], ["q_proj", "v_proj", "o_proj"]), strict=True)
    ]
    (narrow, after), (beside, _), (dense, _) = (ranks[0] for ranks in steps)
    assert count_by_kind(narrow) == count_by_kind(dense)
    assert sum_bytes(narrow) < sum_bytes(dense)
    assert sum(count_by_kind(beside).values()) > sum(count_by_kind(dense).values())
    assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)]


def sum_bytes(collectives: list[Collective]) -> int:
    return sum(one.count * one.payload_bytes for one in collectives)


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute"),
    [(True, "full"), *exhaustive((False, "none"), (True, "none"), (False, "full"))],
)
def test_norms_of_all_heads_are_one_small_one_each_way(sequence_parallel: bool, recompute: str) -> None:
    """[2, S, B] in fp64, of queries and keys together; adapters add none."""
    picked = {"num_experts": 3, "experts_per_token": 2, "num_kv_heads": 2}
    whole, plain = (
        Case(
            model=replace(MODEL, family=family, **picked),
            tp_size=2,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
        )
        for family in ("minimax_m2", "mixtral")
    )
    attention = ["q_proj", "v_proj"]
    without, base = (run_distributed(count_step, 2, case, attention, True)[0][0] for case in (plain, whole))
    [added] = set(base) - set(without)
    assert set(without) < set(base)
    assert (added.op, added.group, added.in_layer, added.payload_bytes) == ("all_reduce", "tp", True, 2 * 16 * 2 * 8)
    each_way = 3 if recompute == "full" else 2
    assert added.count == each_way * MODEL.num_layers * NUM_MICROBATCHES
    lora, after = run_distributed(count_step, 2, whole, SEVEN_TARGETS, True)[0]
    assert count_by_kind(lora) == count_by_kind(base)
    assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)]


@pytest.mark.parametrize("sequence_parallel", few_of([False, True], True))
def test_experts_communicate_what_a_dense_layer_does(sequence_parallel: bool) -> None:
    """Bytes too; and adapters on the experts add nothing to it but what is summed once a step."""
    picked, shared = {"num_experts": 3, "experts_per_token": 2}, {"shared_ffn_size": 24}
    bounds = {"swiglu_alpha": 1.7, "swiglu_limit": 7.0, "num_kv_heads": MODEL.num_heads}
    delta = {"delta_key_heads": 2, "delta_value_heads": 4, "delta_key_size": 4, "delta_value_size": 6}
    mixtral, glm, gpt_oss, qwen3_next, dense = (
        Case(model=replace(MODEL, **sizes), tp_size=2, sequence_parallel=sequence_parallel)
        for sizes in (
            {"family": "mixtral", **picked},
            {"family": "glm4_moe", **picked, **shared, "num_dense_layers": 1, "dense_ffn_size": 40},
            {"family": "gpt_oss", **picked, **bounds},
            {"family": "qwen3_next", **picked, **shared, **delta, "delta_kernel_size": 4, "full_attention_layers": [0]},
            {"family": "mistral"},
        )
    )
    attention = ["q_proj", "v_proj"]
    in_all_layers = [*attention, "in_proj_qkvz", "in_proj_ba"]
    frozen, *alike = (
        run_distributed(count_step, 2, case, in_all_layers if case is qwen3_next else attention, True)[0][0]
        for case in (mixtral, glm, gpt_oss, qwen3_next, dense)
    )
    assert frozen
    assert alike == [frozen] * 4
    for case, targets in ((mixtral, ["v_proj"]), (glm, ["all"]), (gpt_oss, ["v_proj"]), (qwen3_next, ["all"])):
        targets = [*targets, "gate_proj", "up_proj", "down_proj"]
        adapted, after = run_distributed(count_step, 2, case, targets, True)[0]
        assert count_by_kind(adapted) == count_by_kind(frozen)
        assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)]
