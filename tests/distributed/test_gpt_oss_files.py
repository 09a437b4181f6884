"""gpt-oss: routing in bf16 as transformers routes, and what trains beside adapters."""

from pathlib import Path

import torch
from family_toy import build_family_model, read_family_config, write_family_checkpoint
from hf_toy import build_shard
from processes import run_distributed

from lora_dist.mcore.experts import ExpertMlp
from lora_dist.mcore.hf_weights import load_hf_checkpoint


def route(source: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, for tokens drawn: weights and choices, in bf16."""
    gpt = build_shard({}, read_family_config(source), torch.bfloat16)
    load_hf_checkpoint(gpt, source)
    return [module.router(draw_tokens()) for module in gpt.modules() if isinstance(module, ExpertMlp)]


def draw_tokens() -> torch.Tensor:
    return torch.randn(2048, 32, generator=torch.Generator().manual_seed(5)).bfloat16()


def test_tokens_go_where_transformers_sends_them(tmp_path: Path) -> None:
    """Its weights are rounded to bf16 within the softmax, ours once, at the end."""
    write_family_checkpoint("gpt_oss", tmp_path, dtype=torch.bfloat16)
    theirs = type(build_family_model("gpt_oss")).from_pretrained(tmp_path, dtype=torch.bfloat16)
    (ours,) = run_distributed(route, 1, tmp_path)
    for layer, (weights_TC, choices_TC) in zip(theirs.model.layers, ours, strict=True):
        logits_TE, expected_TC, _ = layer.mlp.router(draw_tokens())
        # Of equal logits either may be taken: what counts is that none that is left out is larger.
        picked_TC = logits_TE.gather(1, choices_TC)
        assert torch.equal(picked_TC.sort(-1).values, logits_TE.topk(2).values.sort(-1).values)
        torch.testing.assert_close(weights_TC.sort(-1).values, expected_TC.sort(-1).values, rtol=1e-2, atol=0)
