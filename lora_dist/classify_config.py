"""What `lora-dist classify` is told: an encoder, a task with labels, and how to train; standard library only."""

from dataclasses import dataclass, field

from lora_dist.config import LoopConfig, LoraConfig, OptimConfig, TopologyConfig, TrackConfig, ZeroConfig
from lora_dist.context_checks import refuse_context_parallel
from lora_dist.data_config import require_split
from lora_dist.refusals import require, require_one_of
from lora_dist.task_config import TaskConfig

ENCODER_METHODS = ("lora", "full", "bitfit")
ENCODER_METRICS = ("accuracy", "accuracy_f1", "matthews", "correlation")


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """The base: a RoBERTa, DeBERTa or DeBERTa-v2 as Hugging Face stores it."""

    name: str
    """Shown in reports."""
    checkpoint: str
    """Directory with config.json, safetensors and the tokenizer's files."""
    seq_len: int = 512
    """Tokens of an input at most; the longer of two sentences is cut first."""
    classifier_dropout: float | None = None
    """Of the head; null leaves what the checkpoint says."""
    method: str = "lora"
    """What trains besides the head: lora, full, or bitfit (every bias)."""

    def __post_init__(self) -> None:
        require_one_of("encoder.method", self.method, ENCODER_METHODS)
        require(self.seq_len >= 4, f"encoder.seq_len={self.seq_len} must be at least 4")


@dataclass(kw_only=True, slots=True)
class ClassifyConfig:
    """`lora-dist classify`: train a head and what `method` trains, then score; without `train`, score alone."""

    encoder: EncoderConfig
    task: TaskConfig
    """task.references is scored, and validated on while training."""
    run_dir: str
    """Directory to write to."""
    train: str | None = None
    """Training file, in the format of task.references; null scores `adapter`, or the checkpoint's own head."""
    train_split: str | None = None
    """Part of `train`, where it holds several (clinc150)."""
    on_bad_row: str = "error"
    """Of `train`: error stops at the first bad row and names it; skip leaves bad rows out and counts them."""
    predict: str | None = None
    """File to be answered as well, in the format of task.references; labels in it, if any, are not looked at. The
    answers go to predictions-TASK.jsonl, and GLUE's also to predictions-TASK.tsv in the form that GLUE takes."""
    adapter: str | None = None
    """What training starts from, or what is scored: a run of this verb, a directory that PEFT loads, or a state dict
    of loralib, whose scaling lora.alpha and lora.rank say."""
    adapter_head: bool = True
    """Take the head of `adapter` too; false where it is of another task."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8, alpha=8.0))
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    resume: str = "none"
    """none starts fresh, auto continues where there is a checkpoint, must refuses to start without one."""
    device: str = "auto"
    dtype: str = "fp32"
    """Of the base weights and activations; adapters and the head are always fp32."""

    @property
    def method(self) -> str:
        return self.encoder.method

    def __post_init__(self) -> None:
        require_one_of("task.metric", self.task.metric, ENCODER_METRICS)
        if self.train is not None:
            require_split("train_split", self.train_split, self.task.format, example="train")
        require_one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        require(
            self.train is not None or self.on_bad_row == "error",
            f"on_bad_row={self.on_bad_row} is of `train`, which is not set; leave it out",
        )
        require_one_of("resume", self.resume, ("none", "auto", "must"))
        require_one_of("device", self.device, ("auto", "cpu", "cuda"))
        require_one_of("dtype", self.dtype, ("fp32", "bf16", "fp16"))
        require(
            not self.loop.keep_best or self.loop.validates_between,
            "loop.keep_best=true chooses between validations, and loop.eval_every=0; give the steps between them, or"
            " loop.eval_every_epochs",
        )
        self._check_topology()
        self._check_lora()
        require(
            self.method == "lora" or self.dtype == "fp32",
            f"encoder.method={self.method} trains weights of the base in their own dtype; set dtype=fp32,"
            f" got {self.dtype}",
        )

    def _check_topology(self) -> None:
        tp_size, pp_size = self.topology.tp_size, self.topology.pp_size
        refuse_context_parallel(self.topology, "an encoder's are whole")
        require(
            (tp_size, pp_size) == (1, 1),
            f"topology: an encoder is whole on every process, got tp {tp_size} pp {pp_size}; use topology.dp_size and"
            " zero.stage=3, which partitions its weights",
        )
        require(self.loop.recompute == "none", f"loop.recompute={self.loop.recompute}: an encoder keeps activations")

    def _check_lora(self) -> None:
        lora = self.lora
        plain = lora.dropout == 0 and lora.bias == "none" and lora.init == "gaussian"
        require(
            plain and not lora.use_dora and not lora.modules_to_save,
            "lora.dropout, lora.bias, lora.init, lora.use_dora and lora.modules_to_save are for decoders; an encoder"
            " takes factors alone, and its head trains whole",
        )
