"""The expert that every token passes: its linears' shards, and the adapters on them.

What enters is the whole sequence and what leaves this rank's summand, both already the experts' own: it communicates
nothing. Shapes: S sequence, B rows, H hidden, F features inside on this rank.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.mcore.gates import SwiGlu
from lora_dist.mcore.layers import LoraLocalLinear


class SharedExpert(nn.Module):
    """W2 (silu(gate) * up), [gate | up] = W1 x."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.model.shared_ffn_size // config.tensor_model_parallel_size
        self.linear_fc1 = LoraLocalLinear(config, 2 * size, config.hidden_size, column_parallel=True)
        self.activation = SwiGlu()
        self.linear_fc2 = LoraLocalLinear(config, config.hidden_size, size, column_parallel=False)

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        gate_up_SB2F = self.linear_fc1(hidden_SBH)
        output_SBH: torch.Tensor = self.linear_fc2(self.activation(gate_up_SB2F))
        return output_SBH
