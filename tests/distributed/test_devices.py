"""No operation of a run mixes tensors of the device and of the host, and no collective gets one of the host.

A CPU would not say so, and a GPU would stop the run.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from demo_runs import ASSETS, DEMO, call
from device_labels import LABELLED, label_devices
from family_toy import write_family_checkpoint
from fp8_files import write_fp8_checkpoint
from processes import run_distributed
from test_encoder_runs import describe_command
from tiers import exhaustive, few_of

TINY = [
    *("train", "model=tiny", "data=fake", "data.seq_len=16", "data.num_fake_examples=8", "track=none"),
    *("loop.num_steps=1", "loop.micro_batch_size=2", "loop.global_batch_size=4", "loop.eval_every=1"),
    *("loop.keep_best=true", "lora.target_modules=[all]"),
]
ADAPTED = {
    "lora": ["topology=tp2_sp", "lora.dropout=0.1"],
    "biases": ["topology=tp2", "lora.bias=all", "lora.modules_to_save=[wte]", "zero.stage=2"],
    "stages": ["topology=tp2_pp2", "loop.recompute=full", "model.hidden_dropout=0.1", "model.attention_dropout=0.1"],
    "stage 0": ["topology=dp2", "zero.stage=0", "optim.label_smoothing=0.1"],
    "stage 3": ["topology=dp2", "zero.stage=3"],
    "offload": ["topology=dp2", "zero.offload_optimizer=true"],
    "fp16": ["topology=dp2", "dtype=fp16"],
    "nf4": ["topology=single", "model.base_format=nf4_double"],
    "fp8": ["topology=dp2", "model.base_format=fp8"],
    "llama": ["topology=tp2", "model.family=llama"],
    "shared heads": ["topology=tp4", "model.family=llama", "model.num_kv_heads=2"],
    "experts": [
        *("topology=tp2_sp", "model.family=mixtral", "model.num_experts=4", "model.experts_per_token=2"),
        *("model.tied_output=false", "lora.target_modules=[all,gate_proj,up_proj,down_proj]"),
    ],
    "latent": [
        *("topology=tp2_sp", "model.family=deepseek_v3", "model.num_experts=4", "model.experts_per_token=2"),
        *("model.query_latent_size=16", "model.kv_latent_size=8", "model.rope_head_size=4", "model.value_head_size=8"),
        *("model.shared_ffn_size=16", "model.tied_output=false", "lora.target_modules=[all]"),
    ],
    "long rows": [
        *("topology=tp2_sp", "model.family=glm_moe_dsa", "model.num_experts=4", "model.experts_per_token=2"),
        *("model.query_latent_size=16", "model.kv_latent_size=8", "model.rope_head_size=4", "model.value_head_size=8"),
        *("model.rope_interleaved=true", "model.attended_positions=6", "model.indexer_heads=4"),
        *("model.indexer_head_size=8", "model.layers_without_indexer=[1]", "model.tied_output=false"),
        *("lora.target_modules=[all]", "packed_attention=mask"),
    ],
    "whole norms": [
        *("topology=tp2_sp", "model.family=minimax_m2", "model.num_experts=4", "model.experts_per_token=2"),
        *("model.rotary_fraction=0.5", "model.tied_output=false", "lora.target_modules=[all,gate_proj]"),
    ],
    "delta": [
        *("topology=tp2_sp", "model.family=qwen3_next", "model.num_experts=4", "model.experts_per_token=2"),
        *("model.shared_ffn_size=16", "model.full_attention_layers=[1]", "model.delta_key_heads=2"),
        *("model.delta_value_heads=4", "model.delta_key_size=4", "model.delta_value_size=6"),
        *("model.delta_kernel_size=4", "model.tied_output=false", "packed_attention=mask"),
    ],
    "sinks": [
        *("topology=tp2_sp", "model.family=gpt_oss", "model.num_experts=4", "model.experts_per_token=2"),
        *("model.swiglu_alpha=1.7", "model.swiglu_limit=7", "model.sliding_window=5", "model.tied_output=false"),
        "lora.target_modules=[all,gate_proj,down_proj]",
    ],
    "olmo2": ["topology=tp2_sp", "model.family=olmo2", "loop.recompute=selective"],
    "granite": [
        *("topology=tp2_sp", "model.family=granite", "model.embedding_multiplier=12", "model.residual_multiplier=0.2"),
        "model.logits_divisor=8",
    ],
    "ministral3": [
        *("topology=tp2", "model.family=ministral3", "model.query_growth=0.1"),
        "model.rope_scaling={factor:2,beta_fast:32,beta_slow:1,attention_factor:1,original_max_position_embeddings:8}",
    ],
    "smollm3": ["topology=pp2", "model.family=smollm3", "model.unturned_layers=[1]"],
    "gpt_neox": ["topology=pp2", "model.family=gpt_neox", "loop.recompute=selective"],
    "opt": ["topology=tp2_sp", "model.family=opt"],
    "dora": ["topology=tp2", "method=dora"],
    "pissa": ["topology=tp2", "method=pissa"],
    "adapter_h": ["topology=tp2_sp", "method=adapter_h"],
    "prefixes": ["topology=pp2", "method=lora_prefix_layer"],
    "bitfit": ["topology=tp2_sp", "method=bitfit"],
    "full": ["topology=tp2_dp2", "method=full", "zero.stage=2"],
    "full bf16": ["topology=dp2", "method=full", "dtype=bf16"],
    "full fp16": ["topology=pp2", "method=full", "dtype=fp16"],
}
RESUMED = {"lora", "stages", "stage 3", "offload", "fp16", "full", "full fp16"}
"""One of every way in which state is kept."""


def call_labelled(*commands: list[str]) -> list[int]:
    """Verbs, one after the other, on what counts as a GPU."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("lora_dist.") and hasattr(module, "choose_device"):
            module.choose_device = lambda *_, **__: LABELLED
    with label_devices():
        return [call(words) for words in commands]


def count_processes(words: list[str]) -> int:
    topology = next(word for word in words if word.startswith("topology=")).removeprefix("topology=")
    sizes = [int(part[2:]) for part in topology.split("_") if part[2:].isdigit()]
    return int(torch.tensor(sizes or [1]).prod())


@pytest.mark.parametrize("name", few_of(ADAPTED, "stages", "sinks"))
def test_a_run(name: str, tmp_path: Path) -> None:
    words = [*TINY, *ADAPTED[name], f"run_dir={tmp_path / 'run'}"]
    commands = [words, [*words, "loop.num_steps=2", "resume=must"]] if name in RESUMED else [words]
    for codes in run_distributed(call_labelled, count_processes(words), *commands):
        assert codes == [0] * len(commands)


@pytest.mark.exhaustive
def test_a_base_published_in_fp8(tmp_path: Path) -> None:
    write_family_checkpoint("qwen3", tmp_path / "source")
    write_fp8_checkpoint(tmp_path / "source", tmp_path / "fp8", tmp_path / "plain", block_size=(5, 7))
    words = [*TINY, "model=hf", f"model.checkpoint={tmp_path / 'fp8'}", "topology=tp2", f"run_dir={tmp_path / 'run'}"]
    assert run_distributed(call_labelled, 2, words) == [[0], [0]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("topology", ["single", "tp2"])
def test_what_is_made_of_adapters(topology: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    adapter, references, prompts = run / "adapter", tmp_path / "refs.txt", tmp_path / "prompts.jsonl"
    references.write_text("\n".join((ASSETS / "e2e_sample" / "test.txt").read_text().splitlines()[:4]))
    prompts.write_text("\n".join(json.dumps({"context": "name : A", "adapter": name}) for name in (str(adapter), None)))
    adapters, short = (
        [f"adapter={adapter}", f"topology={topology}"],
        ["generate.max_new_tokens=3", "generate.num_beams=2"],
    )
    commands = [
        ["train", *DEMO, "loop.num_steps=1", "data.max_valid_examples=4", f"topology={topology}", f"run_dir={run}"],
        ["generate", *adapters, *short, "generate.prompt=name : A"],
        ["generate", *adapters, *short, "generate.prompt=name : A", "generate.merge=true"],
        ["generate", f"adapters=[{adapter}]", f"topology={topology}", *short, f"generate.input={prompts}"],
        ["evaluate", *adapters, *short, "task=e2e", f"task.references={references}", f"texts={tmp_path / 'texts'}"],
        ["merge", *adapters, f"output={tmp_path / 'merged'}"],
        ["export", *adapters, f"output={tmp_path / 'exported'}", "format=hf_merged"],
    ]
    for codes in run_distributed(call_labelled, count_processes([f"topology={topology}"]), *commands):
        assert codes == [0] * len(commands)


@pytest.mark.parametrize(
    "words", [*exhaustive(["encoder.method=lora"]), ["encoder.method=bitfit", "zero.stage=2"]], ids=str
)
def test_an_encoder(words: list[str], tmp_path: Path) -> None:
    command = describe_command(
        tmp_path, "run", f"train={tmp_path / 'train.tsv'}", "loop.num_epochs=1", "topology=dp2", *words
    )
    assert run_distributed(call_labelled, 2, command) == [[0], [0]]


def mix(what: str) -> None:
    with label_devices():
        here, there = torch.ones(2, device=LABELLED), torch.ones(2)
        if what == "operation":
            here += there
        elif what == "view":
            torch.dot(here.view(2).detach(), there[:2])
        else:
            dist.all_reduce(there)


@pytest.mark.parametrize("what", ["operation", "view", "collective"])
def test_what_a_gpu_would_refuse_is_seen(what: str) -> None:
    with pytest.raises(AssertionError, match="of the host"):
        run_distributed(mix, 1, what)
