"""Runs with compile=true beside the same runs without: losses, adapters, and what is measured of them."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_distributed
from safetensors.torch import load_file
from test_baselines import RUN, read_losses, run_training

LLAMA = ["model.family=llama", "model.num_kv_heads=2", "model.tied_output=false", "lora.target_modules=[all]"]
CASES = {
    "gpt2": ["topology=pp2", "loop.recompute=full", "optim.label_smoothing=0.1"],
    "llama": [*LLAMA, "topology=tp2_sp", "lora.dropout=0.2"],
    "llama-fp8": [*LLAMA, "topology=single", "model.base_format=fp8"],
    "qwen3_5": [
        *("model.family=qwen3_5_text", "model.full_attention_layers=[1]", "model.delta_key_heads=2"),
        *("model.delta_value_heads=4", "model.delta_key_size=8", "model.delta_value_size=8"),
        *("model.delta_kernel_size=4", "lora.target_modules=[all]", "topology=tp2"),
    ],
    "qwen3-full": ["model.family=qwen3", "topology=single", "method=full"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_run_learns_the_same(name: str, tmp_path: Path) -> None:
    for directory, compiles in (("written", "false"), ("compiled", "true")):
        words = [*RUN, *CASES[name], f"compile={compiles}", f"run_dir={tmp_path / directory}"]
        run_distributed(run_training, 1 if "topology=single" in words else 2, words)
    written, compiled = (tmp_path / directory for directory in ("written", "compiled"))
    assert read_losses(compiled) == pytest.approx(read_losses(written), rel=1e-5)
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (written, compiled)]
    assert summaries[0]["step_ledger"] == summaries[1]["step_ledger"]
    (file,) = [path.relative_to(written) for path in written.glob("*/*model.safetensors")]
    expected = load_file(written / file)
    for key, tensor in load_file(compiled / file).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=0)
