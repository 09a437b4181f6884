"""A run's whole configuration and the rules between its parts; standard library only.

The larger parts have files of their own beside this one, `NAME_config.py`; everything is imported from here.
"""

from dataclasses import dataclass, field

from lora_dist.base_format import check_blocks, check_frozen
from lora_dist.base_shapes import list_stages
from lora_dist.bench_config import CONTENDERS as CONTENDERS
from lora_dist.bench_config import OUR_CONTENDERS as OUR_CONTENDERS
from lora_dist.bench_config import BenchConfig as BenchConfig
from lora_dist.bottleneck_config import BOTTLENECK_METHODS, BottleneckConfig
from lora_dist.context_checks import check_context_parallel, check_row_length
from lora_dist.data_config import FILE_FORMATS as FILE_FORMATS
from lora_dist.data_config import DataConfig as DataConfig
from lora_dist.long_rows import check_long_rows
from lora_dist.loop_config import LoopConfig as LoopConfig
from lora_dist.loop_config import OptimConfig as OptimConfig
from lora_dist.lora_config import LoraConfig as LoraConfig
from lora_dist.model_config import ModelConfig as ModelConfig
from lora_dist.plan_config import RECOMPUTE as RECOMPUTE
from lora_dist.plan_config import HardwareConfig as HardwareConfig
from lora_dist.plan_config import PlanConfig as PlanConfig
from lora_dist.prefix_config import LORA_PREFIX_METHODS, PREFIX_METHODS
from lora_dist.prefix_config import PrefixConfig as PrefixConfig
from lora_dist.refusals import require, require_one_of
from lora_dist.saved_modules import check_trained_base
from lora_dist.topology_config import TopologyConfig as TopologyConfig
from lora_dist.topology_config import ZeroConfig as ZeroConfig
from lora_dist.topology_config import compute_dp_size as compute_dp_size


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    """Where metrics go besides the run directory."""

    backend: str = "wandb"
    """wandb (online with a key, offline without) or none."""
    project: str = "lora_dist"
    entity: str | None = None
    run_id: str | None = None
    """W&B run to continue; null starts a new one, or continues the one named in a resumed run directory."""
    init_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        require_one_of("track.backend", self.backend, ("wandb", "none"))
        timeout = self.init_timeout_s
        require(0 < timeout < float("inf"), f"track.init_timeout_s={timeout} must be positive and finite")


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """What `lora-dist compare` runs side by side."""

    methods: list[str] = field(default_factory=lambda: ["lora", "full"])
    lr: dict[str, float] = field(default_factory=dict)
    """Learning rate of a method in place of optim.lr."""

    def __post_init__(self) -> None:
        for method, lr in self.lr.items():
            require(0 < lr < float("inf"), f"compare.lr.{method}={lr} must be positive and finite")


_SEQ_LEN_OF_BLOCKS = 2048
METHODS = ("lora", "full", "bitfit", *BOTTLENECK_METHODS, *PREFIX_METHODS)
LORA_METHODS = ("lora", *LORA_PREFIX_METHODS)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig
    method: str
    """What trains: lora, full, or another of the paper's baselines: bitfit, adapter_h, adapter_l, prefix_embed,
    prefix_layer, and LoRA beside the last two, lora_prefix_embed and lora_prefix_layer."""
    lora: LoraConfig
    topology: TopologyConfig
    zero: ZeroConfig
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    track: TrackConfig
    compare: CompareConfig
    bench: BenchConfig
    run_dir: str
    resume: str = "none"
    """none starts fresh, auto continues where there is a checkpoint, must refuses to start without one."""
    device: str = "auto"
    dtype: str = "fp32"
    """Of the base weights and activations; adapters and optimizer state are always fp32."""
    compile: bool = False
    """Make each chain of elementwise work (norms, gates, rotations, dropout, softmax) one kernel with torch.compile."""
    cuda_graphs: bool = False
    """Record a microbatch's forward and backward pass as a CUDA graph, which the GPU repeats without Python."""
    packed_attention: str = "auto"
    """How packed examples attend within a row: blocks computes each by itself, one call an example, and nothing between
    two; mask computes whole rows in one call with what is between two left out. auto takes blocks on a CPU, and on a
    GPU from data.seq_len=2048 on, where rows are worth several calls; with cuda_graphs, whose calls are fixed, mask."""
    hardware: HardwareConfig | None = None
    """What `lora-dist plan` predicts for."""
    shrink: bool = False
    """No tp_size, cp_size, pp_size or dp_size above two, and of experts four at most, two of them for a token;
    debug=shrink sets it, with a model to match."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)

    def __post_init__(self) -> None:
        require_one_of("method", self.method, METHODS)
        require(self.run_dir != "", "run_dir is empty; give a directory, or run_dir=auto")
        require_one_of("resume", self.resume, ("none", "auto", "must"))
        require_one_of("device", self.device, ("auto", "cpu", "cuda"))
        require_one_of("dtype", self.dtype, ("fp32", "bf16", "fp16"))
        require_one_of("packed_attention", self.packed_attention, ("auto", "blocks", "mask"))
        _validate_model_shards(self.model, self.topology)
        _validate_method(self.method, self.lora, self.model)
        trains_qkv = self.method in ("full", "bitfit") or (self.method in LORA_METHODS and self.lora.bias != "none")
        require(
            not (trains_qkv and self.zero.stage > 0 and self.topology.tp_size > self.model.num_query_groups),
            f"topology.tp_size={self.topology.tp_size} keeps each of {self.model.num_query_groups} key-value heads on"
            " several ranks, which DeepSpeed's norm of trained weights or biases of q, k and v would count twice; use"
            " zero.stage=0 or a smaller tp_size, or leave method=full out with compare.methods=[lora]",
        )
        check_frozen(self.model.base_format, method=self.method, zero_stage=self.zero.stage)
        require(
            not (self.zero.stage == 3 and self.topology.pp_size > 1),
            f"zero.stage=3 needs topology.pp_size=1, got {self.topology.pp_size}; use zero.stage<=2 with pipelines",
        )
        require(
            not (self.method == "full" and self.dtype != "fp32" and self.zero.stage == 0),
            f"method=full with dtype={self.dtype} keeps fp32 masters in DeepSpeed's partitions;"
            " set zero.stage=1 or more",
        )
        _validate_data(self)
        if self.cuda_graphs:
            _validate_graphs(self)
        layers = self.loop.recompute_layers
        stage_layers = max(map(len, list_stages(self.model, self.topology.pp_size)))
        require(
            layers is None or 1 <= layers <= stage_layers,
            f"loop.recompute_layers={layers} must lie between 1 and the {stage_layers} layers of a pipeline stage",
        )
        if self.slots is not None:
            self.slots.check_fits(self.data.seq_len)
            require(
                self.data.format not in ("chat", "text"),
                f"method={self.method} puts its positions around a pair's context, and data.format={self.data.format}"
                " has no pairs; use data.format=jsonl",
            )
        for key, methods in (("compare.methods", self.compare.methods), ("compare.lr", self.compare.lr)):
            for method in methods:
                require_one_of(key, method, METHODS)
        names = self.compare.methods
        require(
            0 < len(names) == len(set(names)),
            f"compare.methods={names} must name one method or more, each once",
        )

    def attends_in_blocks(self, *, on_gpu: bool) -> bool:
        """What packed_attention means there."""
        if self.topology.cp_size > 1:
            return True
        if self.packed_attention == "auto":
            return not self.cuda_graphs and (not on_gpu or self.data.seq_len >= _SEQ_LEN_OF_BLOCKS)
        return self.packed_attention == "blocks"

    @property
    def slots(self) -> PrefixConfig | None:
        """The positions that the method adds to every example; None where it adds none."""
        return self.prefix if self.method in PREFIX_METHODS else None


def _validate_data(config: RunConfig) -> None:
    """Rows that fit the model and its split sequence, and validations where a best one is kept."""
    require(
        config.data.seq_len <= config.model.max_position_embeddings,
        f"data.seq_len={config.data.seq_len} exceeds model.max_position_embeddings="
        f"{config.model.max_position_embeddings}; set data.seq_len to {config.model.max_position_embeddings} or less",
    )
    check_long_rows(config.model, num_positions=config.data.seq_len, pp_size=config.topology.pp_size)
    check_row_length(config.topology, config.data.seq_len, config.model.max_position_embeddings)
    if config.topology.cp_size > 1:
        check_context_parallel(
            config.model,
            config.topology,
            seq_len=config.data.seq_len,
            packed_attention=config.packed_attention,
            cuda_graphs=config.cuda_graphs,
        )
    require(
        not config.loop.keep_best or config.loop.validates_between,
        "loop.keep_best=true chooses between validations, and loop.eval_every=0; give the steps between them, or"
        " loop.eval_every_epochs",
    )
    require(
        not config.loop.keep_best or config.data.valid is not None or config.data.format == "fake",
        "loop.keep_best=true chooses by the validation loss, and data.valid is null; give data.valid=FILE",
    )


def _validate_graphs(config: RunConfig) -> None:
    """A recording repeats what it saw: no schedule of stages, no gathered weights, no generator's next numbers."""
    prefix = "cuda_graphs=true"
    require(config.topology.pp_size == 1, f"{prefix} needs topology.pp_size=1, got {config.topology.pp_size}")
    require(config.zero.stage < 3, f"{prefix} needs zero.stage<=2, got {config.zero.stage}")
    require(
        config.packed_attention != "blocks",
        f"{prefix} needs packed_attention=mask: the calls of blocks are as many as a microbatch has examples",
    )
    require(config.loop.recompute == "none", f"{prefix} needs loop.recompute=none, got {config.loop.recompute}")
    require(
        config.model.num_experts is None,
        f"{prefix}: how many rows an expert of {config.model.name} sees is known as they come; leave it out",
    )
    require(
        not config.model.architecture.delta_layers,
        f"{prefix}: the layers of {config.model.name} go through each packed example by itself, and every microbatch"
        " has others; leave it out",
    )
    for key in ("hidden_dropout", "attention_dropout"):
        value = getattr(config.model, key)
        require(value == 0, f"{prefix} needs model.{key}=0, got {value}; lora.dropout may be used")


def _validate_method(method: str, lora: LoraConfig, model: ModelConfig) -> None:
    """What a method can do on a base of this family and format."""
    require(
        method != "bitfit" or model.architecture.has_biases,
        f"method=bitfit trains biases, and model.family={model.family} has none; use method=lora",
    )
    trains_all_biases = method == "bitfit" or (method in LORA_METHODS and lora.bias == "all")
    require(
        not (trains_all_biases and model.architecture.experts and model.architecture.linear_biases),
        f"{'method=bitfit' if method == 'bitfit' else 'lora.bias=all'} trains every bias, but those of the experts of"
        f" model.family={model.family} train with method=full alone; use method=lora with lora.bias=lora_only or none",
    )
    if method not in LORA_METHODS:
        return
    require(
        method == "lora" or lora.has_factors_alone,
        f"method={method} trains LoRA's factors and prefix vectors alone; leave lora.bias, modules_to_save, init and"
        " use_dora as they are",
    )
    require(
        lora.bias == "none" or model.architecture.has_biases,
        f"lora.bias={lora.bias}: model.family={model.family} has no biases; set lora.bias=none",
    )
    check_trained_base(lora, model)
    require(
        lora.init != "pissa" or model.base_format == "native",
        f"lora.init=pissa takes its part out of the base's own weights; model.base_format={model.base_format} has"
        " rounded them, use native",
    )


def _validate_model_shards(model: ModelConfig, topology: TopologyConfig) -> None:
    tp_size, pp_size = topology.tp_size, topology.pp_size
    for key in ("num_heads", "delta_key_heads", "ffn_hidden_size", "dense_ffn_size", "shared_ffn_size"):
        size = getattr(model, key)
        require(
            size is None or size % tp_size == 0,
            f"tp {tp_size} does not divide {key} {size}; choose a divisor for topology.tp_size",
        )
    num_groups = model.num_query_groups
    require(
        num_groups % tp_size == 0 or tp_size % num_groups == 0,
        f"tp {tp_size} neither divides num_kv_heads {num_groups} nor is a multiple of it; choose another"
        " topology.tp_size",
    )
    require(
        pp_size <= model.num_layers,
        f"pp {pp_size} exceeds num_layers {model.num_layers}; give each stage a layer: lower topology.pp_size",
    )
    check_blocks(model.base_format, model.whole_sizes)
    check_blocks(model.base_format, model.split_sizes, tp_size=tp_size)


def compute_num_microbatches(loop: LoopConfig, dp_size: int) -> int:
    """Forward passes of one replica in one step; ValueError when the batch sizes do not divide."""
    rows_per_pass = loop.micro_batch_size * dp_size
    global_batch_size = loop.global_batch_size or rows_per_pass
    require(
        global_batch_size % rows_per_pass == 0,
        f"loop.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {loop.micro_batch_size}"
        f" x dp {dp_size} = {rows_per_pass}",
    )
    return global_batch_size // rows_per_pass
