"""The bench whole on a tiny model: contenders agree on the loss, the record adds up, a failing contender is named."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from hf_toy import build_run_config
from processes import run_distributed

from lora_dist.bench.batches import build_batches
from lora_dist.bench.ours import write_start_weights
from lora_dist.bench.peers import build_peft_config
from lora_dist.bench.record import build_record
from lora_dist.bench.runner import check_bench, measure_contenders
from lora_dist.config import BenchConfig, LoopConfig, LoraConfig, ModelConfig, RunConfig, TopologyConfig
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.flops import StepShape, compute_full_flops

FORK = multiprocessing.get_context("fork")
MODEL = ModelConfig(
    name="toy",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=64,
    vocab_size=104,
    max_position_embeddings=16,
)
LLAMA = replace(MODEL, family="llama", num_kv_heads=2, tied_output=False)
ALL = ["lora", "full", "lora_recompute", "full_recompute", "peft", "peft_tuned", "hf_full"]


def build_config(model: ModelConfig = MODEL, **options: object) -> RunConfig:
    bench = BenchConfig(contenders=ALL, num_rounds=2, num_warmup_rounds=1, target_fraction=0.5)
    loop = LoopConfig(micro_batch_size=2, global_batch_size=4)
    return build_run_config(model, **{"bench": bench, "loop": loop, "device": "cpu", **options})


def start(config: RunConfig, directory: Path) -> RunConfig:
    """With the weights that every contender starts from."""
    run_distributed(write_start_weights, 1, config, str(directory))
    return replace(config, model=replace(config.model, checkpoint=str(directory)))


@pytest.fixture
def started_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("LOCAL_RANK", "0")
    return start(build_config(), tmp_path / "start")


def test_contenders_agree_on_a_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    lora = LoraConfig(rank=4, target_modules=["all"])
    config = start(build_config(LLAMA, lora=lora), tmp_path / "start")
    measured = measure_contenders(config, context=FORK)
    first = {name: samples[0].loss for name, samples in measured.samples.items()}
    assert first["peft"] == pytest.approx(first["lora"], abs=2e-3)
    assert first["peft_tuned"] == pytest.approx(first["lora"], abs=2e-3)
    assert first["hf_full"] == pytest.approx(first["full"], abs=2e-3)
    accounts = measured.accounts
    assert accounts["lora"].num_trainable == accounts["peft"].num_trainable
    assert accounts["lora"].saved_activation_bytes < accounts["peft"].saved_activation_bytes


def test_contenders_agree_on_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's adapter of gate and up is one, so it trains otherwise from the second step on."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    lora = LoraConfig(rank=4, target_modules=["all", "gate_proj", "up_proj", "down_proj"])
    bench = BenchConfig(contenders=["lora", "peft"], num_rounds=1, num_warmup_rounds=1)
    config = build_config(
        replace(LLAMA, family="qwen3_moe", num_experts=4, experts_per_token=2), lora=lora, bench=bench
    )
    measured = measure_contenders(start(config, tmp_path / "start"), context=FORK)
    first = {name: samples[0].loss for name, samples in measured.samples.items()}
    assert first["peft"] == pytest.approx(first["lora"], abs=2e-3)
    assert measured.accounts["lora"].saved_activation_bytes < 0.7 * measured.accounts["peft"].saved_activation_bytes


def test_bench_end_to_end(started_config: RunConfig) -> None:
    measured = measure_contenders(started_config, context=FORK)
    record = json.loads(json.dumps(build_record(started_config, describe_environment(), measured)))
    contenders = record["contenders"]
    assert list(contenders) == ALL
    losses = {name: [sample["loss"] for sample in one["samples"]] for name, one in contenders.items()}
    for same in (
        ["lora", "lora_recompute", "peft", "peft_tuned"],
        ["full", "full_recompute", "hf_full"],
    ):  # one step apart at the first timed round
        assert losses[same[0]][0] == pytest.approx(losses[same[1]][0], abs=2e-3)
        assert losses[same[0]][0] == pytest.approx(losses[same[-1]][0], abs=2e-3)
        assert losses[same[0]] == losses[f"{same[0]}_recompute"]
        assert contenders[same[0]]["flops_per_step"] < contenders[f"{same[0]}_recompute"]["flops_per_step"]
    assert contenders["lora"]["num_trainable"] == contenders["peft"]["num_trainable"] == 2 * 2 * 2 * 4 * 32
    shape = StepShape(num_tokens=64, num_loss_tokens=32, num_scores=64 * 16, num_vocab_rows=104)
    assert contenders["full"]["flops_per_step"] == compute_full_flops(MODEL, shape)
    assert contenders["lora"]["saved_activation_bytes"] < contenders["peft"]["saved_activation_bytes"]
    assert len(record["ratios"]) == len(ALL) * (len(ALL) - 1)


def test_a_failing_contender_is_named(started_config: RunConfig) -> None:
    broken = replace(started_config, lora=LoraConfig(layers=[0]))
    with pytest.raises(RuntimeError, match=r"(?s)a contender failed: peft: .*bench compares with PEFT"):
        measure_contenders(replace(broken, bench=BenchConfig(contenders=["lora", "peft"])), context=FORK)
    assert not multiprocessing.active_children()


def test_batches_are_a_function_of_the_step() -> None:
    config = build_config()
    first, again, other = (build_batches(config, step) for step in (0, 0, 1))
    assert len(first) == 2
    assert all((a.input_ids_BS == b.input_ids_BS).all() for a, b in zip(first, again, strict=True))
    assert not (first[0].input_ids_BS == other[0].input_ids_BS).all()
    assert first[0].num_loss_tokens == sum(int(batch.loss_mask_BS.sum()) for batch in first) == 32
    assert (first[0].input_ids_BS[:, 1:] == first[0].labels_BS[:, :-1])[:, 8:].all()


def test_peft_gets_the_same_adapters() -> None:
    peft = build_peft_config(build_config(lora=LoraConfig(rank=2, target_modules=["q_proj", "down_proj"])))
    assert (peft.r, peft.target_modules, peft.target_parameters) == (2, {"c_attn", "mlp.c_proj"}, None)
    experts = replace(LLAMA, family="mixtral", num_experts=4, experts_per_token=2)
    peft = build_peft_config(build_config(experts, lora=LoraConfig(target_modules=["q_proj", "up_proj"])))
    assert (peft.target_modules, peft.target_parameters) == ({"self_attn.q_proj"}, ["mlp.experts.gate_up_proj"])
    shared = {"shared_ffn_size": 16, "num_dense_layers": 1, "dense_ffn_size": 32}
    lora = LoraConfig(target_modules=["q_proj", "down_proj", "shared_up_proj"])
    peft = build_peft_config(build_config(replace(experts, family="glm4_moe", **shared), lora=lora))
    parameters = ["mlp.experts.down_proj", "mlp.down_proj.weight", "mlp.shared_experts.up_proj.weight"]
    assert (peft.target_modules, peft.target_parameters) == ({"self_attn.q_proj"}, parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": TopologyConfig(tp_size=2)}, "got tp 2 cp 1 pp 1"),
        ({"loop": LoopConfig(recompute="selective")}, "no like in transformers"),
        ({"lora": LoraConfig(bias="all")}, "bench compares LoRA's factors alone; leave lora.bias"),
        ({"model": replace(MODEL, hidden_size=64, base_format="fp8")}, "base_format=fp8 is not set up for PEFT"),
    ],
)
def test_what_bench_does_not_measure_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_bench(replace(build_config(), **options))


def test_a_quantised_checkpoint_is_benched_without_peers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fbgemm_fp8"}}')
    config = build_config(replace(MODEL, checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match=rf"^model.checkpoint={tmp_path} is quantised, which transformers keeps so"):
        check_bench(config)
    check_bench(replace(config, bench=replace(config.bench, contenders=["lora", "full"])))
    (tmp_path / "config.json").write_text("{}")
    check_bench(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": ["lora", "unsloth"]}, "unsloth"),
        ({"contenders": []}, "empty"),
        ({"contenders": ["lora", "lora"]}, "twice"),
        ({"num_rounds": 0}, "num_rounds=0"),
        ({"target_fraction": 0.0}, "target_fraction=0.0"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchConfig(**options)
