"""Encoders: logits and gradients against transformers and PEFT, topologies and ZeRO stages against one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoder_toy import (
    FAMILIES,
    ROBERTA_BASE,
    build_config,
    open_alone,
    write_encoder,
)
from peft import PeftModel
from processes import run_distributed
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    PretrainedConfig,
    RobertaConfig,
)

from lora_dist.classify_config import ClassifyConfig, EncoderConfig
from lora_dist.config import LoopConfig, LoraConfig, ModelConfig, TopologyConfig, ZeroConfig
from lora_dist.encoders.adapt import put_adapters
from lora_dist.encoders.classify import validate
from lora_dist.encoders.job import Job, write
from lora_dist.encoders.model import FAMILIES as ENCODER_FAMILIES
from lora_dist.encoders.model import Encoder, open_encoder
from lora_dist.encoders.store import list_shards
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.parallel import open_topology
from lora_dist.run_dir import name_trained
from lora_dist.task_config import TaskConfig

DATA = Path(__file__).parents[1] / "data"


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
        valid_loss = validate(job)["valid_loss"]
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
    checkpoint = str(write_encoder(tmp_path, family))
    config = EncoderConfig(name=family, checkpoint=checkpoint, seq_len=16, classifier_dropout=0.25)
    model = open_encoder(config, num_labels=2, dtype=torch.float32, seed=0).model
    dropouts = [module.p for module in model.modules() if hasattr(module, "p")]
    assert dropouts.count(0.25) == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_train_in_16_bits(family: str, dtype: str, tmp_path: Path) -> None:
    def learn(config: ClassifyConfig) -> list[float]:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            loader = job.loader(job.data.train)
            return [job.engine.train_step(loader.batches_at(step), step=step, lr=1e-2).loss for step in range(4)]

    config = build_config(tmp_path, family)
    exact, rounded = (run_distributed(learn, 1, replace(config, dtype=one))[0] for one in ("fp32", dtype))
    assert rounded == pytest.approx(exact, abs=0.02)


def test_labels_can_be_smoothed(tmp_path: Path) -> None:
    """In training; what is validated is the loss itself."""

    def learn(smoothing: float) -> tuple[float, float]:
        config = build_config(tmp_path, "roberta")
        config = replace(config, optim=replace(config.optim, label_smoothing=smoothing))
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            before = validate(job)["valid_loss"]
            assert before is not None
            return before, job.engine.train_step(job.loader(job.data.train).batches_at(0), step=0, lr=1e-2).loss

    def expect(config: ClassifyConfig) -> float:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            batches = job.loader(job.data.train).batches_at(0)
            logits = torch.cat([job.engine.model.eval()(**batch.inputs).logits for batch in batches])
            labels = torch.cat([batch.labels_B.long() for batch in batches])
            return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3).item()

    config = build_config(
        tmp_path,
        "roberta",
        encoder=EncoderConfig(name="roberta", checkpoint=str(tmp_path / "roberta"), seq_len=16, classifier_dropout=0.0),
    )
    plain, smoothed = (run_distributed(learn, 1, smoothing)[0] for smoothing in (0.0, 0.3))
    assert smoothed[0] == plain[0]
    assert smoothed[1] == pytest.approx(run_distributed(expect, 1, config)[0], rel=1e-5)
    assert abs(smoothed[1] - plain[1]) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_was_trained_and_has_the_same_logits_and_gradients(family: str, tmp_path: Path) -> None:
    config = build_config(tmp_path, family, zero=ZeroConfig(stage=0))  # whose masters are the parameters themselves

    def write_and_compute() -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            set_b(job)
            write(job, name_trained(config), 0, {})
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


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_loaded(family: str, tmp_path: Path) -> None:
    """DeBERTa's fused projection takes q, k and v apart again."""
    config = build_config(tmp_path, family, zero=ZeroConfig(stage=0))
    again = replace(config, adapter=str(tmp_path / "run" / "adapter"))

    def write_and_load() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            set_b(job)
            write(job, name_trained(config), 0, {})
            jobs = (job, open_alone(again, topology))
            first, second = ({one.name: one.parameter.detach() for one in one_job.engine.trainable} for one_job in jobs)
            return first, second

    ((written, loaded),) = run_distributed(write_and_load, 1)
    assert written.keys() == loaded.keys()
    assert written["layers.1.k_proj.lora_B"].any()
    assert all(torch.equal(value, loaded[name]) for name, value in written.items())


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
