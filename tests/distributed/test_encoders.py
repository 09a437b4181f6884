"""Encoders: logits and gradients against transformers and PEFT, topologies and ZeRO stages against one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from encoder_toy import FAMILIES, ROBERTA_BASE, write_encoder, write_rte, write_sst2
from peft import PeftModel
from processes import run_distributed
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    PretrainedConfig,
    RobertaConfig,
)

from lora_dist.checkpoint.listing import list_adapters
from lora_dist.classify_config import ClassifyConfig, EncoderConfig
from lora_dist.cli.main import main
from lora_dist.config import LoopConfig, LoraConfig, ModelConfig, OptimConfig, TopologyConfig, TrackConfig, ZeroConfig
from lora_dist.encoders.adapt import put_adapters
from lora_dist.encoders.examples import encode_examples, find_label_words, load_pairs
from lora_dist.encoders.job import Job, load_data, open_job, score_job, write
from lora_dist.encoders.model import FAMILIES as ENCODER_FAMILIES
from lora_dist.encoders.model import Encoder, open_encoder, read_family
from lora_dist.encoders.store import list_shards
from lora_dist.loop import TrainResult
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.parallel import open_topology
from lora_dist.task_config import TaskConfig

DATA = Path(__file__).parents[1] / "data"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def build_config(tmp_path: Path, family: str, *, method: str = "lora", **options: object) -> ClassifyConfig:
    checkpoint, train = tmp_path / family, tmp_path / "train.tsv"
    if not checkpoint.exists():
        write_encoder(checkpoint, family)
    if not train.exists():
        write_sst2(train, 48)
        write_sst2(tmp_path / "dev.tsv", 7)
    values: dict = {
        "encoder": EncoderConfig(name=family, checkpoint=str(checkpoint), seq_len=16, method=method),
        "task": TaskConfig(
            name="glue_sst2", format="glue_sst2", metric="accuracy", references=str(tmp_path / "dev.tsv")
        ),
        "run_dir": str(tmp_path / "run"),
        "train": str(train),
        "lora": LoraConfig(rank=3, alpha=6.0, target_modules=ALL),
        "optim": OptimConfig(lr=1e-2, schedule="constant", eps=1e-4),
        "loop": LoopConfig(micro_batch_size=2, global_batch_size=8, num_steps=3),
        "track": TrackConfig(backend="none"),
        "device": "cpu",
    }
    return ClassifyConfig(**{**values, **options})


def open_alone(config: ClassifyConfig, topology: object) -> Job:
    return open_job(config, topology, load_data(config))  # type: ignore[arg-type]


def set_b(job: Job) -> None:
    """B not zero, so that A has gradients and the logits the adapters."""
    for shard in list_shards(job.encoder).values():
        for number, spec in enumerate(shard.specs):
            _, b = shard.factors(spec)
            generator = torch.Generator().manual_seed(number)
            b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))


def train(config: ClassifyConfig) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """Losses of the steps, the validation loss, and what has been trained."""
    with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
        job = open_alone(config, topology)
        loader = job.loader(job.data.train)
        steps = range(config.loop.num_steps)
        losses = [job.engine.train_step(loader.batches_at(step), step=step, lr=1e-2).loss for step in steps]
        valid_loss = job.engine.evaluate(job.loader(job.data.scored).validation_batches())
        trained = {one.name: job.engine.zero.read_value(one)["value"] for one in job.engine.trainable}
        return losses, valid_loss, trained


@pytest.mark.parametrize("family", FAMILIES)
def test_without_training_it_is_transformers_model(family: str, tmp_path: Path) -> None:
    config = build_config(tmp_path, family)

    def compute() -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            head = {
                one.name: one.parameter.detach() for one in job.engine.trainable if not one.name.startswith("layers.")
            }
            batch = job.loader(job.data.train).batches_at(0)[0]
            return job.engine.model.eval()(**batch.inputs).logits.detach(), head, batch.inputs

    ((logits, head, inputs),) = run_distributed(compute, 1)
    plain = AutoModelForSequenceClassification.from_pretrained(config.encoder.checkpoint, num_labels=2)
    missing, unknown = plain.load_state_dict(head, strict=False)
    assert not unknown
    assert set(head) == {name for name, _ in plain.named_parameters()} - set(missing)
    torch.testing.assert_close(logits, plain.eval()(**inputs).logits, rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_dropout_can_be_set(family: str, tmp_path: Path) -> None:
    config = EncoderConfig(name=family, checkpoint=str(write_encoder(tmp_path, family)), classifier_dropout=0.25)
    model = open_encoder(config, num_labels=2, dtype=torch.float32, seed=0).model
    dropouts = [module.p for module in model.modules() if hasattr(module, "p")]
    assert dropouts.count(0.25) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_was_trained_and_has_the_same_logits_and_gradients(family: str, tmp_path: Path) -> None:
    config = build_config(tmp_path, family, zero=ZeroConfig(stage=0))  # whose masters are the parameters themselves

    def write_and_compute() -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            set_b(job)
            write(job, TrainResult(valid_loss_before=None, valid_loss_after=None, num_steps_done=0))
            batch = job.loader(job.data.train).batches_at(0)[0]
            logits = job.engine.model.eval()(**batch.inputs).logits
            torch.nn.functional.cross_entropy(logits, batch.labels_B.long()).backward()
            gradients = {one.name: one.parameter.grad for one in job.engine.trainable}
            return logits.detach(), gradients, {**batch.inputs, "labels": batch.labels_B.long()}

    ((logits, gradients, inputs),) = run_distributed(write_and_compute, 1)
    base = AutoModelForSequenceClassification.from_pretrained(config.encoder.checkpoint, num_labels=2)
    peft = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter", is_trainable=True).eval()
    output = peft(**inputs)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-6)
    output.loss.backward()
    theirs = {name: one.grad for name, one in peft.named_parameters() if one.grad is not None}
    (head,) = [name for name in theirs if name.endswith(("classifier.modules_to_save.default.dense.weight",))] or [
        name for name in theirs if name.endswith("classifier.modules_to_save.default.weight")
    ]
    mine = "classifier.dense.weight" if family == "roberta" else "classifier.weight"
    torch.testing.assert_close(gradients[mine], theirs[head], rtol=1e-4, atol=1e-7)
    for layer in range(2):
        (down,) = [name for name in theirs if f"layer.{layer}.output.dense.lora_A" in name]
        torch.testing.assert_close(gradients[f"layers.{layer}.down_proj.lora_A"], theirs[down], rtol=1e-4, atol=1e-7)
    if family != "deberta":  # where PEFT has one adapter on the fused projection
        for target, own in (("q_proj", "query"), ("k_proj", "key")):
            (name,) = [name for name in theirs if f"layer.1.attention.self.{own}" in name and "lora_B" in name]
            torch.testing.assert_close(gradients[f"layers.1.{target}.lora_B"], theirs[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "dp_size", "stage"),
    [("lora", 2, 0), ("lora", 4, 1), ("lora", 2, 2), ("lora", 2, 3), ("full", 2, 3), ("full", 2, 1), ("bitfit", 2, 1)],
)
def test_replicas_and_zero_stages_train_alike(method: str, dp_size: int, stage: int, tmp_path: Path) -> None:
    config = build_config(tmp_path, "roberta", method=method, zero=ZeroConfig(stage=0))
    ((losses, valid_loss, trained),) = run_distributed(train, 1, config)
    many = build_config(
        tmp_path, "roberta", method=method, zero=ZeroConfig(stage=stage), topology=TopologyConfig(dp_size=dp_size)
    )
    for other_losses, other_valid_loss, other in run_distributed(train, dp_size, many):
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert other_valid_loss == pytest.approx(valid_loss, rel=1e-5)
        for name, value in trained.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-5)
    assert len({f"{loss:.4f}" for loss in losses}) == 3


def call(words: list[str]) -> int:
    import os

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main(words)


def describe_command(tmp_path: Path, run: str, *words: str) -> list[str]:
    config = build_config(tmp_path, "roberta")
    return [
        *("classify", f"encoder.checkpoint={config.encoder.checkpoint}", "encoder.seq_len=16", "track=none"),
        *("task=glue_sst2", f"task.references={tmp_path / 'dev.tsv'}", "device=cpu", f"run_dir={tmp_path / run}"),
        *("loop.micro_batch_size=4", "loop.global_batch_size=16", "optim.lr=1e-2", "lora.target_modules=[all]", *words),
    ]


def test_a_run_trains_resumes_and_is_scored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_words = [f"train={tmp_path / 'train.tsv'}", "num_epochs=20", "warmup_ratio=0.1"]
    assert run_distributed(call, 1, describe_command(tmp_path, "whole", *train_words)) == [0]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["num_steps_done"] == 60
    assert summary["scores"]["accuracy"] == 100.0
    assert summary["num_trainable_parameters"] - summary["num_trained_of_head"] == 2 * 8 * (4 * 64 + 2 * 80)

    # two replicas lose their last checkpoint, and one process goes on from the one before
    part = [*train_words, "topology=dp2"]
    stop = describe_command(tmp_path, "part", *part, "loop.save_every=20")
    assert run_distributed(call, 2, stop) == [0, 0]
    newest = sorted((tmp_path / "part" / "checkpoints").iterdir())
    assert [path.name for path in newest] == ["step-000040", "step-000060"]
    for path in newest[-1].iterdir():
        path.unlink()
    newest[-1].rmdir()
    (tmp_path / "part" / "adapter" / "adapter_model.safetensors").unlink()
    again = describe_command(tmp_path, "part", *train_words, "topology=single", "zero=stage0", "resume=must")
    assert run_distributed(call, 1, again) == [0]
    other = json.loads((tmp_path / "part" / "summary.json").read_text())
    assert other["valid_loss_after"] == pytest.approx(summary["valid_loss_after"], rel=1e-4)

    rows = list_adapters(tmp_path / "whole")
    assert [(row.task, row.rank, row.targets, row.state) for row in rows] == [
        ("glue_sst2", "8", "lora q,k,v,o,up,down", "whole")
    ]
    words = ["evaluate", "task=glue_sst2", f"task.references={tmp_path / 'dev.tsv'}", f"adapter={tmp_path / 'whole'}"]
    assert run_distributed(call, 1, words) == [2]
    assert "is an encoder's; lora-dist classify adapter=" in capfd.readouterr().err

    scored = describe_command(tmp_path, "scored", f"adapter={tmp_path / 'whole'}")
    assert run_distributed(call, 1, scored) == [0]
    assert json.loads((tmp_path / "scored" / "summary.json").read_text())["scores"] == summary["scores"]


def test_a_whole_model_is_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    words = [f"train={tmp_path / 'train.tsv'}", "loop.num_steps=2", "encoder.method=full", "optim.lr=1e-3"]
    assert run_distributed(call, 1, describe_command(tmp_path, "full", *words)) == [0]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "full" / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_sentence_pairs_stay_two(tmp_path: Path) -> None:
    config = build_config(tmp_path, "roberta")
    task = TaskConfig(name="rte", format="glue_rte", metric="accuracy", references=str(write_rte(tmp_path / "r.tsv")))
    pairs = load_pairs("task.references", task.references, task, None)
    labels = find_label_words(task, pairs)
    tokenizer = AutoTokenizer.from_pretrained(config.encoder.checkpoint)
    first = encode_examples("task.references", task.references, pairs, labels, tokenizer, 16)[0]
    assert tokenizer.decode(first.inputs["input_ids"]) == "<s> the film was good </s> </s> it was good </s>"
    assert (labels.words, first.label) == (("entailment", "not_entailment"), 0.0)


def test_numbers_are_predicted_by_one_output(tmp_path: Path) -> None:
    lines = [
        "index\tsentence1\tsentence2\tscore",
        *(f"{n}\tit was {w}\ta film\t{n}.5" for n, w in enumerate(["good", "bad", "fine"])),
    ]
    (tmp_path / "stsb.tsv").write_text("\n".join(lines) + "\n")
    task = TaskConfig(name="glue_stsb", format="glue_stsb", metric="correlation", references=str(tmp_path / "stsb.tsv"))
    config = build_config(tmp_path, "roberta", task=task, train=str(tmp_path / "stsb.tsv"))

    def run() -> float:
        Path(config.run_dir).mkdir()
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            batches = job.loader(job.data.train).batches_at(0)
            for step in range(80):
                loss = job.engine.train_step(batches, step=step, lr=1e-2).loss
            score_job(job, {})
            return loss

    assert run_distributed(run, 1)[0] < 0.5
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "run" / "classify-glue_stsb.jsonl").read_text().splitlines()
    ]
    assert float(texts[0]) < float(texts[1]) < float(texts[2])


def test_the_authors_published_adapter_goes_on_training(tmp_path: Path) -> None:
    """Real tensors of the RoBERTa base they adapted to MNLI, at its size; layer 0's stand for the layers left out."""
    published = torch.load(DATA / "roberta_mnli_lora_part.pt", weights_only=True)
    layer = {name: tensor for name, tensor in published.items() if ".layer.0." in name}
    state = {name.replace(".0.", f".{n}.", 1): tensor for n in range(12) for name, tensor in layer.items()}
    state |= {name: tensor for name, tensor in published.items() if name.startswith("classifier.out_proj")}
    state |= {"classifier.dense.weight": torch.eye(768), "classifier.dense.bias": torch.zeros(768)}
    torch.save(state, tmp_path / "mnli.pt")
    write_encoder(tmp_path / "roberta", "roberta", ROBERTA_BASE)
    rows = [f"{n}\tthe film was good\tit was good\t{label}" for n, label in enumerate(["entailment", "neutral"])]
    (tmp_path / "mnli.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tgold_label", *rows]) + "\n")
    file = str(tmp_path / "mnli.tsv")
    config = build_config(
        tmp_path,
        "roberta",
        task=TaskConfig(name="glue_mnli", format="glue_mnli", metric="accuracy", references=file),
        train=file,
        adapter=str(tmp_path / "mnli.pt"),
        lora=LoraConfig(rank=8, alpha=16.0),
        loop=LoopConfig(micro_batch_size=2, num_steps=1),
    )

    def start() -> tuple[torch.Tensor, torch.Tensor, bool, int]:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            trained = {one.name: one.parameter for one in job.engine.trainable}
            a = trained["layers.7.v_proj.lora_A"].detach().clone()
            head = trained["classifier.out_proj.weight"].detach().clone()
            loader = job.loader(job.data.train)
            job.engine.train_step(loader.batches_at(0), step=0, lr=1e-4)
            moved = not torch.equal(a, trained["layers.7.v_proj.lora_A"])
            num_lora = sum(one.parameter.numel() for one in job.engine.trainable if "lora_" in one.name)
            return a, head, moved, num_lora

    ((a, head, moved, num_lora),) = run_distributed(start, 1)
    assert torch.equal(a, published["roberta.encoder.layer.0.attention.self.value.lora_A"])
    assert torch.equal(head, published["classifier.out_proj.weight"])
    assert moved
    assert num_lora == 294_912  # the paper's 0.3M


def load_refused(tmp_path: Path, **options: object) -> str:
    config = build_config(tmp_path, "roberta", adapter=str(tmp_path / "run" / "adapter"), **options)

    def open_it() -> str:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            try:
                open_alone(config, topology)
            except ValueError as error:
                return str(error)
        return ""

    return str(run_distributed(open_it, 1)[0])


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = build_config(tmp_path, "roberta")

    def write_it() -> None:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            write(
                open_alone(config, topology),
                TrainResult(valid_loss_before=None, valid_loss_after=None, num_steps_done=0),
            )

    run_distributed(write_it, 1)
    assert load_refused(tmp_path) == ""
    assert "has rank 3, lora.rank makes 2" in load_refused(tmp_path, lora=LoraConfig(rank=2, target_modules=ALL))
    few = LoraConfig(rank=3, target_modules=["q_proj"])
    assert "attention.output.dense.lora_A, which this job does not train" in load_refused(tmp_path, lora=few)
    write_rte(tmp_path / "rte.tsv")
    other = TaskConfig(name="rte", format="glue_rte", metric="accuracy", references=str(tmp_path / "rte.tsv"))
    options = {"task": other, "train": str(tmp_path / "rte.tsv")}
    assert "labels is ['negative', 'positive'], this job has ['entailment'" in load_refused(tmp_path, **options)
    assert load_refused(tmp_path, **options, adapter_head=False) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["topology=tp2"], "an encoder is whole on every process, got tp 2"),
        (["lora.dropout=0.1"], "takes factors alone"),
        (["task.metric=rouge"], "task.metric='rouge' is not one of accuracy"),
        (["encoder.method=bitfit", "dtype=bf16"], "encoder.method=bitfit trains weights of the base"),
        (["encoder.checkpoint=/nowhere"], "has no config.json"),
        (["lora.target_modules=[gate_proj]"], "matches nothing"),
        (["train=null"], "train and adapter are null"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = describe_command(tmp_path, "wrong", f"train={tmp_path / 'train.tsv'}", *words)
    assert run_distributed(call, 1, wrong) == [2]
    assert message in capfd.readouterr().err


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama' is none of roberta, deberta"):
        read_family(EncoderConfig(name="llama", checkpoint=str(tmp_path)))


def test_a_label_that_training_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    for name, intents in (("train.csv", ("a", "b")), ("dev.csv", ("a", "c"))):
        lines = [f"it was good,{intent}" for intent in intents]
        (tmp_path / name).write_text("\n".join(["text,category", *lines]) + "\n")
    task = TaskConfig(name="banking77", format="banking77", metric="accuracy", references=str(tmp_path / "dev.csv"))
    config = build_config(tmp_path, "roberta", task=task, train=str(tmp_path / "train.csv"))
    with pytest.raises(ValueError, match=r"dev.csv:3: label 'c' is none of the 2"):
        load_data(config)


@pytest.mark.parametrize(
    ("settings", "lora_rank", "count"),
    [
        (RobertaConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16), 8, 786_432),
        (DebertaV2Config(num_hidden_layers=48, hidden_size=1536, num_attention_heads=24), 16, 4_718_592),
    ],
    ids=["roberta_large", "deberta_v2_xxl"],
)
def test_counts_are_the_papers(settings: PretrainedConfig, lora_rank: int, count: int) -> None:
    """Table 2: 0.8M and 4.7M (table 10 has rank 8 for the last), on the real classes without memory."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings).requires_grad_(False)
    shape = ModelConfig(
        name="shape",
        num_layers=settings.num_hidden_layers,
        hidden_size=settings.hidden_size,
        num_heads=settings.num_attention_heads,
        ffn_hidden_size=settings.intermediate_size,
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.max_position_embeddings,
    )
    encoder = Encoder(model=model, family=ENCODER_FAMILIES[settings.model_type], shape=shape)
    put_adapters(encoder, build_adapter_specs(LoraConfig(rank=lora_rank), shape), seed=0)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count
