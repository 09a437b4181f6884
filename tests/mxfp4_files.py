"""A gpt-oss checkpoint as published, its experts in MXFP4, and the same values in bf16, in plain torch."""

import json
import shutil
from pathlib import Path

import torch
from family_models import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def build_wide_gpt_oss() -> GptOssForCausalLM:
    """With features that fill blocks of 32, on one TP rank, while on four a rank's end within one."""
    config = FAMILIES["gpt_oss"]().config
    config.intermediate_size, config.hidden_size, config.num_hidden_layers, config.layer_types = 64, 64, 2, None
    torch.manual_seed(0)
    config.layer_types, config.initializer_range = ["sliding_attention", "full_attention"], 0.3
    model = GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_published(target: Path, plain: Path) -> dict[str, torch.Tensor]:
    """In MXFP4 and in bf16; gives back the values."""
    build_wide_gpt_oss().bfloat16().save_pretrained(plain)
    values, stored = load_file(plain / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in values.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        num_experts, num_in, num_out = tensor.shape
        codes = torch.randint(0, 16, (num_experts, num_out, num_in // 32, 32), generator=generator)
        exponents = torch.randint(-6, -2, (num_experts, num_out, num_in // 32), generator=generator)
        stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        own = torch.tensor(VALUES)[codes] * 2.0 ** exponents[..., None]
        values[name] = own.flatten(2).transpose(1, 2).bfloat16().contiguous()
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    shutil.copytree(plain, target)
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    edit_quantization(target, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return values


def edit_quantization(directory: Path, settings: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
