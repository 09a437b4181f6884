"""One position attends to the latents that are kept of those before it, not to keys and values made of them
(arXiv:2405.04434, section 2.1.2): what makes keys multiplies the query, what makes values the sum of latents.

Shapes: B rows, A heads of this rank, K positions kept, D features of a head's query, N those of them that positions do
not turn, R those that they do, V features of a value, L of the latent, X = L + R of what is kept of a position.
"""

import torch

from lora_dist.lora.function import read_weight
from lora_dist.lora.layer import LoraShard
from lora_dist.mcore.attention import LayerMasks, Mask
from lora_dist.mcore.indexer import Selected, unpack_bits
from lora_dist.mcore.layers import LoraLocalLinear


def attend_to_latents(
    query_BAD: torch.Tensor,
    kept_BKX: torch.Tensor,
    weight_OL: torch.Tensor,
    visible_B1K: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
) -> torch.Tensor:
    """[B, A, V], as attention to the keys and values that `weight_OL` (O = A (N + V)) makes of the latents gives.

    The heads share what they look at, so that all of a row are one product; scores are fp32 at least, as in the fused
    kernels, which take one key of so many features poorly or not at all.
    """
    num_heads, latent_size = query_BAD.shape[1], weight_OL.shape[1]
    of_heads = weight_OL.view(num_heads, -1, latent_size)
    of_keys_ANL, of_values_AVL = of_heads.split([of_heads.shape[1] - value_dim, value_dim], dim=1)
    unturned_BAN, turned_BAR = query_BAD.tensor_split([of_keys_ANL.shape[1]], dim=-1)
    query_BAL = torch.bmm(unturned_BAN.transpose(0, 1).to(weight_OL.dtype), of_keys_ANL).transpose(0, 1)
    wide = torch.promote_types(query_BAD.dtype, torch.float32)
    query_BAX, kept_BKX = torch.cat([query_BAL.to(wide), turned_BAR.to(wide)], dim=-1), kept_BKX.to(wide)
    scores_BAK = (torch.bmm(query_BAX, kept_BKX.transpose(1, 2)) * scale).masked_fill_(~visible_B1K, float("-inf"))
    context_BAL = torch.bmm(scores_BAK.softmax(-1), kept_BKX[..., :latent_size]).to(weight_OL.dtype)
    context_ABV = torch.bmm(context_BAL.transpose(0, 1), of_values_AVL.transpose(1, 2))
    return context_ABV.transpose(0, 1).to(query_BAD.dtype)


def read_whole_weight(linear: LoraLocalLinear, dtype: torch.dtype) -> torch.Tensor:
    """[O, L] of the linear with the one adapter beside it, where it has one: in fp32 at least then, so that the sum is
    not rounded as that of an adapter which is merged.
    """
    weight_OL, lora = read_weight(linear.weight, dtype), linear.lora
    if lora is None:
        return weight_OL
    assert isinstance(lora, LoraShard), "rows with adapters of their own have no one weight"
    ((spec, rows),) = lora.list_rows()
    assert rows is None, "the linear is one target"
    return lora.compute_merged(spec, weight_OL)


def find_visible(mask: Mask | LayerMasks | Selected, num_kept: int) -> torch.Tensor:
    """bool [B, 1, K]: what the one position that runs attends to, by what an indexer has picked where one has."""
    if isinstance(mask, Selected):
        (bits_B1W,) = mask.selection
        if bits_B1W is not None:
            return unpack_bits(bits_B1W, num_kept)
        mask = mask.mask
    full = mask.full if isinstance(mask, LayerMasks) else mask
    assert isinstance(full, torch.Tensor), "the model runs step by step"
    assert full.dtype == torch.bool, "not a bias"
    return full[:, 0]
