"""What a method lets train on an encoder: LoRA beside its linears, its biases, or everything; the head always.

Shapes: B rows, S positions, H input features, O output features.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from lora_dist.classify_config import ClassifyConfig
from lora_dist.encoders.model import Encoder
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.function import NO_COMMUNICATION
from lora_dist.lora.layer import LoraShard, ShardPlace, compute_qkv_rows
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.parameters import TrainableParameter

FACTORS = ("lora_A", "lora_B")
_WHOLE = ShardPlace(column_parallel=True, tp_size=1, tp_rank=0)


class AdaptedLinear(nn.Module):
    """A frozen nn.Linear with its adapters, by the function that Megatron's shards use."""

    def __init__(self, base: nn.Linear, lora: LoraShard) -> None:
        super().__init__()
        self.weight, self.bias, self.lora = base.weight, base.bias, lora

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """[B, S, O]; also of [S, H], as DeBERTa projects its relative positions."""
        is_matrix = x_BSH.ndim == 2
        x_SBH = x_BSH[:, None] if is_matrix else x_BSH.transpose(0, 1)
        y_SBO: torch.Tensor = self.lora(x_SBH.contiguous(), self.weight, self.bias, NO_COMMUNICATION)
        return y_SBO[:, 0] if is_matrix else y_SBO.transpose(0, 1)


def apply_encoder_method(encoder: Encoder, config: ClassifyConfig) -> list[TrainableParameter]:
    """What trains. ValueError where a LoRA target matches nothing."""
    if config.method == "full":
        encoder.model.requires_grad_(True)
    elif config.method == "bitfit":
        for name, parameter in encoder.model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("bias", "q_bias", "v_bias"))
    else:
        put_adapters(encoder, build_adapter_specs(config.lora, encoder.shape), seed=config.loop.seed)
    for module in encoder.family.head:
        encoder.model.get_submodule(module).requires_grad_(True)
    return describe_trained(encoder)


def put_adapters(encoder: Encoder, specs: Sequence[AdapterSpec], *, seed: int) -> None:
    """In the place of the linears, one module each; q, k and v of a fused projection share one."""
    groups: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        groups[encoder.family.name_linear(spec.layer, spec.target)].append(spec)
    for name, group in groups.items():
        parent, _, own = name.rpartition(".")
        base = encoder.model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        lora = LoraShard(
            group,
            _WHOLE,
            seed=seed,
            clock=DropoutClock(),
            local_out_features=base.out_features,
            rows=_find_rows(encoder, base),
            device=base.weight.device,
        )
        setattr(encoder.model.get_submodule(parent), own, AdaptedLinear(base, lora))


def _find_rows(encoder: Encoder, base: nn.Linear) -> dict[str, torch.Tensor] | None:
    """DeBERTa's fused projection has its rows head by head: the head's q, its k, its v."""
    shape = encoder.shape
    if base.out_features != 3 * shape.hidden_size or encoder.family.targets["q_proj"] != "attention.self.in_proj":
        return None
    return compute_qkv_rows(shape.num_heads, 1, shape.head_dim)


def describe_trained(encoder: Encoder) -> list[TrainableParameter]:
    """Factors under canonical names, everything else under the model's own."""
    factors = {
        id(factor): (f"{spec.name}.{kind}", kind)
        for module in encoder.model.modules()
        if isinstance(module, LoraShard)
        for spec in module.specs
        for kind, factor in zip(FACTORS, module.factors(spec), strict=True)
    }
    described = []
    for local_name, parameter in encoder.model.named_parameters():
        if parameter.requires_grad:
            kind = "bias" if local_name.endswith("bias") else "base"
            name, kind = factors.get(id(parameter), (local_name, kind))
            described.append(
                TrainableParameter(
                    name=name,
                    parameter=parameter,
                    full_shape=tuple(parameter.shape),
                    shard_dim=None,
                    tp_partial_grad=False,
                    kind=kind,
                )
            )
    return described
