"""A small model, data and one training step on any topology, for the tests that compare topologies.

Every function here runs inside a worker of `processes.run_distributed`, on a process group that is already open.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lora_dist.batch import Batch
from lora_dist.bottleneck.spec import PLACES, build_bottleneck_specs
from lora_dist.bottleneck_config import BottleneckConfig
from lora_dist.config import LoraConfig, ModelConfig, TopologyConfig
from lora_dist.gradients import sum_tied_embedding_gradients, sum_tp_partial_gradients
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.factors import derive_seed
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.adapters import apply_lora
from lora_dist.mcore.base_parameters import describe_base_parameters, initialize_base
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.indexer_weights import open_indexers
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.prefixes import put_prefixes
from lora_dist.mcore.schedule import forward_backward
from lora_dist.methods.bitfit import apply_bitfit
from lora_dist.parameters import TrainableParameter
from lora_dist.prefix.spec import build_prefix_specs
from lora_dist.prefix_config import PREFIX_METHODS, PrefixConfig
from lora_dist.topology import Topology
from lora_dist.whole import cut_shard, join_shards

MODEL = ModelConfig(
    name="toy",
    num_layers=4,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=64,
    vocab_size=101,
    max_position_embeddings=32,
)
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SEVEN_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_ROWS, SEQ_LEN = 4, 16
BLOCKS = (9, SEQ_LEN - 9)
"""The two examples of a packed row."""
CPU = torch.device("cpu")
PREFIX = PrefixConfig(num_prefix=2, num_infix=2)
SLOTS = [1, 2, 0, 3, 4, 0, 0, 0, 0, 1, 2, 0, 3, 4, 0, 0]
"""Of the two packed examples of a row; no method but those with prefixes looks at them."""


@dataclass(kw_only=True)
class Case:
    """One method on one topology."""

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    dp_size: int = 1
    sequence_parallel: bool = False
    method: str = "lora"
    recompute: str = "none"
    recompute_layers: int | None = None
    label_smoothing: float = 0.0
    dtype: torch.dtype = torch.float64
    model: ModelConfig | None = None
    """None is MODEL."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=3, target_modules=ALL_TARGETS, bias="all"))

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.pp_size * self.dp_size

    def __str__(self) -> str:
        sequence = "-sp" if self.sequence_parallel else ""
        layers = "" if self.recompute_layers is None else str(self.recompute_layers)
        family = "" if self.model is None else f"{self.model.family}-"
        context = f"cp{self.cp_size}-" if self.cp_size > 1 else ""
        sizes = f"tp{self.tp_size}-{context}pp{self.pp_size}-dp{self.dp_size}"
        return f"{family}{self.method}-{sizes}{sequence}-{self.recompute}{layers}"


def build_case(case: Case, device: torch.device = CPU) -> tuple[ShardedGpt, list[TrainableParameter], Topology]:
    """The toy model under the case's method, with B (and every bias) drawn so that nothing is zero."""
    config = TopologyConfig(
        tp_size=case.tp_size,
        cp_size=case.cp_size,
        pp_size=case.pp_size,
        dp_size=case.dp_size,
        sequence_parallel=case.sequence_parallel,
    )
    topology = build_topology(config, device=device, local_rank=dist.get_rank(), seed=1)
    clock, model = DropoutClock(), case.model or MODEL
    gpt = build_model(
        model,
        topology,
        dtype=case.dtype,
        clock=clock,
        recompute=case.recompute,
        num_recomputed=case.recompute_layers,
    )
    gpt.label_smoothing = case.label_smoothing
    initialize_base(gpt, model, seed=0)
    open_indexers(gpt, SEQ_LEN)
    if case.method == "full":
        trainable = describe_base_parameters(gpt)
    elif case.method == "bitfit":
        trainable = apply_bitfit(gpt)
    elif case.method in PLACES:
        specs = build_bottleneck_specs(case.method, BottleneckConfig(size=3), model)
        trainable = apply_bottlenecks(gpt, specs, init_std=0.3, seed=0)
    elif case.method in ("prefix_embed", "prefix_layer"):
        gpt.requires_grad_(False)
        trainable = []
    else:
        specs = build_adapter_specs(case.lora, model)
        trainable = apply_lora(gpt, specs, bias=case.lora.bias, seed=0, modules=case.lora.modules_to_save)
    if case.method in PREFIX_METHODS:
        trainable += put_prefixes(gpt, build_prefix_specs(case.method, PREFIX, model), init_std=0.3, seed=0)
    for described in trainable:
        if case.dtype == torch.float64:
            described.parameter.data = described.parameter.data.double()
        if described.kind in ("lora_B", "bias") or described.name.endswith(("down_bias", "up_bias", "norm_bias")):
            fill(described, topology, std=0.1)
        if described.kind == "magnitude":
            fill(described, topology, std=0.03)
            described.parameter.data += 0.2
    return gpt, trainable, topology


def fill(described: TrainableParameter, topology: Topology, std: float) -> None:
    """Draw the whole tensor from its name and keep this rank's shard."""
    generator = torch.Generator().manual_seed(derive_seed("toy", described.name))
    whole = torch.randn(described.full_shape, generator=generator, dtype=torch.float64) * std
    described.parameter.data.copy_(cut_shard(whole, described, topology))


def build_batches(topology: Topology, *, seed: int = 5, packed: bool = True) -> list[Batch]:
    """Two microbatches of this replica, out of one global batch of NUM_ROWS rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, MODEL.vocab_size, (NUM_ROWS, SEQ_LEN + 1), generator=generator)
    loss_mask = torch.rand(NUM_ROWS, SEQ_LEN, generator=generator) > 0.4
    rows_per_pass = NUM_ROWS // 2 // topology.dp_size
    batches = []
    for microbatch in range(2):
        first = (microbatch * topology.dp_size + topology.dp_rank) * rows_per_pass
        rows = slice(first, first + rows_per_pass)
        batches.append(
            Batch(
                input_ids_BS=tokens[rows, :-1],
                labels_BS=tokens[rows, 1:],
                loss_mask_BS=loss_mask[rows],
                position_ids_BS=torch.arange(SEQ_LEN).expand(rows_per_pass, -1),
                row_blocks=(BLOCKS,) * rows_per_pass if packed else None,
                row_ids_B=torch.arange(NUM_ROWS)[rows],
                num_loss_tokens=int(loss_mask.sum()),
                num_tokens=NUM_ROWS * SEQ_LEN,
                slots_BS=torch.tensor(SLOTS).repeat(rows_per_pass, 1),
            )
        )
    return batches


def compute_gradients(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss and the whole gradients this process can see."""
    gpt, trainable, topology = build_case(case)
    loss, _ = forward_backward(gpt, build_batches(topology), seed=0, step=3, scale_loss=None)
    return loss, reduce_gradients(trainable, topology)


def reduce_gradients(trainable: Sequence[TrainableParameter], topology: Topology) -> dict[str, torch.Tensor]:
    """What the engine makes of the local gradients: summed where partial, averaged over DP, whole over TP."""
    sum_tp_partial_gradients(list(trainable), topology)
    sum_tied_embedding_gradients(list(trainable), topology)
    whole = {}
    for described in trainable:
        gradient = described.parameter.grad
        assert gradient is not None, described.name
        dist.all_reduce(gradient, group=topology.zero_group)
        whole[described.name] = gather_whole(gradient / topology.zero_size, described, topology)
    return whole


def gather_whole(local: torch.Tensor, described: TrainableParameter, topology: Topology) -> torch.Tensor:
    """The whole tensor out of its TP shards."""
    if described.shard_dim is None or topology.tp_size == 1:
        return local.narrow(0, 0, described.full_shape[0]).clone()
    parts = [torch.empty_like(local) for _ in range(topology.tp_size)]
    dist.all_gather(parts, local.contiguous(), group=topology.tp_group)
    return join_shards(parts, described).narrow(0, 0, described.full_shape[0]).clone()


def merge_results(results: list[tuple[float, dict[str, torch.Tensor]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """One process's view out of all: losses and replicated gradients must agree before they are believed."""
    loss, merged = results[0][0], {}
    for other_loss, gradients in results:
        assert other_loss == loss
        for name, gradient in gradients.items():
            if name in merged:
                torch.testing.assert_close(
                    gradient, merged[name], atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )
            merged[name] = gradient
    return loss, merged
