"""LoRA put into a Megatron shard: which of its linears holds which targets, and what then trains."""

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from lora_dist.lora.experts import ExpertShard
from lora_dist.lora.layer import LoraShard, ShardPlace, compute_fused_rows, find_shared_ranges
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import compute_linear_shapes, find_linear
from lora_dist.lora.trained_base import list_trained_base
from lora_dist.mcore.base_parameters import describe_base_parameters
from lora_dist.mcore.experts import ExpertLinears
from lora_dist.mcore.layers import LoraLinear, LoraLocalLinear, LoraWholeLinear
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter, find_source

_NORM_BEFORE = {
    **dict.fromkeys(("self_attention.linear_qkv", "self_attention.linear_in"), "input_layernorm"),
    **dict.fromkeys([f"self_attention.linear_{name}_proj" for name in ("q", "q_down", "kv_down")], "input_layernorm"),
    **dict.fromkeys(("mlp.linear_fc1", "mlp.shared_experts.linear_fc1"), "pre_mlp_layernorm"),
}


def apply_lora(
    gpt: ShardedGpt, specs: Sequence[AdapterSpec], *, bias: str, seed: int, modules: Sequence[str] = ()
) -> list[TrainableParameter]:
    """Freeze the base, put this stage's adapters into its linears, and list what trains here.

    `bias` none, lora_only (biases of adapted linears) or all; `modules` of lora.modules_to_save train whole. Another
    stage's specs are that stage's business.
    """
    gpt.requires_grad_(False)
    trainable: list[TrainableParameter] = []
    for local_name, shard in build_shards(gpt, specs, seed=seed).items():
        gpt.get_submodule(local_name).lora = shard
        *layer, linear_name = local_name.split(".", 3)  # decoder.layers.N and the rest
        if (norm := _NORM_BEFORE.get(linear_name)) is not None:
            gpt.get_submodule(".".join([*layer, norm])).keeps_output = True
        trainable += describe_factors(shard)
    return trainable + enable_base(gpt, list_trained_base(specs, gpt.model, bias, modules))


def build_shards(gpt: ShardedGpt, specs: Sequence[AdapterSpec], *, seed: int) -> dict[str, LoraShard]:
    """This stage's adapters by the local name of their linear, not yet put into it."""
    shards = {}
    for (layer, linear_name), group in _group_by_linear(gpt, specs).items():
        local_name = f"decoder.layers.{layer - gpt.first_layer}.{linear_name}"
        linear = gpt.get_submodule(local_name)
        assert isinstance(linear, LoraLinear | ExpertLinears)
        shards[local_name] = _build_shard(gpt, linear, group, seed)
    return shards


def find_shards(gpt: ShardedGpt) -> list[LoraShard]:
    """Every LoraShard of this stage, in the order of its layers."""
    return [module for module in gpt.modules() if isinstance(module, LoraShard)]


def _group_by_linear(gpt: ShardedGpt, specs: Sequence[AdapterSpec]) -> dict[tuple[int, str], list[AdapterSpec]]:
    groups: dict[tuple[int, str], list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        if spec.layer in gpt.stage_layers:
            groups[spec.layer, find_linear(spec.target, gpt.model)].append(spec)
    return groups


def _build_shard(
    gpt: ShardedGpt,
    linear: LoraLinear | ExpertLinears,
    specs: Sequence[AdapterSpec],
    seed: int,
) -> LoraShard:
    topology = gpt.topology
    is_whole = isinstance(linear, LoraWholeLinear)
    # What enters experts, the shared one too, and the linears of the latents' heads is the whole sequence already.
    has_whole_input = isinstance(linear, ExpertLinears | LoraLocalLinear) and not is_whole
    kind = ExpertShard if isinstance(linear, ExpertLinears) else LoraShard
    local_out_features = linear.local_out_features if isinstance(linear, ExpertLinears) else linear.weight.shape[0]
    place = ShardPlace(
        column_parallel=linear.column_parallel,
        tp_size=topology.tp_size,
        tp_rank=topology.tp_rank,
        sequence_parallel=linear.column_parallel and topology.sequence_parallel and not has_whole_input,
        row_shard=topology.row_shard,
        is_whole=is_whole,
        row_group=None if linear.column_parallel or topology.tp_size == 1 else topology.tp_group,
        tp_ranges=find_shared_ranges(gpt.model, topology.tp_size),
    )
    shard = kind(
        specs,
        place,
        seed=seed,
        clock=gpt.clock,
        local_out_features=local_out_features,
        rows=compute_fused_rows(specs[0].target, gpt.model, specs[0].layer, topology.tp_size),
        device=topology.device,
    )
    if shard.use_dora:
        shard.start_magnitudes(linear.weight)
    return shard


def describe_factors(shard: LoraShard) -> list[TrainableParameter]:
    """A of a column linear and B of a row linear are replicated, their gradients one TP rank's summand each.

    So is a row linear's magnitude: each rank has its own partial output. All of a whole linear's are under sequence
    parallelism; without it every rank computes their whole gradients.
    """
    place, described = shard.place, []
    for spec in shard.specs:
        a, b = shard.factors(spec)
        parts = [
            ("lora_A", a, (spec.stacked_rank, spec.in_features), place.a_shard_dim),
            ("lora_B", b, (spec.out_features, spec.stacked_rank), place.b_shard_dim),
        ]
        if spec.use_dora:
            parts.append(("magnitude", shard.magnitude(spec), (spec.out_features,), place.b_shard_dim))
        shared = place.tp_ranges.get(spec.target)
        for kind, parameter, full_shape, shard_dim in parts:
            described.append(
                TrainableParameter(
                    name=f"{spec.name}.{kind}",
                    parameter=parameter,
                    full_shape=full_shape,
                    shard_dim=shard_dim,
                    tp_ranges=None if kind == "lora_A" else shared,
                    tp_partial_grad=place.has_partial_grad(shard_dim),
                    kind=kind,
                )
            )
    return described


def describe_untrained_lengths(gpt: ShardedGpt) -> list[TrainableParameter]:
    """With DoRA, the lengths of targets that have no adapter though the linear that fuses them with others has one.

    They are the base's and do not train, but PEFT's files have one vector for the whole linear.
    """
    described = []
    for shard in find_shards(gpt):
        if not shard.use_dora or shard.stacked_rows is None:
            continue
        lengths_O, adapted = shard.compute_base_lengths().cpu(), {spec.target for spec in shard.specs}
        first, tp_size = shard.specs[0], gpt.topology.tp_size
        all_rows = compute_fused_rows(first.target, gpt.model, first.layer, tp_size) or {}
        together = {one for fused in gpt.model.architecture.fused_targets if adapted & set(fused) for one in fused}
        for target, rows in all_rows.items():
            if target in together - adapted:
                described.append(
                    TrainableParameter(
                        name=f"layers.{first.layer}.{target}.magnitude",
                        parameter=nn.Parameter(lengths_O[rows], requires_grad=False),
                        full_shape=(compute_linear_shapes(gpt.model, first.layer)[target][1],),
                        shard_dim=0,
                        tp_ranges=shard.place.tp_ranges.get(target),
                        tp_partial_grad=False,
                        kind="constant",
                    )
                )
    return described


def enable_base(gpt: ShardedGpt, names: Collection[str]) -> list[TrainableParameter]:
    """Let parameters of a frozen base, by canonical name, train in fp32; those that are another stage's are its own."""
    chosen = [described for described in describe_base_parameters(gpt) if find_source(described) in names]
    local_names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    for described in chosen:
        if described.parameter.dtype != torch.float32:
            described.parameter = _keep_in_fp32(gpt, local_names[id(described.parameter)])
        described.parameter.requires_grad_(True)
    return chosen


class _CastTo(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype)


def _keep_in_fp32(gpt: ShardedGpt, local_name: str) -> nn.Parameter:
    """Make a base parameter fp32, seen by its module in its old dtype: trained like the factors, without a master."""
    module_name, _, name = local_name.rpartition(".")
    module = gpt.get_submodule(module_name)
    original = module.get_parameter(name)
    cast = _CastTo(original.dtype)
    setattr(module, name, nn.Parameter(original.detach().float()))
    parametrize.register_parametrization(module, name, cast, unsafe=True)
    return module.parametrizations[name].original
