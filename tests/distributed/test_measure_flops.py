"""FLOPs counted on the real step equal the closed formula, to the last one."""

from dataclasses import replace

import pytest
import torch
from processes import run_distributed
from tiers import exhaustive, few_of
from toy import ALL_TARGETS, BLOCKS, MODEL, NUM_ROWS, SEQ_LEN, Case, build_batches, build_case

from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore import delta_rule
from lora_dist.mcore.delta_rule import count_chunks
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.flops import StepShape, compute_full_flops, compute_lora_flops, count_flops

CHUNK_SIZE = 4
"""In gated DeltaNets, so that the toy's blocks have several chunks."""


def count_step(case: Case, in_blocks: bool = True) -> tuple[int, int]:
    """FLOPs of this process and the step's target tokens."""
    gpt, _, topology = build_case(case)
    gpt.attends_in_blocks = in_blocks
    batches = build_batches(topology)
    with count_flops() as counter:
        forward_backward(gpt, batches, seed=0, step=0, scale_loss=None)
    return counter.get_total_flops(), batches[0].num_loss_tokens


def build_shape(num_loss_tokens: int, recompute: str = "none", tp_size: int = 1) -> StepShape:
    multiple = 8 * tp_size
    return StepShape(
        num_tokens=NUM_ROWS * SEQ_LEN,
        num_loss_tokens=num_loss_tokens,
        num_scores=NUM_ROWS * sum(length**2 for length in BLOCKS),
        num_vocab_rows=-(-MODEL.vocab_size // multiple) * multiple,
        recompute=recompute,
        num_picking=NUM_ROWS * SEQ_LEN,
        num_picking_scores=NUM_ROWS * sum(length**2 for length in BLOCKS),
        chunk_size=CHUNK_SIZE,
        num_chunks=NUM_ROWS * sum(count_chunks(length, CHUNK_SIZE) for length in BLOCKS),
        num_first_chunks=NUM_ROWS * len(BLOCKS),
    )


LORAS = [
    LoraConfig(rank=3, target_modules=ALL_TARGETS),
    LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]),
    LoraConfig(rank=1, target_modules=["fc2"]),
    LoraConfig(rank=5, target_modules=["o_proj", "up_proj"], layers=["1", "3"]),
]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", LORAS, ids=lambda lora: ",".join(lora.target_modules))
def test_lora_formula(lora: LoraConfig, recompute: str) -> None:
    case = Case(lora=lora, recompute=recompute, dtype=torch.float32)
    [(counted, num_loss_tokens)] = run_distributed(count_step, 1, case)
    assert counted == compute_lora_flops(
        MODEL, build_adapter_specs(lora, MODEL), build_shape(num_loss_tokens, recompute)
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_full_formula(recompute: str) -> None:
    case = Case(method="full", recompute=recompute, dtype=torch.float32)
    [(counted, num_loss_tokens)] = run_distributed(count_step, 1, case)
    assert counted == compute_full_flops(MODEL, build_shape(num_loss_tokens, recompute))


def test_processes_share_the_work() -> None:
    """Full fine-tuning on TP x DP computes what one process would, vocabulary padding apart."""
    results = run_distributed(count_step, 4, Case(method="full", tp_size=2, dp_size=2, dtype=torch.float32))
    assert sum(counted for counted, _ in results) == compute_full_flops(MODEL, build_shape(results[0][1], tp_size=2))


LLAMA = replace(MODEL, family="llama", num_kv_heads=2, head_size=12, ffn_hidden_size=40, tied_output=False)


@pytest.mark.parametrize("lora", [LoraConfig(rank=3, target_modules=["all"]), LoraConfig(rank=2)], ids=["all", "q,v"])
def test_a_gated_model_with_shared_heads(lora: LoraConfig) -> None:
    case = Case(model=LLAMA, lora=lora, recompute="selective", dtype=torch.float32)
    [(counted, num_loss_tokens)] = run_distributed(count_step, 1, case)
    shape = build_shape(num_loss_tokens, "selective")
    assert counted == compute_lora_flops(LLAMA, build_adapter_specs(lora, LLAMA), shape)
    [(counted, _)] = run_distributed(count_step, 1, Case(model=LLAMA, method="full", dtype=torch.float32))
    assert counted == compute_full_flops(LLAMA, build_shape(num_loss_tokens))


EXPERTS = {"num_experts": 5, "experts_per_token": 3}
SHARED = {**EXPERTS, "shared_ffn_size": 24, "num_dense_layers": 1, "dense_ffn_size": 56, "qk_norm": True}
TARGETS = (["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], ["down_proj"], ["up_proj"])
SHARED_TARGETS = (
    *(["all"], ["shared_up_proj"], ["shared_down_proj"], [r"layers\.1\.(shared_down|up)_proj"]),
    *([r"layers\.[12]\.shared_up_proj", r"layers\.2\.down_proj"], [r"layers\.1\.down_proj", "shared_gate_proj"]),
)


BOUNDED = {**EXPERTS, "head_size": 16, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}


@pytest.mark.parametrize(
    ("family", "sizes", "all_targets"),
    [
        *exhaustive(("mixtral", EXPERTS, TARGETS)),
        *exhaustive(("qwen3_moe", EXPERTS, TARGETS)),
        *exhaustive(("glm4_moe", SHARED, TARGETS + SHARED_TARGETS)),
        *exhaustive(("minimax_m2", EXPERTS, TARGETS[:1])),
        ("gpt_oss", BOUNDED, TARGETS),
    ],
    ids=["mixtral", "qwen3_moe", "glm4_moe", "minimax_m2", "gpt_oss"],
)
@pytest.mark.parametrize("recompute", few_of(["none", "selective"], "selective"))
def test_experts_share_the_tokens(family: str, sizes: dict, all_targets: tuple, recompute: str) -> None:
    assert_all_is_counted(replace(LLAMA, family=family, **sizes), all_targets, recompute)


def assert_all_is_counted(model: ModelConfig, all_targets: tuple, recompute: str) -> None:
    """LoRA on each of the targets, and full fine-tuning."""
    for targets in all_targets:
        lora = LoraConfig(rank=2, target_modules=targets)
        case = Case(model=model, lora=lora, recompute=recompute, dtype=torch.float32)
        [(counted, num_loss_tokens)] = run_distributed(count_step, 1, case)
        shape = build_shape(num_loss_tokens, recompute)
        assert counted == compute_lora_flops(model, build_adapter_specs(lora, model), shape), targets
    [(counted, _)] = run_distributed(count_step, 1, Case(model=model, method="full", dtype=torch.float32))
    assert counted == compute_full_flops(model, build_shape(num_loss_tokens))


LATENT = replace(
    MODEL, family="deepseek_v3", head_size=10, query_latent_size=20, kv_latent_size=12, rope_head_size=4,
    value_head_size=6, tied_output=False, num_experts=4, experts_per_token=2,
)  # fmt: skip
HEADS = (
    [r"layers\.[12]\.kv_b_proj"],
    [r"layers\.1\.kv_a_proj", r"layers\.2\.o_proj"],
    ["kv_a_proj", "kv_b_proj"],
    ["all"],
)
QUERIES = (
    ["q_a_proj"],
    [r"layers\.1\.q_b_proj", r"layers\.2\.q_a_proj"],
    [r"layers\.1\.q_a_proj", "o_proj"],
    ["q_b_proj"],
)


@pytest.mark.parametrize(
    ("model", "all_targets"),
    [(LATENT, QUERIES + HEADS), *exhaustive((replace(LATENT, query_latent_size=None), (["q_proj"], *HEADS)))],
    ids=["latent queries", "direct queries"],
)
@pytest.mark.parametrize("recompute", few_of(["none", "full"], "full"))
def test_queries_keys_and_values_come_from_latents(model: ModelConfig, all_targets: tuple, recompute: str) -> None:
    assert_all_is_counted(model, all_targets, recompute)


SPARSE = replace(
    LATENT, family="glm_moe_dsa", rope_interleaved=True, attended_positions=5, indexer_heads=3, indexer_head_size=6,
    layers_without_indexer=[2], head_size=16,  # as many features as kernels take, which fill up others
)  # fmt: skip


@pytest.mark.parametrize("recompute", few_of(["none", "selective", "full"], "full"))
def test_an_indexer_picks_once_for_those_that_share_it(recompute: str) -> None:
    assert_all_is_counted(SPARSE, (["kv_b_proj"], [r"layers\.2\.q_a_proj"]), recompute)


DELTA = replace(
    LLAMA, family="qwen3_next", rotary_fraction=0.5, delta_key_heads=2, delta_value_heads=4, delta_key_size=6,
    delta_value_size=10, delta_kernel_size=4, full_attention_layers=[1, 3], shared_ffn_size=24, **EXPERTS,
)  # fmt: skip
IN_DELTA_NETS = (
    ["all"],
    ["q_proj"],
    [r"layers\.2\.(in_proj_ba|out_proj)", r"layers\.3\.shared_down_proj"],
)


@pytest.mark.parametrize("recompute", few_of(["none", "selective", "full"], "full"))
def test_a_delta_net_computes_its_heads_again(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "CHUNK_SIZE", CHUNK_SIZE)
    assert_all_is_counted(DELTA, IN_DELTA_NETS, recompute)


WINDOWS = replace(
    LLAMA, family="gemma3_text", head_size=16, tied_output=True, sliding_window=5, full_attention_layers=[1],
    local_rope_theta=100.0,
)  # fmt: skip


@pytest.mark.parametrize(("in_blocks", "num_tiles"), [(True, (9 + 1 + 7 + 1) // 2), (False, SEQ_LEN // 2)])
@pytest.mark.usefixtures("small_tiles")
def test_layers_with_a_window_compute_tile_by_tile(in_blocks: bool, num_tiles: int) -> None:
    """Tiles of two positions, which see four more before them, of blocks or of whole rows; the other layers see all."""
    lora = LoraConfig(rank=2, target_modules=["q_proj", "down_proj"])
    case = Case(model=WINDOWS, lora=lora, recompute="full", dtype=torch.float32)
    [(counted, num_loss_tokens)] = run_distributed(count_step, 1, case, in_blocks)
    shape = replace(build_shape(num_loss_tokens, "full"), num_windowed_scores=NUM_ROWS * num_tiles * 2 * 6)
    if not in_blocks:
        shape = replace(shape, num_scores=NUM_ROWS * SEQ_LEN**2)
    assert counted == compute_lora_flops(WINDOWS, build_adapter_specs(lora, WINDOWS), shape)


def test_what_transformers_computes_for_its_experts_counts() -> None:
    """Stacked, in one call for all of them, which torch's own counter does not know."""
    x_TH, weights_EHF = torch.ones(6, 4, requires_grad=True), torch.ones(3, 4, 8, requires_grad=True)
    ends_E = torch.tensor([1, 1, 6], dtype=torch.int32)
    with count_flops() as counter:
        torch._grouped_mm(x_TH, weights_EHF, offs=ends_E).backward(torch.ones(6, 8))
    assert counter.get_total_flops() == 3 * 2 * 6 * 4 * 8
