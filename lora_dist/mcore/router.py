"""Which experts each token goes to, and how much of their outputs counts.

Shapes: T tokens, H hidden, E experts, G groups of them, C experts of a token.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.config import ModelConfig
from lora_dist.mcore.layers import allocate

_ALL_TOO_SMALL = 1e-20
"""Added to the sum that weights are divided by, so that sigmoids which are all zero stay so."""


class Router(nn.Module):
    """Whole on every TP rank, which all pick the same; its gradients are one rank's summands."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.model: ModelConfig = config.model
        num_experts = config.model.num_experts
        self.weight = nn.Parameter(allocate(num_experts, config.hidden_size, config=config))
        bias_E = nn.Parameter(allocate(num_experts, config=config)) if config.add_bias_linear else None
        self.register_parameter("bias", bias_E)
        self.choice_offsets_E: torch.Tensor | None = None
        """In fp32 whatever the model's dtype, as transformers keeps them; no parameter, since nothing trains them."""
        if config.model.architecture.sigmoid_router:
            self.choice_offsets_E = torch.zeros(num_experts, device=self.weight.device)

    def forward(self, tokens_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of each picked expert's output counts, and which ones they are: both [T, C]."""
        scores_TE = self._score(tokens_TH)
        choices_TC = self._choose(scores_TE.detach())
        weights_TC = scores_TE.gather(1, choices_TC)
        if self.model.normalize_expert_weights:
            weights_TC = weights_TC / (weights_TC.sum(-1, keepdim=True) + _ALL_TOO_SMALL)
        if self.model.expert_weight_scale != 1:
            weights_TC = weights_TC * self.model.expert_weight_scale
        return weights_TC.to(tokens_TH.dtype), choices_TC

    def _score(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        """In fp32 at least. Of sigmoids the product is too, since each stands for itself."""
        dtype = torch.promote_types(tokens_TH.dtype, torch.float32)
        if self.choice_offsets_E is None:
            return F.linear(tokens_TH, self.weight, self.bias).softmax(-1, dtype=dtype)
        return F.linear(tokens_TH.to(dtype), self.weight.to(dtype)).sigmoid()

    def _choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        if self.choice_offsets_E is not None:
            scores_TE = scores_TE + self.choice_offsets_E
        if self.model.num_expert_groups > 1:
            scores_TE = self._leave_best_groups(scores_TE)
        return scores_TE.topk(self.model.experts_per_token or 1, dim=-1).indices

    def _leave_best_groups(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """-inf for experts outside the groups whose two best ones sum to most (arXiv:2412.19437, section 2.1.2)."""
        grouped_TGE = scores_TE.unflatten(1, (self.model.num_expert_groups, -1))
        best_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
        chosen = best_TG.topk(self.model.groups_per_token, dim=-1).indices
        is_out_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, chosen, False)
        return grouped_TGE.masked_fill(is_out_TG[..., None], float("-inf")).flatten(1)
