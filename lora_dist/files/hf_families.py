"""The families whose Hugging Face checkpoints are read and written."""

from lora_dist.files.hf_deepseek_v3 import DEEPSEEK_V3_FAMILY
from lora_dist.files.hf_deepseek_v32 import SPARSE_FAMILIES
from lora_dist.files.hf_experts import EXPERT_FAMILIES
from lora_dist.files.hf_gemma3 import GEMMA3_FAMILY
from lora_dist.files.hf_glm4_moe import GLM4_MOE_FAMILY
from lora_dist.files.hf_gpt2 import GPT2_FAMILY
from lora_dist.files.hf_gpt_oss import GPT_OSS_FAMILY
from lora_dist.files.hf_granite import GRANITE_FAMILY
from lora_dist.files.hf_layout import HfFamily
from lora_dist.files.hf_llama import LLAMA_FAMILIES
from lora_dist.files.hf_minimax_m2 import MINIMAX_M2_FAMILY
from lora_dist.files.hf_ministral3 import MINISTRAL3_FAMILY
from lora_dist.files.hf_neox import NEOX_FAMILY
from lora_dist.files.hf_olmo import OLMO_FAMILIES
from lora_dist.files.hf_opt import OPT_FAMILY
from lora_dist.files.hf_phi3 import PHI3_FAMILY
from lora_dist.files.hf_qwen3_5 import QWEN3_5_FAMILIES
from lora_dist.files.hf_qwen3_next import QWEN3_NEXT_FAMILY
from lora_dist.files.hf_seed_oss import SEED_OSS_FAMILY
from lora_dist.files.hf_smollm3 import SMOLLM3_FAMILY

HF_FAMILIES: dict[str, HfFamily] = {
    "gpt2": GPT2_FAMILY,
    **LLAMA_FAMILIES,
    **EXPERT_FAMILIES,
    "qwen3_next": QWEN3_NEXT_FAMILY,
    **QWEN3_5_FAMILIES,
    "glm4_moe": GLM4_MOE_FAMILY,
    "granite": GRANITE_FAMILY,
    "seed_oss": SEED_OSS_FAMILY,
    "ministral3": MINISTRAL3_FAMILY,
    "smollm3": SMOLLM3_FAMILY,
    **OLMO_FAMILIES,
    "minimax_m2": MINIMAX_M2_FAMILY,
    "deepseek_v3": DEEPSEEK_V3_FAMILY,
    **SPARSE_FAMILIES,
    "gpt_oss": GPT_OSS_FAMILY,
    "phi3": PHI3_FAMILY,
    "gemma3_text": GEMMA3_FAMILY,
    "opt": OPT_FAMILY,
    "gpt_neox": NEOX_FAMILY,
}
"""By ModelConfig's family."""
MODEL_TYPES = {**{family: family for family in HF_FAMILIES}, "kimi_k2": "deepseek_v3", "qwen3_vl_moe_text": "qwen3_moe"}
"""config.json's model_type -> ModelConfig's family."""
