"""The expert that every token passes: its linears' shards, and the adapters on them.

What enters is the whole sequence and what leaves this rank's summand, both already the experts' own: it communicates
nothing. Shapes: S sequence, B rows, T = S B tokens, H hidden, F features inside on this rank.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.mcore.gates import SwiGlu, gate_weighted
from lora_dist.mcore.layers import LoraLocalLinear, allocate


class SharedExpert(nn.Module):
    """W2 (silu(gate) * up), [gate | up] = W1 x; in some families times the sigmoid of one more product with x."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.model.shared_ffn_size // config.tensor_model_parallel_size
        self.linear_fc1 = LoraLocalLinear(config, 2 * size, config.hidden_size, column_parallel=True)
        self.activation = SwiGlu()
        self.linear_fc2 = LoraLocalLinear(config, config.hidden_size, size, column_parallel=False)
        self.gate = OutputGate(config) if config.model.architecture.gated_shared_expert else None

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        gate_up_SB2F = self.linear_fc1(hidden_SBH)
        if self.gate is None:
            inner_SBF = self.activation(gate_up_SB2F)
        else:  # inside, where there are fewer features to keep than in the output
            weights_T = self.gate(hidden_SBH).flatten()
            inner_SBF = gate_weighted(gate_up_SB2F.flatten(0, 1), weights_T).view(*hidden_SBH.shape[:2], -1)
        output_SBH: torch.Tensor = self.linear_fc2(inner_SBF)
        return output_SBH


class OutputGate(nn.Module):
    """How much of the expert's output counts of each token; whole on every TP rank, its gradient one rank's summand."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(allocate(1, config.hidden_size, config=config))

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_SBH, self.weight).sigmoid()
