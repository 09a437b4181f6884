"""Jobs whose plans are held against real steps: models of every kind, methods, topologies, ways to recompute."""

from dataclasses import replace

from hf_toy import build_run_config

from lora_dist.config import (
    DataConfig,
    HardwareConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    PlanConfig,
    RunConfig,
    TopologyConfig,
    ZeroConfig,
)

MODEL = ModelConfig(
    name="mini", num_layers=4, hidden_size=128, num_heads=4, ffn_hidden_size=512, vocab_size=1001,
    max_position_embeddings=128,
)  # fmt: skip
LLAMA = replace(
    MODEL, name="llama", family="llama", num_kv_heads=2, ffn_hidden_size=352, tied_output=False, rope_theta=500000.0
)
GEMMA = replace(
    LLAMA, name="gemma", family="gemma3_text", tied_output=True, sliding_window=48, full_attention_layers=[1],
    local_rope_theta=10000.0, attention_scale=0.1,
)  # fmt: skip
EXPERTS = replace(LLAMA, name="experts", family="qwen3_moe", ffn_hidden_size=128, num_experts=8, experts_per_token=3)
SHARED = replace(
    EXPERTS, name="shared", family="glm4_moe", rotary_fraction=0.5, num_dense_layers=1, dense_ffn_size=384,
    shared_ffn_size=256, num_expert_groups=4, groups_per_token=2,
)  # fmt: skip
LATENT = replace(
    SHARED, name="latent", family="deepseek_v3", num_kv_heads=None, rotary_fraction=1.0, head_size=48,
    query_latent_size=192, kv_latent_size=64, rope_head_size=16, value_head_size=32,
)  # fmt: skip
SPARSE = replace(
    LATENT, name="sparse", family="glm_moe_dsa", rope_interleaved=True, attended_positions=48, indexer_heads=4,
    indexer_head_size=32, layers_without_indexer=[1, 3],
)  # fmt: skip
SINKS = replace(
    EXPERTS, name="sinks", family="gpt_oss", sliding_window=48, full_attention_layers=[1, 3], swiglu_alpha=1.702,
    swiglu_limit=7.0,
)  # fmt: skip
WHOLE = replace(EXPERTS, name="whole", family="minimax_m2", head_size=48, rotary_fraction=0.5)
OLMO = replace(
    LLAMA, name="olmo", family="olmo3", sliding_window=48, full_attention_layers=[1], local_rope_theta=10000.0
)
DELTA = replace(
    EXPERTS, name="delta", family="qwen3_next", rotary_fraction=0.5, delta_key_heads=4, delta_value_heads=8,
    delta_key_size=16, delta_value_size=32, delta_kernel_size=4, full_attention_layers=[1, 3], shared_ffn_size=256,
)  # fmt: skip
SCALED = replace(
    LLAMA, name="scaled", family="granite", tied_output=True, embedding_multiplier=12.0, attention_scale=0.1,
    residual_multiplier=0.2, logits_divisor=8.0,
)  # fmt: skip
GROWING = replace(
    LLAMA, name="growing", family="ministral3", query_growth=0.1,
    rope_scaling={
        "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": 16.0,
    },
)  # fmt: skip
SEED = replace(LLAMA, name="seed", family="seed_oss", hidden_dropout=0.1, attention_dropout=0.1)
UNTURNED = replace(LLAMA, name="unturned", family="smollm3", unturned_layers=[1])
HARDWARE = HardwareConfig(
    name="here", kind="cpu", memory_gib=16, reserved_gib=0.5, peak_tflops={"fp32": 0.09, "bf16": 0.02},
    achievable_fraction=0.8, memory_gb_s=12, memory_fraction=0.8, gpus_per_node=8, link_gb_s=1, network_gb_s=1,
    link_latency_us=200, network_latency_us=400, launch_us=5,
)  # fmt: skip


def build_config(
    *,
    topology: dict[str, object] | None = None,
    recompute: str = "none",
    recompute_layers: int | None = None,
    num_microbatches: int = 1,
    collate: str = "pad",
    lora: LoraConfig | None = None,
    target_fraction: float = 0.5,
    model: ModelConfig = MODEL,
    **options: object,
) -> RunConfig:
    topology_config = TopologyConfig(**{"dp_size": 1, **(topology or {})})
    return build_run_config(
        model,
        lora or LoraConfig(rank=4),
        topology=topology_config,
        loop=LoopConfig(
            recompute=recompute,
            recompute_layers=recompute_layers,
            micro_batch_size=2,
            global_batch_size=2 * num_microbatches * topology_config.dp_size,
        ),
        data=DataConfig(name="fake", format="fake", seq_len=128, collate=collate),
        hardware=HARDWARE,
        plan=PlanConfig(target_fraction=target_fraction),
        **options,
    )


FULL = {"method": "full"}
ALL = LoraConfig(rank=3, target_modules=["all"], dropout=0.1, bias="all")
SEVEN = LoraConfig(rank=3, target_modules=["all"], dropout=0.1)
EXPERT_LORA = LoraConfig(rank=3, target_modules=["all", "gate_proj", "up_proj", "down_proj"])
CASES = {
    "lora": {},
    "lora-recompute": {"recompute": "full"},
    "lora-recompute-1": {"recompute": "full", "recompute_layers": 1},
    "lora-selective": {"recompute": "selective", "num_microbatches": 2},
    "lora-all-dropout-packed": {"lora": ALL, "collate": "pack"},
    "full": FULL,
    "full-base-dropout": {**FULL, "model": replace(MODEL, hidden_dropout=0.1, attention_dropout=0.1)},
    "full-recompute": {**FULL, "recompute": "full", "num_microbatches": 2},
    "full-stage0": {**FULL, "zero": ZeroConfig(stage=0)},
    "lora-tp2": {"topology": {"tp_size": 2}},
    "lora-tp2-sp": {"topology": {"tp_size": 2, "sequence_parallel": True}, "recompute": "full"},
    "lora-tp2-pissa": {"topology": {"tp_size": 2}, "lora": LoraConfig(rank=4, init="pissa")},
    "lora-tp2-dora": {"topology": {"tp_size": 2}, "lora": LoraConfig(rank=4, target_modules=["all"], use_dora=True)},
    "lora-pp2-modules": {
        "topology": {"pp_size": 2},
        "num_microbatches": 2,
        "lora": LoraConfig(rank=4, modules_to_save=["wte", "ln_1"]),
    },
    "full-tp2": {**FULL, "topology": {"tp_size": 2}},
    "lora-cp2-packed": {"topology": {"cp_size": 2}, "collate": "pack"},
    "full-cp2-dp2-stage3": {**FULL, "topology": {"cp_size": 2, "dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "llama-lora-tp2-cp2-sp": {
        **{"model": LLAMA, "lora": SEVEN, "recompute": "full"},
        "topology": {"tp_size": 2, "cp_size": 2, "sequence_parallel": True},
    },
    "latent-lora-cp2": {
        **{"model": LATENT, "lora": LoraConfig(rank=4, target_modules=["all"]), "topology": {"cp_size": 2}},
    },
    "sinks-full-cp2-pp2": {**FULL, "model": SINKS, "topology": {"cp_size": 2, "pp_size": 2}, "num_microbatches": 4},
    "gemma-lora-cp4-bf16": {"model": GEMMA, "lora": SEVEN, "topology": {"cp_size": 4}, "dtype": "bf16"},
    "delta-lora-cp2-packed": {"model": DELTA, "lora": EXPERT_LORA, "topology": {"cp_size": 2}, "collate": "pack"},
    "delta-full-tp2-cp2": {**FULL, "model": DELTA, "topology": {"tp_size": 2, "cp_size": 2}, "recompute": "full"},
    "lora-dp2-stage2": {"topology": {"dp_size": 2}, "zero": ZeroConfig(stage=2)},
    "full-dp2-bf16": {**FULL, "topology": {"dp_size": 2}, "dtype": "bf16"},
    "lora-dp2-stage3": {"topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "lora-tp2-sp-stage3": {"topology": {"tp_size": 2, "sequence_parallel": True}, "zero": ZeroConfig(stage=3)},
    "gemma-lora-tp2-sp-packed": {
        **{"model": GEMMA, "lora": SEVEN, "topology": {"tp_size": 2, "sequence_parallel": True}, "collate": "pack"},
    },
    "gemma-full-pp2": {**FULL, "model": GEMMA, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "phi3-lora-tp2": {
        "model": replace(LLAMA, name="phi3", family="phi3", rotary_fraction=0.5),
        **{"lora": SEVEN, "topology": {"tp_size": 2}},
    },
    "experts-lora-tp2-sp": {
        **{"model": EXPERTS, "lora": EXPERT_LORA, "topology": {"tp_size": 2, "sequence_parallel": True}},
    },
    "experts-lora-nf4-tp2-recompute": {
        **{"model": replace(EXPERTS, base_format="nf4"), "topology": {"tp_size": 2}, "recompute": "full"},
    },
    "shared-full-pp2": {**FULL, "model": SHARED, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "shared-lora-tp2-pp2-sp": {
        **{"model": SHARED, "lora": LoraConfig(rank=4, target_modules=["all", "gate_proj", "up_proj", "down_proj"])},
        **{"topology": {"tp_size": 2, "pp_size": 2, "sequence_parallel": True}, "num_microbatches": 2},
    },
    "full-pp3": {**FULL, "topology": {"pp_size": 3}, "num_microbatches": 4},
    "latent-lora": {"model": LATENT, "lora": LoraConfig(rank=4, target_modules=["all"]), "collate": "pack"},
    "latent-full-tp2": {**FULL, "model": LATENT, "topology": {"tp_size": 2}},
    "latent-lora-tp2-pp2-sp": {
        **{"model": LATENT, "lora": LoraConfig(rank=4, target_modules=["all"]), "num_microbatches": 2},
        "topology": {"tp_size": 2, "pp_size": 2, "sequence_parallel": True},
    },
    "latent-direct-lora-tp2-sp": {
        **{"model": replace(LATENT, query_latent_size=None), "lora": LoraConfig(rank=4, target_modules=["all"])},
        "topology": {"tp_size": 2, "sequence_parallel": True},
    },
    "latent-lora-nf4-tp2": {
        **{"model": replace(LATENT, base_format="nf4"), "topology": {"tp_size": 2}},
        "lora": LoraConfig(rank=4, target_modules=["q_a_proj", "kv_b_proj"]),
    },
    "sparse-lora-packed": {"model": SPARSE, "lora": LoraConfig(rank=4, target_modules=["all"]), "collate": "pack"},
    "sparse-lora-tp2-pp2-sp-recompute": {
        **{"model": SPARSE, "lora": EXPERT_LORA, "num_microbatches": 2, "recompute": "full"},
        "topology": {"tp_size": 2, "pp_size": 2, "sequence_parallel": True},
    },
    "sparse-lora-nf4-tp2-bf16": {
        **{"model": replace(SPARSE, base_format="nf4"), "lora": EXPERT_LORA, "topology": {"tp_size": 2}},
        **{"dtype": "bf16", "recompute": "selective"},
    },
    "sparse-full-dp2-stage3": {**FULL, "model": SPARSE, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "whole-lora-tp2-sp": {
        **{"model": WHOLE, "lora": replace(EXPERT_LORA, modules_to_save=["k_norm"])},
        **{"topology": {"tp_size": 2, "sequence_parallel": True}, "recompute": "full"},
    },
    "whole-lora-bf16-packed-tp2": {
        **{"model": WHOLE, "topology": {"tp_size": 2}, "dtype": "bf16", "collate": "pack"},
    },
    "whole-full-tp2": {**FULL, "model": WHOLE, "topology": {"tp_size": 2}},
    "whole-full-dp2-stage3": {**FULL, "model": WHOLE, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "olmo-lora-tp2-sp-selective": {
        **{"model": OLMO, "lora": SEVEN, "topology": {"tp_size": 2, "sequence_parallel": True}},
        "recompute": "selective",
    },
    "olmo-full-pp2": {**FULL, "model": OLMO, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "scaled-lora-tp2-sp": {
        **{"model": SCALED, "lora": SEVEN, "topology": {"tp_size": 2, "sequence_parallel": True}},
    },
    "scaled-full": {**FULL, "model": SCALED},
    "growing-lora-tp2": {"model": GROWING, "topology": {"tp_size": 2}},
    "seed-full-dropout": {**FULL, "model": SEED},
    "unturned-lora-pp2": {"model": UNTURNED, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "sinks-lora-tp2-sp": {
        **{"model": SINKS, "lora": EXPERT_LORA, "topology": {"tp_size": 2, "sequence_parallel": True}},
    },
    "sinks-lora-packed-recompute": {"model": SINKS, "recompute": "full", "collate": "pack"},
    "sinks-lora-nf4": {"model": replace(SINKS, base_format="nf4"), "lora": EXPERT_LORA},
    "sinks-lora-mxfp4-tp2": {
        **{"model": replace(SINKS, base_format="mxfp4"), "lora": EXPERT_LORA, "topology": {"tp_size": 2}},
    },
    "sinks-full-pp2": {**FULL, "model": SINKS, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "sinks-full-dp2-stage3": {**FULL, "model": SINKS, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "delta-lora": {"model": DELTA, "lora": LoraConfig(rank=4, target_modules=["all"])},
    "delta-lora-tp2-sp": {
        **{"model": DELTA, "lora": EXPERT_LORA, "topology": {"tp_size": 2, "sequence_parallel": True}},
    },
    "delta-lora-packed-recompute": {"model": DELTA, "recompute": "full", "collate": "pack"},
    "delta-lora-nf4-tp2": {
        **{"model": replace(DELTA, base_format="nf4"), "topology": {"tp_size": 2}, "recompute": "selective"},
        "lora": LoraConfig(rank=4, target_modules=["in_proj_qkvz", "out_proj"]),
    },
    "delta-full-pp2": {**FULL, "model": DELTA, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "delta-full-dp2-stage3": {**FULL, "model": DELTA, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "experts-full-dp2-stage3": {**FULL, "model": EXPERTS, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "full-dp2-stage3": {**FULL, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "llama-full-dp2-stage3": {**FULL, "model": LLAMA, "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=3)},
    "lora-pp2": {"topology": {"pp_size": 2}, "num_microbatches": 4},
    "full-pp2-recompute": {**FULL, "topology": {"pp_size": 2}, "num_microbatches": 4, "recompute": "full"},
    "llama-lora-packed": {"model": LLAMA, "lora": SEVEN, "collate": "pack"},
    "llama-lora-tp2-sp": {"model": LLAMA, "lora": SEVEN, "topology": {"tp_size": 2, "sequence_parallel": True}},
    "llama-lora-recompute": {"model": LLAMA, "recompute": "full"},
    "llama-full-pp2": {**FULL, "model": LLAMA, "topology": {"pp_size": 2}, "num_microbatches": 4},
    "llama-full-bf16": {**FULL, "model": LLAMA, "dtype": "bf16", "recompute": "selective"},
    "qwen3-lora": {"model": replace(LLAMA, name="qwen3", family="qwen3", head_size=48)},
    "opt-lora": {"model": replace(MODEL, name="opt", family="opt")},
    "lora-nf4": {"model": replace(MODEL, base_format="nf4")},
    "lora-nf4-double-tp2-sp-recompute": {
        "model": replace(MODEL, base_format="nf4_double"),
        "topology": {"tp_size": 2, "sequence_parallel": True},
        "recompute": "full",
    },
    "lora-nf4-double-all-dp2-stage2-bf16": {
        "model": replace(MODEL, base_format="nf4_double"),
        "topology": {"dp_size": 2},
        "zero": ZeroConfig(stage=2),
        "lora": ALL,
        "dtype": "bf16",
    },
    "lora-fp8-pp2": {
        "model": replace(MODEL, base_format="fp8"),
        "topology": {"pp_size": 2},
        "num_microbatches": 4,
    },
    "bitfit-tp2-sp": {"method": "bitfit", "topology": {"tp_size": 2, "sequence_parallel": True}},
    "adapter_h-tp2-sp": {"method": "adapter_h", "topology": {"tp_size": 2, "sequence_parallel": True}},
    "adapter_h-pp2-recompute": {
        **{"method": "adapter_h", "topology": {"pp_size": 2}, "num_microbatches": 4, "recompute": "full"},
    },
    "adapter_l": {"method": "adapter_l"},
    "adapter_l-dp2-stage2": {"method": "adapter_l", "topology": {"dp_size": 2}, "zero": ZeroConfig(stage=2)},
    "prefix_layer-tp2-sp-packed": {
        **{"method": "prefix_layer", "topology": {"tp_size": 2, "sequence_parallel": True}, "collate": "pack"},
    },
    "lora_prefix_embed-pp2-recompute": {
        **{"method": "lora_prefix_embed", "topology": {"pp_size": 2}, "num_microbatches": 4, "recompute": "full"},
    },
    "lora-tp2-pp2": {"topology": {"tp_size": 2, "pp_size": 2, "sequence_parallel": True}, "num_microbatches": 3},
}
