"""What `lora-dist evaluate` is told: a task, and outputs to score or a model to ask; standard library only."""

from dataclasses import dataclass, field

from lora_dist.adapter_config import LiveConfig
from lora_dist.generation_config import GenerationConfig
from lora_dist.refusals import require
from lora_dist.task_config import TaskConfig


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(LiveConfig):
    """`lora-dist evaluate`: of a file (`predictions`), of a trained adapter (`adapter`), or of a base alone."""

    task: TaskConfig
    predictions: str | None = None
    """Outputs, anyone's: a line each in the references' order, or .jsonl, .tsv or .csv with a column `prediction` (or
    `output`, in .jsonl also `text`) and, to be matched by context instead of order, `context` (or `mr`)."""
    adapter: str | None = None
    """Directory of an adapter, or of the run that wrote it: what it answers is scored."""
    base_alone: bool = False
    """Score what `model` answers without an adapter, e.g. a fine-tuned checkpoint in model.checkpoint."""
    generate: GenerationConfig = field(default_factory=GenerationConfig)
    """How texts are generated; tasks with labels take the most likely label instead."""
    merge: bool = False
    """Merge the adapter into the shards first; one with trained biases or modules, or DoRA's, is wherever the base is
    not quantised."""
    chat: bool | None = None
    """Ask through the model's chat template: each context is a user's message. null asks as the adapter, or the model
    in model.checkpoint, was trained by its run, and of task.format=chat always so."""
    system: str | None = None
    """The system message before a question that has none; null means the run's data.system, where chat is null too."""
    texts: str | None = None
    """File of what the model answers, JSON lines; null writes RUN/evaluate-TASK.jsonl, or ADAPTER.evaluate-TASK.jsonl
    where the adapter is no run's. The same command goes on where an earlier one was ended."""
    output: str | None = None
    """File of the scores in JSON; null writes PREDICTIONS.scores.json, or TEXTS.scores.json."""

    def __post_init__(self) -> None:
        LiveConfig.__post_init__(self)
        given = [self.predictions is not None, self.adapter is not None, self.base_alone]
        require(
            sum(given) == 1,
            f"{sum(given)} of predictions, adapter and base_alone are set; give predictions=FILE to score a file,"
            " adapter=RUN to score what a run answers, or base_alone=true",
        )
        require(
            self.predictions is None or self.topology.num_processes == 1,
            f"topology: predictions={self.predictions} is a file, which one process scores; use topology=single",
        )
        require(
            not self.base_alone or self.texts is not None,
            "base_alone=true has no run's directory to write to; give texts=FILE",
        )
        require(
            self.task.format != "chat" or self.chat is not False,
            "task.format=chat has conversations, got chat=false; leave it out",
        )
        require(
            not self.topology.sequence_parallel,
            "topology.sequence_parallel=true: generation runs one position at a time, which cannot be split; set false",
        )

    @property
    def reads_base(self) -> bool:
        return self.predictions is None
