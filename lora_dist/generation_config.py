"""How text is generated, and what `lora-dist generate` is told; standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_dist.adapter_config import LiveConfig
from lora_dist.config import FILE_FORMATS, ModelConfig
from lora_dist.data_config import SPLIT_FORMATS, require_split
from lora_dist.refusals import require, require_one_of, require_seed

EARLY_STOPPING = ("heuristic", "when_full", "exhaustive")
_MOST_PENALTY = 20
"""The power of any model's context that a float holds."""
CONTEXT_FORMATS = ("auto", "text", *FILE_FORMATS)


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How tokens are chosen: greedily, drawn (temperature > 0), or by beam search (num_beams > 1)."""

    max_new_tokens: int = 64
    """Most tokens after each context; context and new tokens must fit into model.max_position_embeddings."""
    batch_size: int = 8
    """Contexts in one forward pass of one replica; a beam search runs num_beams rows for each."""
    num_beams: int = 1
    """Hypotheses kept side by side; 1 means no beam search. The paper's E2E results use 10."""
    length_penalty: float = 1.0
    """A hypothesis of n tokens scores its log-probability / n^length_penalty. The paper's E2E results use 0.9."""
    early_stopping: str = "heuristic"
    """A beam search of a row ends when its best running hypothesis, at its present length, cannot beat the worst
    finished one (heuristic; transformers' False), when num_beams have finished (when_full; True), or when none could
    at the greatest length either (exhaustive; never)."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens comes twice; 0 allows it. The paper's E2E results use 4."""
    ngrams_in_context: bool = True
    """Count those of the context too, as transformers does; false counts the output's alone, as the paper's decoder."""
    temperature: float = 0.0
    """Logits are divided by it before a token is drawn; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among the so many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities add up to this; 1 means all."""
    seed: int = 0
    """With a context's place in the file it fixes what is drawn, the same at every topology and batch size."""

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "batch_size", "num_beams"):
            require(getattr(self, key) >= 1, f"generate.{key}={getattr(self, key)} must be at least 1")
        for key in ("no_repeat_ngram_size", "temperature", "top_k"):
            require(getattr(self, key) >= 0, f"generate.{key}={getattr(self, key)} must not be negative")
        require_seed("generate.seed", self.seed)
        require(
            abs(self.length_penalty) <= _MOST_PENALTY,
            f"generate.length_penalty={self.length_penalty} must lie between -{_MOST_PENALTY} and {_MOST_PENALTY}",
        )
        require(0.0 < self.top_p <= 1.0, f"generate.top_p={self.top_p} must lie in (0, 1]")
        require_one_of("generate.early_stopping", self.early_stopping, EARLY_STOPPING)
        require(
            not (self.num_beams > 1 and self.temperature > 0),
            f"generate.num_beams={self.num_beams} searches and generate.temperature={self.temperature} draws;"
            " set temperature=0 or num_beams=1",
        )
        for key, off in (("top_k", 0), ("top_p", 1.0)):
            require(
                self.temperature > 0 or getattr(self, key) == off,
                f"generate.{key}={getattr(self, key)} has no effect without drawing; set generate.temperature above 0",
            )


@dataclass(kw_only=True, slots=True)
class GenerateOptions(GenerationConfig):
    """What goes in and where the texts go."""

    prompt: str | None = None
    """One context, in place of `input`."""
    input: str | None = None
    """File of contexts."""
    format: str = "auto"
    """text (a context a line), jsonl (`context`, and `adapter` where rows choose one), chat (jsonl with `messages` that
    await an answer) or any other data.format with files, whose targets are left out; GLUE's test files have none. auto
    takes .jsonl for jsonl, .csv for e2e_csv and other files for e2e_text where the first line holds `||`, else for
    text; not .json and .tsv."""
    context_fields: list[str] = field(default_factory=lambda: ["context"])
    """Of format jsonl: as data.context_fields."""
    split: str | None = None
    """Part of the file, where it holds several (clinc150)."""
    output: str | None = None
    """File of JSON lines, {context, text} a context in the order of the input; null prints them. The same command
    goes on where an earlier one was ended, and generates nothing again."""
    chat: bool | None = None
    """Ask through the model's chat template: each context is a user's message. null asks as the adapter, or the model
    in model.checkpoint, was trained by its run, and in format chat always so."""
    system: str | None = None
    """The system message before a question that has none; null means the run's data.system, where chat is null too."""
    end_context: bool | None = None
    """Put the end token after each context, which asks for the target as in training on pairs; false continues the
    text, as null does where the run has trained on running text. A chat template asks by itself."""
    merge: bool = False
    """Merge the adapter into the shards first: a token then takes what it takes with the base alone."""

    def __post_init__(self) -> None:
        GenerationConfig.__post_init__(self)
        require_one_of("generate.format", self.format, CONTEXT_FORMATS)
        require(
            self.format != "chat" or self.chat is not False,
            "generate.format=chat has conversations, got generate.chat=false; leave it out",
        )
        require(
            self.context_fields == ["context"] or self.format == "jsonl",
            f"generate.context_fields={self.context_fields}: generate.format={self.format} does not read them; set"
            " generate.format=jsonl",
        )
        require_split("generate.split", self.split, self.format, example="test")
        require(
            self.split is None or self.format in SPLIT_FORMATS,
            f"generate.split={self.split}: a file in format {self.format} holds one split; leave it out",
        )


@dataclass(kw_only=True, slots=True)
class GenerateConfig(LiveConfig):
    """`lora-dist generate`"""

    adapter: str | None = None
    """Directory of an adapter, or of the run that wrote it; null and no `adapters` uses the base alone."""
    adapters: list[str] = field(default_factory=list)
    """Several of them, mixed in one batch: each row of a jsonl input names its own in `adapter`, or null."""
    generate: GenerateOptions = field(default_factory=GenerateOptions)

    def __post_init__(self) -> None:
        LiveConfig.__post_init__(self)
        options = self.generate
        require(not (self.adapter and self.adapters), "adapter and adapters are both set; use one of them")
        require(
            (options.prompt is None) != (options.input is None),
            "give generate.input=FILE or generate.prompt='...', one of them",
        )
        require(
            not (options.merge and self.adapter is None),
            "generate.merge=true merges one adapter; give adapter=DIR",
        )
        require(
            not self.topology.sequence_parallel,
            "topology.sequence_parallel=true: generation runs one position at a time, which cannot be split; set false",
        )
        require(
            options.max_new_tokens < self.model.max_position_embeddings,
            f"generate.max_new_tokens={options.max_new_tokens} leaves no room for a context in"
            f" model.max_position_embeddings={self.model.max_position_embeddings};"
            f" shorten it to {self.model.max_position_embeddings - 1} or less",
        )

    @property
    def directories(self) -> list[str]:
        """Of the adapters, as given."""
        return self.adapters or ([] if self.adapter is None else [self.adapter])


def check_room(lengths: Sequence[int], max_new_tokens: int, model: ModelConfig) -> None:
    """ValueError, naming both, where a context of `lengths` and its new tokens exceed the model's positions."""
    for number, length in enumerate(lengths, 1):
        most = model.max_position_embeddings - length
        remedy = f", or set generate.max_new_tokens to {most} or less" if most >= 1 else ""
        require(length > 0, f"context {number} has no token; generation needs at least one to start from")
        require(
            max_new_tokens <= most,
            f"context {number} has {length} tokens, with generate.max_new_tokens={max_new_tokens}"
            f" {length + max_new_tokens}, but model.max_position_embeddings={model.max_position_embeddings};"
            f" shorten the context{remedy}",
        )
