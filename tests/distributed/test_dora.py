"""DoRA: PEFT's outputs and gradients, the same at every topology, in files and merged; what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapter_files import read_in, write_with_peft
from hf_toy import (
    build_hf_model,
    build_run_config,
    build_shard,
    compute_hf_logits,
    compute_logits,
    compute_peft_logits,
    count_processes,
    draw_adapter_values,
    draw_tokens,
    read_toy_config,
    write_toy_checkpoint,
)
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from processes import run_alone, run_distributed
from test_dtypes import train as train_in
from test_parity import FEW, TOLERANCE, TOPOLOGIES, compute_error, run_case
from test_zero import assert_trained_alike, train, train_oracle
from tiers import exhaustive, few_of
from toy import ALL_TARGETS, Case, compute_gradients
from transformers import GPT2LMHeadModel

from lora_dist.batch import Batch
from lora_dist.checkpoint.adapter import write_adapter
from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.store import open_adapter
from lora_dist.config import LoraConfig, ZeroConfig
from lora_dist.lora.dora import dora_linear
from lora_dist.lora.dropout import DropoutMask, compute_row_keys
from lora_dist.lora.function import NO_COMMUNICATION
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.mcore.live import LiveMerge, attach_adapters, attach_alone, load_shards
from lora_dist.mcore.schedule import forward_backward
from lora_dist.methods import apply_method
from lora_dist.whole import cut_shard, read_value

LORA = LoraConfig(rank=3, alpha=6, target_modules=ALL_TARGETS, use_dora=True)
Q_V = LoraConfig(rank=2, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True)


@pytest.mark.parametrize("options", few_of(TOPOLOGIES, *FEW), ids=lambda options: str(Case(**options)))
def test_gradients_equal_one_process(options: dict) -> None:
    lora = replace(LORA, bias="all")
    expected_loss, expected = run_case(Case(lora=lora))
    loss, actual = run_case(Case(lora=lora, **options))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE
    assert sum(name.endswith("magnitude") for name in actual) == 24


@pytest.mark.parametrize(
    "options",
    [TOPOLOGIES[3], TOPOLOGIES[-1], *exhaustive(*TOPOLOGIES[:3], TOPOLOGIES[-2])],
    ids=lambda options: str(Case(**options)),
)
def test_dropout_is_the_same_everywhere(options: dict) -> None:
    lora = replace(Q_V, dropout=0.3)
    expected_loss, expected = run_case(Case(lora=lora))
    loss, actual = run_case(Case(lora=lora, **options))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE
    assert expected_loss != run_case(Case(lora=Q_V))[0]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_linear_is_pefts_with_its_dropout(dropout: float) -> None:
    """PEFT's own module, given the very input that our mask lets through."""
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 5).double().requires_grad_(False)
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    a, b = torch.nn.Linear(8, 2, bias=False).double(), torch.nn.Linear(2, 5, bias=False).double()
    theirs, scaling = DoraLinearLayer(fan_in_fan_out=False), 1.5
    theirs.update_layer(base_layer=base, lora_A=a.weight, lora_B=b.weight, scaling=0.0)
    with torch.no_grad():
        theirs.weight.mul_(torch.linspace(0.5, 2, 5, dtype=torch.float64))
    row_keys_B = compute_row_keys(torch.arange(3), seed=1, step=2)
    mask = DropoutMask(row_keys_B=row_keys_B, adapter_name="a", probability=dropout) if dropout else None
    result = base(x)
    dropped, given = (mask.apply(x), None) if mask is not None else (x, result)
    expected = result + theirs(dropped, lora_A=a, lora_B=b, scaling=scaling, base_layer=base, base_result=given)
    leaves = [x, a.weight, b.weight, theirs.weight]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    norms = (base.weight + scaling * b.weight @ a.weight).norm(dim=1).detach()
    actual = dora_linear(
        x, base.weight, base.bias, a.weight, scaling * b.weight, theirs.weight / norms, mask=mask,
        communication=NO_COMMUNICATION,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    for ours, gradient in zip(torch.autograd.grad(actual.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, gradient, atol=1e-10, rtol=1e-10)


def write_and_learn(options: dict, base: Path, target: Path, lora: LoraConfig) -> tuple:
    """Written by write_adapter with values drawn; the logits; and whole gradients of one step, on one process."""
    model = read_toy_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    config = build_run_config(model, lora)
    method = apply_method(gpt, config)
    start = compute_logits(gpt)
    values = draw_adapter_values(method.specs, model, "none")
    with torch.no_grad():
        for one in method.trainable:
            one.parameter.copy_(cut_shard(values[one.name], one, gpt.topology))
    write_adapter(
        target, trainable=method.trainable, specs=method.specs, constants=method.constants, topology=gpt.topology,
        model=model, bias="none", read=read_value, base_fingerprint="base", task="toy", step=1, metrics={},
    )  # fmt: skip
    logits, gradients = compute_logits(gpt), {}
    if not options:
        tokens_BS = draw_tokens()
        B, S = tokens_BS.shape
        batch = Batch(
            input_ids_BS=tokens_BS, labels_BS=tokens_BS.roll(-1, 1), loss_mask_BS=torch.ones(B, S, dtype=torch.bool),
            position_ids_BS=torch.arange(S).expand(B, -1), row_blocks=None, row_ids_B=torch.arange(B),
            num_loss_tokens=B * S, num_tokens=B * S,
        )  # fmt: skip
        gpt.train()
        forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)
        gradients = {one.name: one.parameter.grad for one in method.trainable}
    return start, logits, gradients


@pytest.mark.parametrize("lora", [LORA, Q_V], ids=["all", "q_v_down"])
def test_peft_computes_the_same_logits_and_gradients(lora: LoraConfig, tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "adapter"
    model = write_toy_checkpoint(base)
    start, logits, gradients = run_distributed(write_and_learn, 1, {}, base, target, lora)[0]
    whole = compute_hf_logits(base)
    assert (start - whole).abs().max() < 1e-5 * whole.abs().max(), "B = 0 and the base's lengths are the base"
    theirs = PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32), target, is_trainable=True
    )
    expected = theirs(draw_tokens()).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    labels = draw_tokens().roll(-1, 1)
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    wanted = {}
    for spec in build_adapter_specs(lora, model):
        module = {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}.get(spec.target)
        linear = theirs.base_model.model.transformer.h[spec.layer].get_submodule(module or "attn.c_attn")
        adapted = [one.target for one in build_adapter_specs(lora, model) if one.layer == spec.layer]
        place = 0 if module else adapted.index(spec.target) * spec.lora_rank
        row = 0 if module else "qkv".index(spec.target[0]) * spec.out_features
        rows, columns = slice(row, row + spec.out_features), slice(place, place + spec.lora_rank)
        wanted[f"{spec.name}.lora_A"] = linear.lora_A["default"].weight.grad[columns]
        wanted[f"{spec.name}.lora_B"] = linear.lora_B["default"].weight.grad[rows, columns]
        wanted[f"{spec.name}.magnitude"] = linear.lora_magnitude_vector["default"].weight.grad[rows]
    assert gradients.keys() == wanted.keys()
    assert compute_error(dict(gradients), wanted) < 2e-5


@pytest.mark.parametrize(
    "options", [{"tp_size": 2}, {"tp_size": 4, "sequence_parallel": True}, {"pp_size": 2, "tp_size": 2}], ids=str
)
def test_every_topology_writes_the_same_file_and_computes_pefts_logits(options: dict, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_toy_checkpoint(base)
    run_distributed(write_and_learn, 1, {}, base, tmp_path / "one", Q_V)
    results = run_distributed(write_and_learn, count_processes(options), options, base, tmp_path / "many", Q_V)
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "many")]
    assert raw[0] == raw[1]
    expected = compute_peft_logits(base, tmp_path / "one")
    logits = next(one for _, one, _ in results if one is not None)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def merge(options: dict, base: Path, adapter: Path, target: Path) -> None:
    model = read_toy_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    stored = open_adapter(adapter, model=model, base_fingerprint="base")
    live = LiveMerge(gpt)
    loaded = load_shards(gpt, "dora", stored.specs, stored.read().values)
    live.merge(loaded)
    write_hf_checkpoint(gpt, target, model=model)
    live.unmerge()
    assert all(torch.equal(parameter, before[name]) for name, parameter in gpt.named_parameters())
    with pytest.raises(ValueError, match="dora has DoRA's row lengths, which the rows of a batch share"):
        attach_adapters(gpt, [loaded])


def attach(options: dict, base: Path, adapter: Path) -> torch.Tensor | None:
    model = read_toy_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    stored = open_adapter(adapter, model=model, base_fingerprint="base")
    attach_alone(gpt, load_shards(gpt, "dora", stored.specs, stored.read().values))
    return compute_logits(gpt)


@pytest.mark.parametrize("options", [{}, {"tp_size": 2}], ids=str)
def test_merged_unmerged_and_beside(options: dict, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_toy_checkpoint(base)
    run_distributed(write_and_learn, 1, {}, base, adapter, Q_V)
    run_distributed(merge, count_processes(options), options, base, adapter, tmp_path / "merged")
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32), adapter)
    expected = theirs.merge_and_unload().eval()(draw_tokens()).logits
    beside = run_distributed(attach, count_processes(options), options, base, adapter)
    for logits in (compute_hf_logits(tmp_path / "merged"), *beside):
        assert logits is None or (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.exhaustive
def test_trains_like_plain_torch_under_zero() -> None:
    case = Case(dtype=torch.float32, lora=LoraConfig(rank=3, target_modules=["all"], use_dora=True))
    oracle = run_distributed(train_oracle, 1, case)[0]
    for options, stage in (({"dp_size": 2}, 1), ({"tp_size": 2, "dp_size": 2}, 2), ({"dp_size": 2}, 3)):
        distributed = replace(case, **options)
        results = run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage))
        assert_trained_alike(results, oracle)


@pytest.mark.parametrize("dtype", few_of([torch.bfloat16, torch.float16], torch.float16))
@pytest.mark.parametrize(
    ("options", "stage"), [*exhaustive(({"dp_size": 2}, 3)), ({"tp_size": 2, "pp_size": 2}, 1)], ids=str
)
def test_over_a_low_precision_base(dtype: torch.dtype, options: dict, stage: int) -> None:
    case = Case(dtype=torch.float32, lora=LORA)
    exact = run_alone(train_in, case, 0)[0]
    case = replace(case, dtype=dtype, **options)
    for losses, _, dtypes in run_distributed(train_in, case.world_size, case, stage):
        assert losses == pytest.approx(exact, abs=0.02)
        assert dtypes == {"torch.float32"}


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "mlp.c_proj", "c_fc"]])
def test_pefts_own_adapters_come_in_and_go_out(targets: list[str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = write_toy_checkpoint(base)
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=targets, r=2, lora_alpha=6, use_dora=True)
    stored = read_in(tmp_path / "source", tmp_path / "stored", model)
    assert stored.specs[0].use_dora
    export_adapter(stored, tmp_path / "out", "peft")
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("source", "out")]
    assert raw[0] == raw[1]
    run_distributed(merge, 1, {}, base, tmp_path / "stored", tmp_path / "merged")
    expected = compute_peft_logits(base, tmp_path / "source")
    assert (compute_hf_logits(tmp_path / "merged") - expected).abs().max() < 1e-5 * expected.abs().max()
    for format in ("loralib", "bridge"):
        with pytest.raises(ValueError, match=f"format={format} has no place for DoRA's magnitudes; use format=peft"):
            export_adapter(stored, tmp_path / format, format)


def test_pissa_and_dora_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.use_dora=true starts from the base's own rows"):
        LoraConfig(use_dora=True, init="pissa")


def compute_with_half_norms(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    import lora_dist.lora.dora

    lora_dist.lora.dora.sum_row_squares = lambda squares_O, group: squares_O
    return compute_gradients(case)


def test_a_norm_of_half_a_row_is_seen() -> None:
    """Breaks the sum over TP: without it the oracle comparison must fail, or it proves nothing."""
    lora = LoraConfig(rank=3, target_modules=["down_proj"], use_dora=True)
    _, expected = run_case(Case(lora=lora))
    results = run_distributed(compute_with_half_norms, 2, Case(lora=lora, tp_size=2))
    assert compute_error(results[0][1], expected) > 1e-2


def test_lengths_of_some_of_a_fused_linear_are_refused(tmp_path: Path) -> None:
    """As one a projection they can come from a model whose q, k and v are linears of their own."""
    model = write_toy_checkpoint(tmp_path / "base")
    run_distributed(write_and_learn, 1, {}, tmp_path / "base", tmp_path / "adapter", Q_V)
    stored = open_adapter(tmp_path / "adapter", model=model, base_fingerprint="base")
    export_adapter(stored, tmp_path / "split", "peft_split")
    with pytest.raises(ValueError, match=r"layers.0.k_proj has no lora_magnitude_vector, but the linear of q_proj, k"):
        read_in(tmp_path / "split", tmp_path / "again", model)
