"""Adapters on experts: PEFT's files both ways, beside the weights and in them, what has no place for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapter_files import read_in, write_with_peft
from demo_runs import call
from family_toy import build_family_model, compute_family_logits, read_family_config, write_family_checkpoint
from generation_judge import GREEDY, draw_prompts, generate_with_transformers
from hf_toy import VOCAB_SIZE, build_shard, compute_logits, count_processes, draw_adapter_values, draw_tokens
from processes import run_distributed
from safetensors.torch import load_file, save_file
from tiers import few_of
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.store import Adapter, open_adapter, write_adapter_directory
from lora_dist.config import LoraConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.live import LiveMerge, attach_adapters, attach_alone, load_shards

FAMILIES = ("mixtral", "qwen3_moe", "qwen3_next", "glm4_moe", "minimax_m2", "gpt_oss")
PARAMETERS = (
    ["mlp.experts.gate_up_proj"],
    ["experts.down_proj"],
    ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
)


def write_peft_adapter(family: str, directory: Path, parameters: list[str]) -> None:
    """One A for gate and up, no zero in B, another rank in one layer; q_proj's beside them."""
    write_with_peft(
        build_family_model(family),
        directory,
        **{"target_modules": ["q_proj"], "target_parameters": parameters, "fan_in_fan_out": False, "r": 2},
        **{"lora_alpha": 3, "rank_pattern": {rf"model\.layers\.1\.mlp\.{parameters[0].rpartition('mlp.')[2]}": 4}},
    )


def load_with_peft(base: Path, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", PARAMETERS, ids="-".join)
def test_what_peft_wrote_comes_in_and_goes_out_as_it_was(family: str, parameters: list[str], tmp_path: Path) -> None:
    model = write_family_checkpoint(family, tmp_path / "base")
    write_peft_adapter(family, tmp_path / "source", parameters)
    stored = read_in(tmp_path / "source", tmp_path / "stored", model)
    assert {spec.lora_rank for spec in stored.specs if spec.num_experts is not None} == {2, 4}
    export_adapter(stored, tmp_path / "out", "peft")
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("source", "stored", "out")]
    assert raw[0] == raw[1] == raw[2]
    logits = [load_with_peft(tmp_path / "base", tmp_path / name)(draw_tokens()).logits for name in ("source", "out")]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("name", "shared", "beside"),
    [("glm4_moe", "shared_experts", "0.mlp.down_proj.weight"), ("qwen3_next", "shared_expert", "linear_attn.out_proj")],
)
def test_peft_adapts_a_shared_experts_linears_as_parameters(
    name: str, shared: str, beside: str, tmp_path: Path
) -> None:
    """PEFT would take one named in target_modules for the experts' own."""
    model, source = write_family_checkpoint(name, tmp_path / "base"), tmp_path / "source"
    names = [f"{shared}.gate_proj.weight", "mlp.experts.gate_up_proj"]
    modules, parameters = (["q_proj"], [*names, beside]) if beside.endswith("weight") else (["q_proj", beside], names)
    write_with_peft(
        build_family_model(name),
        source,
        **{"target_modules": modules, "target_parameters": parameters, "fan_in_fan_out": False, "r": 2},
        **{"lora_alpha": 3, "rank_pattern": {rf".*\.{shared}\.gate_proj\.weight": 4}},
    )
    stored = read_in(source, tmp_path / "stored", model)
    found = {(spec.target, spec.lora_rank, spec.num_experts) for spec in stored.specs}
    other = beside.removesuffix(".weight").rpartition(".")[2]
    assert {("q_proj", 2, None), ("shared_gate_proj", 4, None), (other, 2, None)} <= found
    assert ("up_proj", 2, model.num_experts) in found
    export_adapter(stored, tmp_path / "out", "peft")
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("source", "stored", "out")]
    assert raw[0] == raw[1] == raw[2]
    logits = [load_with_peft(tmp_path / "base", tmp_path / name)(draw_tokens()).logits for name in ("source", "out")]
    assert torch.equal(*logits)
    for format in ("peft_split", "loralib"):
        with pytest.raises(ValueError, match=rf"format={format} has no place for adapters on (MLPs beside )?experts"):
            export_adapter(stored, tmp_path / format, format)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_parameter_may_be_named_twice(reverse: bool, tmp_path: Path) -> None:
    """PEFT does so itself: it adds what target_modules meant before transformers 5 to what target_parameters names."""
    model, source = write_family_checkpoint("mixtral", tmp_path / "base"), tmp_path / "source"
    write_peft_adapter("mixtral", source, PARAMETERS[-1])
    names = ["down_proj", "model.layers.0.mlp.experts.down_proj", "gate_up_proj", *PARAMETERS[-1]]
    edit_config(source, target_parameters=names[::-1] if reverse else names)
    stored = read_in(source, tmp_path / "stored", model)
    assert len(stored.specs) == 4 * model.num_layers


def test_the_router_that_all_linear_adapts_can_be_left_out(tmp_path: Path) -> None:
    model, source = write_family_checkpoint("qwen3_moe", tmp_path / "base"), tmp_path / "source"
    write_with_peft(build_family_model("qwen3_moe"), source, target_modules="all-linear", fan_in_fan_out=False, r=2)
    assert "gate.weight" in json.loads((source / "adapter_config.json").read_text())["target_parameters"]
    with pytest.raises(ValueError, match=r"mlp.gate.lora_A.weight adapts the router, which takes no adapter here; tr"):
        read_in(source, tmp_path / "stored", model)
    stored = read_in(source, tmp_path / "stored", model, drop=[r".*\.mlp\.gate\..*"])
    assert len(stored.specs) == 7 * model.num_layers


def compute_texts(options: dict, base: Path, adapter: Path, merge: bool) -> list[list[int]]:
    model = read_family_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    gpt.requires_grad_(False)
    stored = open_adapter(adapter, model=model, base_fingerprint="base")
    loaded = load_shards(gpt, "task", stored.specs, stored.read().values)
    LiveMerge(gpt, keep_base=False).merge(loaded) if merge else attach_alone(gpt, loaded)
    rows = generate_rows(gpt, draw_prompts(), GREEDY, end_tokens=[0])
    dist.barrier()
    return rows


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("family", few_of(FAMILIES, "mixtral", "gpt_oss"))
def test_texts_are_those_of_peft(family: str, merge: bool, tmp_path: Path) -> None:
    """Of what PEFT trained, with one A for gate and up."""
    base, source, stored = (tmp_path / name for name in ("base", "source", "stored"))
    model = write_family_checkpoint(family, base)
    write_peft_adapter(family, source, PARAMETERS[-1])
    read_in(source, stored, model)
    expected = generate_with_transformers(load_with_peft(base, source), draw_prompts(), GREEDY, [0])
    assert expected != generate_with_transformers(build_family_model(family), draw_prompts(), GREEDY, [0])
    options = {"tp_size": 2, "pp_size": 2}
    for rows in run_distributed(compute_texts, count_processes(options), options, base, stored, merge):
        assert rows == expected


@torch.no_grad()
def compute_logits_beside(base: Path, adapter: Path, base_format: str) -> torch.Tensor:
    model = replace(read_family_config(base), base_format=base_format)
    gpt = build_shard({}, model)
    load_hf_checkpoint(gpt, base)
    stored = open_adapter(adapter, model=model, base_fingerprint="base")
    attach_alone(gpt, load_shards(gpt, "task", stored.specs, stored.read().values))
    return compute_logits(gpt)


@pytest.mark.parametrize("base_format", ["native", "nf4", "fp8", "mxfp4"])
def test_the_merged_model_is_the_one_beside_the_base(base_format: str, tmp_path: Path) -> None:
    """The base as its format holds it, where it is quantised: what `merge` writes and what runs beside it."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    build_wide_mixtral().save_pretrained(base)
    model = read_family_config(base)
    specs = build_adapter_specs(LoraConfig(rank=2, target_modules=["v_proj", "gate_proj", "down_proj"]), model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(adapter, content, model, {}, base_fingerprint=compute_base_fingerprint(model, 0))
    words = ["merge", "model=hf", f"model.checkpoint={base}", f"model.base_format={base_format}"]
    words += [f"adapter={adapter}", f"output={merged}", "topology=tp2"]
    assert run_distributed(call, 2, words) == [0, 0]
    write_adapter_directory(adapter, content, model, {}, base_fingerprint="base")
    (beside,) = run_distributed(compute_logits_beside, 1, base, adapter, base_format)
    assert (compute_family_logits(merged, draw_tokens()) - beside).abs().max() < 1e-5 * beside.abs().max()
    assert (compute_family_logits(base, draw_tokens()) - beside).abs().max() > 1e-2 * beside.abs().max()


def build_wide_mixtral() -> PreTrainedModel:
    """A TP rank's features fill the formats' blocks."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=3, initializer_range=0.1))


def cycle(base: Path) -> None:
    """Two tasks in turn, then the base: each time every bit as before."""
    model = read_family_config(base)
    gpt = build_shard({"tp_size": 2}, model, torch.bfloat16)
    load_hf_checkpoint(gpt, base)
    gpt.requires_grad_(False)
    loaded = []
    for targets in (["up_proj", "q_proj"], ["down_proj", "up_proj"]):
        specs = build_adapter_specs(LoraConfig(rank=2, target_modules=targets), model)
        loaded.append(load_shards(gpt, "+".join(targets), specs, draw_adapter_values(specs, model, "none")))
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    live, seen = LiveMerge(gpt), []
    for adapter in (*loaded, *loaded):
        live.merge(adapter)
        seen.append({name: parameter.clone() for name, parameter in gpt.named_parameters()})
    live.unmerge()
    for name, parameter in gpt.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert torch.equal(seen[0][name], seen[2][name])
        assert torch.equal(seen[1][name], seen[3][name])
        in_first = "linear_qkv" in name or ".mlp.linear_fc1." in name
        assert torch.equal(seen[0][name], before[name]) != in_first
        assert torch.equal(seen[1][name], before[name]) != (".mlp.linear_" in name)
    with pytest.raises(ValueError, match=r"up_proj\+q_proj has adapters on experts, which the rows of a batch share"):
        attach_adapters(gpt, loaded)
    dist.barrier()


def test_switching_leaves_no_trace(tmp_path: Path) -> None:
    write_family_checkpoint("mixtral", tmp_path)
    run_distributed(cycle, 2, tmp_path)


@pytest.mark.parametrize("format", ["peft_split", "loralib", "bridge"])
def test_formats_without_a_place_for_them(format: str, tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_moe", tmp_path / "base")
    write_peft_adapter("qwen3_moe", tmp_path / "source", PARAMETERS[0])
    stored = read_in(tmp_path / "source", tmp_path / "stored", model)
    with pytest.raises(ValueError, match=rf"format={format} has no place for adapters on experts \(layers.0.gate_proj"):
        export_adapter(stored, tmp_path / "out", format)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown", r"target_parameters: base has no mlp.experts.w1 to adapt"),
        ("rank", r"experts.lora_A.weight has shape \(8, 48\); model.layers.0.mlp.experts.down_proj .* \(12, 48\) at"),
        ("missing", r"model.layers.1.mlp.experts.lora_B.weight has shape none; model.layers.1.mlp.experts.down_proj"),
        ("kind", r"adapter_config.json: target_parameters=5 is no list of names"),
        ("name", r"adapter_config.json: target_parameters=\[\['a'\]\] is no list of names"),
        ("pattern", r"adapter_config.json: rank_pattern=\[1\] is no JSON object"),
        ("number", r"adapter_config.json: alpha_pattern.down_proj=nan is not a number"),
        ("unnamed", r"mlp.experts.lora_A.weight has shape \(8, 48\), adapter_config.json says rank 2"),
    ],
)
def test_what_does_not_fit_is_named(change: str, message: str, tmp_path: Path) -> None:
    model, source = write_family_checkpoint("mixtral", tmp_path / "base"), tmp_path / "source"
    write_with_peft(
        build_family_model("mixtral"),
        source,
        **{"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "fan_in_fan_out": False, "r": 2},
    )
    changes: dict[str, dict[str, object]] = {
        "unknown": {"target_parameters": ["experts.down_proj", "mlp.experts.w1"]},
        "rank": {"rank_pattern": {"down_proj": 3}},
        "kind": {"target_parameters": 5},
        "name": {"target_parameters": [["a"]]},
        "pattern": {"rank_pattern": [1]},
        "number": {"alpha_pattern": {"down_proj": float("nan")}},
        "unnamed": {"target_parameters": None},
    }
    edit_config(source, **changes.get(change, {}))
    if change == "missing":
        tensors = load_file(source / "adapter_model.safetensors")
        del tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
        save_file(tensors, source / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_in(source, tmp_path / "stored", model)


def test_a_model_without_experts_has_no_such_parameters(tmp_path: Path) -> None:
    model, source = write_family_checkpoint("llama", tmp_path / "base"), tmp_path / "source"
    write_with_peft(build_family_model("llama"), source, target_modules=["q_proj"], fan_in_fan_out=False)
    edit_config(source, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"target_parameters: base has no mlp\.experts\.down_proj to adapt"):
        read_in(source, tmp_path / "stored", model)


def test_analyse_has_no_place_for_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, source, stored = (tmp_path / name for name in ("base", "source", "stored"))
    write_family_checkpoint("mixtral", base)
    write_peft_adapter("mixtral", source, PARAMETERS[1])
    given = ["model=hf", f"model.checkpoint={base}"]
    assert run_distributed(call, 1, ["import", *given, f"source={source}", f"output={stored}"]) == [0]
    assert run_distributed(call, 1, ["analyse", *given, f"adapters=[{stored}]", f"output={tmp_path / 'out'}"]) == [2]
    assert "layers.0.down_proj adapts experts, whose updates analyse has no place for" in capfd.readouterr().err
