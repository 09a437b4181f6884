"""What a LoRA layer keeps for backward, in units of one hidden vector a token: a budget that may only shrink."""

import pytest
import torch
import torch.distributed as dist
from processes import run_distributed

from lora_dist.batch import Batch
from lora_dist.config import LoraConfig, ModelConfig, TopologyConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.adapters import apply_lora
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.model import build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.ledger import open_activation_ledger

B, S, H = 2, 64, 128


def measure_units(
    targets: list[str],
    num_layers: int,
    recompute: str,
    *,
    packed: bool = False,
    blocks: bool = True,
    cp_size: int = 1,
    **family: object,
) -> float:
    """Peak saved bytes over B S H fp32 values."""
    model = ModelConfig(
        name="wide",
        **family,
        num_layers=num_layers,
        hidden_size=H,
        num_heads=2,
        ffn_hidden_size=4 * H,
        vocab_size=64,
        max_position_embeddings=S,
    )
    sizes = TopologyConfig(cp_size=cp_size)
    topology = build_topology(sizes, device=torch.device("cpu"), local_rank=dist.get_rank(), seed=1)
    gpt = build_model(model, topology, dtype=torch.float32, recompute=recompute, clock=DropoutClock())
    gpt.attends_in_blocks = blocks
    initialize_base(gpt, model, seed=0)
    apply_lora(gpt, build_adapter_specs(LoraConfig(rank=1, target_modules=targets), model), bias="none", seed=0)
    tokens = torch.arange(B * S).view(B, S) % 64
    batch = Batch(
        input_ids_BS=tokens,
        labels_BS=tokens,
        loss_mask_BS=torch.arange(S).expand(B, S) >= S - 4,  # few targets: the output layer's share is small
        position_ids_BS=torch.arange(S).expand(B, S),
        row_blocks=((16,) * (S // 16),) * B if packed else None,
        row_ids_B=torch.arange(B),
        num_loss_tokens=4 * B,
        num_tokens=B * S,
    )
    with open_activation_ledger(gpt.parameters) as ledger:
        forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)
    return ledger.peak_bytes / (B * S * H * 4)


def measure_units_a_layer(targets: list[str], recompute: str = "none", *, cp_size: int = 1, **options: object) -> float:
    """Of one more layer: the embedding, the last norm and the loss drop out of the difference."""

    def measure(num_layers: int) -> float:
        return measure_units(targets, num_layers, recompute, cp_size=cp_size, **options)

    few, many = (run_distributed(measure, cp_size, n)[0] for n in (2, 6))
    return (many - few) / 4


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        # qkv's input (the first norm's output), q, k, v, attention's output, the second norm's input, GELU's input
        (["q_proj", "v_proj"], 1 + 3 + 1 + 1 + 4),
        (["up_proj"], 1 + 3 + 1 + 1 + 4),  # the second norm's output instead of its input; the first's input
        (["q_proj", "o_proj", "up_proj", "down_proj"], 1 + 3 + 1 + 1 + 4 + 4),  # and down_proj's input
    ],
)
def test_units_a_layer(targets: list[str], expected: int) -> None:
    units = measure_units_a_layer(targets)
    assert expected <= units < expected + 0.3  # the factors, their products and the norms' deviations


@pytest.mark.parametrize(
    ("targets", "expected", "factors"),
    [
        # qkv's input, q and half as many keys and values, attention's output, the second norm's input, gate and up
        (["q_proj", "v_proj"], 1 + 2 + 1 + 1 + 8, 0.3),
        (
            ["all"],
            1 + 2 + 1 + 1 + 8 + 4,
            0.7,
        ),  # and down_proj's input; B of gate and up has 16 H values and as many zeros
    ],
)
def test_units_a_gated_layer(targets: list[str], expected: int, factors: float) -> None:
    units = measure_units_a_layer(targets, family="llama", num_kv_heads=1)
    assert expected <= units < expected + factors


@pytest.mark.parametrize("window", [None, 16])
def test_sinks_keep_no_scores(window: int | None) -> None:
    """Of a layer: what the one above has, with [gate | up] of two experts a token. Scores would be one unit more."""
    experts = {"num_experts": 4, "experts_per_token": 2, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    targets, kind = ["q_proj", "v_proj"], {"num_kv_heads": 1, "sliding_window": window}
    units = measure_units_a_layer(targets, family="gpt_oss", **kind, **experts)
    assert 1 + 2 + 1 + 1 + 2 * 8 <= units < 1 + 2 + 1 + 1 + 2 * 8 + 0.5


@pytest.mark.parametrize("packed", [{}, {"packed": True}, {"packed": True, "blocks": False}], ids=str)
def test_a_window_keeps_nothing_more_in_a_layer(packed: dict[str, bool]) -> None:
    """Tile by tile, under one bias for all layers; keys and values once, whatever tiles see them."""
    kind = {"family": "mistral", "num_kv_heads": 1, **packed}
    units, plain = (measure_units_a_layer(["q_proj", "v_proj"], sliding_window=w, **kind) for w in (8, None))
    assert units == pytest.approx(plain, abs=1e-6)


def test_multipliers_keep_nothing() -> None:
    targets = ["q_proj", "v_proj"]
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_scale": 0.1, "logits_divisor": 4.0}
    units, plain = (
        measure_units_a_layer(targets, family=family, num_kv_heads=1, **more)
        for family, more in (("granite", scales), ("llama", {}))
    )
    assert units == pytest.approx(plain, abs=1e-9)


def test_layers_without_rotation_keep_what_the_others_keep() -> None:
    def measure(unturned_layers: list[int]) -> float:
        kind = {"family": "smollm3", "num_kv_heads": 1, "unturned_layers": unturned_layers}
        return measure_units(["q_proj", "v_proj"], 3, "none", **kind)

    units, plain = (run_distributed(measure, 1, layers)[0] for layers in ([1, 2], []))
    assert units == pytest.approx(plain, abs=1e-9)


def test_norms_behind_alone_keep_their_inputs_and_no_more() -> None:
    """Of a gated layer: attention's input, which the MLP before it has handed on, q, k and v, attention's output, both
    norms' inputs, gate and up."""
    units = measure_units_a_layer(["q_proj", "v_proj"], family="olmo2", num_kv_heads=1)
    assert 1 + 2 + 1 + 2 + 8 <= units < 1 + 2 + 1 + 2 + 8 + 0.3


def test_norms_of_all_heads_keep_one_number_a_token_each() -> None:
    """Of a layer: what Mixtral's keeps, though its queries and keys are normalised."""
    targets, sizes = ["q_proj", "v_proj"], {"num_kv_heads": 1, "num_experts": 4, "experts_per_token": 2}
    units, plain = (measure_units_a_layer(targets, family=family, **sizes) for family in ("minimax_m2", "mixtral"))
    assert units == pytest.approx(plain + 2 / H, abs=1e-9)


def test_a_delta_net_keeps_what_its_first_linear_gives() -> None:
    """Of a layer: that linear's input and output, what enters the last one, the second norm's input,
    and [gate | up] of two experts a token and of the shared one. What its heads compute would be several units more.
    """
    experts = {"num_experts": 4, "experts_per_token": 2, "shared_ffn_size": 16}
    delta = {"delta_key_heads": 2, "delta_value_heads": 4, "delta_key_size": 16, "delta_value_size": 8}
    options = {"family": "qwen3_next", "delta_kernel_size": 4, **delta, **experts}
    units = measure_units_a_layer(["in_proj_qkvz", "out_proj"], **options)
    expected = 1 + 136 / H + 32 / H + 1 + 2 * 8 + 2 * 16 / H
    assert expected <= units < expected + 0.3
    assert measure_units_a_layer(["in_proj_qkvz", "out_proj"], packed=True, **options) == pytest.approx(units, abs=0.01)


@pytest.mark.parametrize("blocks", [True, False])
def test_packing_keeps_nothing_more_in_a_layer(blocks: bool) -> None:
    """Block by block, and under one bias for all layers."""
    alone = measure_units_a_layer(["q_proj", "v_proj"])
    assert measure_units_a_layer(["q_proj", "v_proj"], packed=True, blocks=blocks) == pytest.approx(alone, abs=1e-6)


def test_full_recompute_keeps_a_layers_input() -> None:
    assert 1 <= measure_units_a_layer(["q_proj", "v_proj"], "full") < 1.1


@pytest.mark.parametrize("packed", [False, True])
def test_of_rows_over_processes_each_keeps_its_part(packed: bool) -> None:
    """Keys and values of whole rows are not kept, but gathered again."""
    targets, kind = ["q_proj", "v_proj"], {"family": "llama", "num_kv_heads": 1}
    units, whole = (measure_units_a_layer(targets, cp_size=n, packed=packed, **kind) for n in (4, 1))
    assert units <= whole / 4 + 0.1  # the factors are whole everywhere
