"""What the verbs that keep, move and merge adapters are told; standard library only."""

from dataclasses import dataclass, field

from lora_dist.base_format import check_blocks
from lora_dist.config import ModelConfig, TopologyConfig
from lora_dist.context_checks import refuse_context_parallel
from lora_dist.refusals import require_one_of

EXPORT_FORMATS = ("peft", "peft_split", "loralib", "bridge", "hf_merged")
IMPORT_FORMATS = ("peft", "loralib")


@dataclass(kw_only=True, slots=True)
class ListConfig:
    """`lora-dist adapters`"""

    directory: str = "runs"
    """Looked through with everything below it."""


@dataclass(kw_only=True, slots=True)
class BaseConfig:
    """The base model that an adapter belongs to."""

    model: ModelConfig
    seed: int = 0
    """Draws the base where the model names no checkpoint; loop.seed of the run that trained."""

    @property
    def reads_base(self) -> bool:
        """False where the verb, told what it is told, needs no model."""
        return True


@dataclass(kw_only=True, slots=True)
class LiveConfig(BaseConfig):
    """A base model in shards."""

    topology: TopologyConfig
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str | None = None
    """fp32, bf16 or fp16, in which the base computes and merged weights are written; null: its checkpoint's."""

    def __post_init__(self) -> None:
        require_one_of("device", self.device, ("auto", "cpu", "cuda"))
        require_one_of("dtype", self.dtype, (None, "fp32", "bf16", "fp16"))
        model = self.model
        check_blocks(model.base_format, model.split_sizes, tp_size=self.topology.tp_size)
        refuse_context_parallel(self.topology, "nothing is trained here")


@dataclass(kw_only=True, slots=True)
class MergeConfig(LiveConfig):
    """`lora-dist merge`"""

    adapter: str
    """Directory of the adapter."""
    output: str
    """New directory of a whole Hugging Face checkpoint, in dtype."""


@dataclass(kw_only=True, slots=True)
class ExportConfig(LiveConfig):
    """`lora-dist export`"""

    adapter: str
    """Directory of the adapter."""
    output: str
    """New directory."""
    format: str = "peft"
    """peft (as PEFT has it on the base: GPT-2's fused c_attn, else one a projection), peft_split (one a projection
    always), loralib, bridge, or hf_merged."""

    def __post_init__(self) -> None:
        LiveConfig.__post_init__(self)
        require_one_of("format", self.format, EXPORT_FORMATS)
        if self.format != "hf_merged" and self.topology.num_processes > 1:
            raise ValueError(f"topology: format={self.format} reads and writes files alone; use topology=single")


@dataclass(kw_only=True, slots=True)
class ImportConfig(BaseConfig):
    """`lora-dist import`"""

    source: str
    """A PEFT adapter's directory, or the file of a loralib state dict (.pt, .bin or .safetensors)."""
    output: str
    """New directory of the store."""
    format: str = "peft"
    """peft or loralib."""
    task_name: str = "imported"
    """Name that `lora-dist adapters` shows."""
    alpha: float | None = None
    """Of a loralib file, which does not say it; null means each module's as the lora_settings.json beside it has it."""
    fused_targets: list[str] | None = None
    """loralib's enable_lora: what a MergedLinear adapts where it adapts two or one of q, k, v; null means what the
    lora_settings.json beside it says, or q_proj and v_proj."""
    drop: list[str] = field(default_factory=list)
    """Regular expressions over the source's keys that are left out, e.g. a classifier's."""

    def __post_init__(self) -> None:
        require_one_of("format", self.format, IMPORT_FORMATS)
        if self.alpha is not None and self.format != "loralib":
            raise ValueError(f"alpha={self.alpha}: format={self.format}: alpha is in the file already; leave it out")


@dataclass(kw_only=True, slots=True)
class SwitchConfig(LiveConfig):
    """`lora-dist switch`"""

    adapters: list[str]
    """Directories, merged one after the other into the same base in place."""
    batch_size: int = 1
    """Rows of the forward pass that the switch is compared with."""
    seq_len: int = 128
    num_repeats: int = 5
    """Times each is measured; the median counts."""

    def __post_init__(self) -> None:
        LiveConfig.__post_init__(self)
        if len(self.adapters) < 2:
            raise ValueError(f"adapters={self.adapters}: name two or more, adapters=[DIR,DIR]")
        if self.topology.pp_size > 1:
            raise ValueError(f"topology.pp_size={self.topology.pp_size}: the forward pass is timed on one stage; use 1")
        most = self.model.max_position_embeddings
        if self.seq_len > most:
            remedy = f"set seq_len to {most} or less"
            raise ValueError(f"seq_len={self.seq_len} exceeds model.max_position_embeddings={most}; {remedy}")
        for key in ("batch_size", "seq_len", "num_repeats"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")


@dataclass(kw_only=True, slots=True)
class AnalyseConfig(LiveConfig):
    """`lora-dist analyse`"""

    adapters: list[str]
    """Directories of runs or of their adapters; every pair is compared."""
    output: str
    """New directory of analysis.json and the heat maps."""
    layers: list[str] | None = None
    """Zero-based layers to look at, numbers or ranges: [0,10-11]; null means all."""

    def __post_init__(self) -> None:
        LiveConfig.__post_init__(self)
        if not self.adapters or len(set(self.adapters)) != len(self.adapters):
            raise ValueError(f"adapters={self.adapters}: name one or more, each once, adapters=[DIR,DIR]")
