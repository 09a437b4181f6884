"""The peers: Hugging Face transformers with PEFT, as it comes and tuned, and transformers trained whole.

Shapes: B rows, S positions, N target tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_dist.batch import Batch
from lora_dist.config import ModelConfig, RunConfig
from lora_dist.files.modules import FAMILY_NAMES
from lora_dist.files.peft_experts import TARGETS
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs, is_mlp_beside_experts

_GPT2_MODULES = {
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "o_proj": "attn.c_proj",
    "up_proj": "mlp.c_fc",
    "down_proj": "mlp.c_proj",
}


class PeerContender:
    """A plain training loop around transformers' model of the family: backward, clip, AdamW.

    Tuned means what a careful user sets without writing kernels: SDPA, adapters in the model's dtype, the output layer
    on target tokens only, and on GPT-2 the fused GELU of the same function. GPT-2's adapters on q, k or v are one
    adapter on the fused c_attn, as PEFT has it there: as many parameters as q and v apart at the same rank.
    """

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype, *, lora: bool, tuned: bool) -> None:
        assert config.model.checkpoint is not None
        options: dict[str, Any] = {"attn_implementation": "sdpa"} if tuned else {}
        model: Any = AutoModelForCausalLM.from_pretrained(config.model.checkpoint, dtype=dtype, **options)
        if tuned and config.model.family == "gpt2":
            for block in model.transformer.h:
                block.mlp.act = torch.nn.GELU(approximate="tanh")
        if config.loop.recompute == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model = get_peft_model(model, build_peft_config(config), autocast_adapter_dtype=not tuned)
        self._model: torch.nn.Module = model.to(device).train()
        self._causal: Any = model.get_base_model() if lora else model
        self._device, self._tuned, self._max_norm = device, tuned, config.optim.clip_grad_norm
        self._label_smoothing = config.optim.label_smoothing
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        optim = config.optim
        self._adam = torch.optim.AdamW(
            self._trained,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,  # as lora_dist's
        )

    def run_as_written(self) -> None:
        """As it does anyhow."""

    def step(self, batches: Sequence[Batch], step: int) -> float:
        total = torch.zeros((), device=self._device)
        for batch in batches:
            moved = batch.to(self._device)
            loss = self._compute_loss_sum(moved) / moved.num_loss_tokens
            loss.backward()
            total += loss.detach()
        if self._max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return total.item()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._model.parameters()

    def _compute_loss_sum(self, batch: Batch) -> torch.Tensor:
        labels_BS = batch.labels_BS.masked_fill(~batch.loss_mask_BS, -100)
        inputs = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS, "use_cache": False}
        if not self._tuned:
            logits_NV = self._model(**inputs).logits.float().flatten(0, 1)
            return self._cross_entropy(logits_NV, labels_BS.flatten())
        hidden_NH = self._causal.base_model(**inputs).last_hidden_state[batch.loss_mask_BS]
        return self._cross_entropy(self._causal.lm_head(hidden_NH).float(), batch.labels_BS[batch.loss_mask_BS])

    def _cross_entropy(self, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=self._label_smoothing)


def build_peft_config(config: RunConfig) -> LoraConfig:
    """ValueError where PEFT has no adapter of the same size.

    On experts PEFT has one adapter on gate and up together, as on a fused linear: one A where lora_dist has two.
    """
    modules = _list_modules(config.model)
    specs = build_adapter_specs(config.lora, config.model)
    if len({(spec.lora_rank, spec.alpha) for spec in specs}) > 1 or config.lora.layers is not None:
        raise ValueError(
            "bench compares with PEFT at one rank, one alpha and all layers; drop lora.*_pattern and lora.layers"
        )
    beside = {modules[spec.target] for spec in specs if is_mlp_beside_experts(spec, config.model)}
    parameters = [*_list_of_experts(specs), *sorted(f"{module}.weight" for module in beside)]
    if parameters and config.lora.dropout > 0:
        raise ValueError(
            f"bench: lora.dropout={config.lora.dropout}, but PEFT has to adapt {parameters[0]} as a parameter, which"
            " takes no dropout; set 0"
        )
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=sorted({modules[spec.target] for spec in specs if spec.num_experts is None} - beside),
        target_parameters=parameters or None,
        fan_in_fan_out=config.model.family == "gpt2",
    )


def _list_of_experts(specs: Sequence[AdapterSpec]) -> list[str]:
    """Those of transformers' experts that have adapters."""
    adapted = {spec.target for spec in specs if spec.num_experts is not None}
    return [f"mlp.experts.{name}" for name, targets in TARGETS.items() if adapted & set(targets)]


def _list_modules(model: ModelConfig) -> dict[str, str]:
    """Target -> name of its linear within a layer."""
    if model.family == "gpt2":
        return _GPT2_MODULES
    return {target: name.partition("{layer}.")[2] for target, name in FAMILY_NAMES[model.family].items()}
