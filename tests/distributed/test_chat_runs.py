"""Conversations and running text, as a user trains on them: losses are transformers', answers are learnt and given."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chat_files import CHAT_VOCAB_SIZE, CHATML, write_chat_tokenizer
from demo_runs import call, read_losses
from family_toy import read_family_config
from processes import run_distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_dist.questions import QuestionForm, build_questions, choose_form

CHATS = [
    [("user", "What is The Mill?"), ("assistant", "It is a riverside pub.")],
    [("system", "Be brief."), ("user", "What is The Mill?"), ("assistant", "A pub.")],
    [("user", "What is near?"), ("assistant", "The Vaults."), ("user", "What is it?"), ("assistant", "Near The Mill.")],
    [("user", "The Vaults is?"), ("assistant", "A pub near The Mill. It is a user.")],
]
TEXTS = ["The Vaults is a pub near The Mill. " * 6, "It is a riverside pub."]


def write_messages(chat: list[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": content} for role, content in chat]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a chat template, conversations and documents."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=CHAT_VOCAB_SIZE, num_key_value_heads=2, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(place / "base")
    write_chat_tokenizer(place / "base")
    (place / "chat.jsonl").write_text("".join(f"{json.dumps(write_messages(chat))}\n" for chat in CHATS))
    asked = "".join(f"{json.dumps(write_messages(chat[:-1]))}\n" for chat in CHATS)
    (place / "asked.jsonl").write_text(asked)
    (place / "text.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return place


def train(place: Path, name: str, num_processes: int, *more: str) -> Path:
    words = ["train", "model=hf", f"model.checkpoint={place / 'base'}", "track=none", "data.seq_len=240"]
    words += ["method=full", *more, "optim.num_warmup_steps=0", "optim.schedule=constant", f"run_dir={place / name}"]
    assert run_distributed(call, num_processes, words) == [0] * num_processes
    return place / name


@torch.no_grad()
def compute_loss(place: Path, rows: list[tuple[list[int], list[int]]]) -> float:
    """Mean over all learnt tokens of transformers' model, each row alone; a row is its tokens and which are learnt."""
    model = LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    total, count = 0.0, 0
    for tokens, learnt in rows:
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        mask = torch.tensor(learnt[1:], dtype=torch.bool)
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize(
    "words",
    [["topology=tp2_sp", "loop.micro_batch_size=1"], ["data.collate=pad", "loop.micro_batch_size=2", "topology=pp2"]],
)
def test_the_loss_of_conversations_is_transformers(place: Path, words: list[str]) -> None:
    rows = 1 if "topology=tp2_sp" in words else len(CHATS)
    data = ["data=chat", f"data.train={place / 'chat.jsonl'}", "loop.num_steps=1", f"loop.global_batch_size={rows}"]
    run = train(place, f"first{rows}", 2, *data, *words)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    told = [
        tokenizer.apply_chat_template(
            write_messages(chat)["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        for chat in CHATS
    ]
    expected = compute_loss(place, [(one["input_ids"], one["assistant_masks"]) for one in told])
    assert read_losses(run)[-1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_running_text_is_transformers(place: Path) -> None:
    """Documents longer than a row go on in the next one, whose positions begin anew."""
    data = ["data=text", f"data.train={place / 'text.jsonl'}", "data.seq_len=24", "loop.num_steps=1"]
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    pieces = []
    for text in TEXTS:
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        pieces += [tokens[first : first + 25] for first in range(0, len(tokens) - 1, 24)]
    assert len(pieces) > len(TEXTS) + 1
    batch = ["loop.micro_batch_size=1", f"loop.global_batch_size={len(pieces)}", "data.collate=pad"]
    run = train(place, "text", 1, *data, *batch)
    assert read_losses(run)[-1]["loss"] == pytest.approx(
        compute_loss(place, [(p, [1] * len(p)) for p in pieces]), rel=1e-5
    )


@pytest.fixture(scope="module")
def learnt(place: Path) -> Path:
    """The model of a run of two processes that learnt the conversations by heart."""
    more = ["data=chat", f"data.train={place / 'chat.jsonl'}", "optim.lr=1e-2", "loop.num_steps=60", "topology=tp2"]
    batch = ["loop.micro_batch_size=1", "loop.global_batch_size=1", "zero.stage=1"]
    return train(place, "learnt", 2, *more, *batch) / "model"


def test_answers_are_learnt_and_given(place: Path, learnt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The model answers the conversations' questions, here at any topology and by transformers."""
    model = ["model=hf", f"model.checkpoint={learnt}"]
    capfd.readouterr()
    single = ["generate", *model, "generate.max_new_tokens=24"]
    assert run_distributed(call, 1, [*single, "generate.prompt='What is The Mill?'"]) == [0]
    assert capfd.readouterr().out.splitlines()[-1] == "It is a riverside pub."
    assert run_distributed(
        call, 1, [*single, "generate.prompt='What is The Mill?'", "generate.system='Be brief.'"]
    ) == [0]
    assert capfd.readouterr().out.splitlines()[-1] == "A pub."
    files = [
        "generate.format=chat",
        f"generate.input={place / 'asked.jsonl'}",
        f"generate.output={place / 'out.jsonl'}",
    ]
    assert run_distributed(call, 2, [*single, *files, "topology=pp2"]) == [0, 0]
    texts = [json.loads(line)["text"] for line in (place / "out.jsonl").read_text().splitlines()]
    assert texts == [chat[-1][1] for chat in CHATS]
    assert texts == answer_with_transformers(learnt)
    scores = ["task=chat", f"task.references={place / 'chat.jsonl'}", "base_alone=true"]
    words = ["evaluate", *model, *scores, f"texts={place / 'texts.jsonl'}", "generate.max_new_tokens=24"]
    assert run_distributed(call, 2, [*words, "topology=tp2"]) == [0, 0]
    record = json.loads((place / "texts.jsonl.scores.json").read_text())
    assert [row["values"] for row in record["rows"]] == [{"exact match": 100.0}]


def answer_with_transformers(directory: Path) -> list[str]:
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    assert (directory / "chat_template.jinja").read_text() == CHATML
    texts = []
    for chat in CHATS:
        messages = write_messages(chat[:-1])["messages"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=0)
        texts.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_an_adapter_is_asked_as_its_run_was_trained(
    place: Path, learnt: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the run's system message and through its template, unless told otherwise."""
    base, told = f"model.checkpoint={learnt}", "model.chat_date=today"
    more = ["data=chat", f"data.train={place / 'chat.jsonl'}", "data.system='Be brief.'", "optim.lr=1e-5", base, told]
    train(place, "adapted", 1, *more, "loop.num_steps=1", "method=lora")
    words = ["generate", "model=hf", base, f"adapter={place / 'adapted'}", "generate.prompt='What is The Mill?'"]
    capfd.readouterr()
    for form, answer in (
        ([told], "A pub."),
        (["generate.chat=true", "generate.system='Be brief.'"], "A pub."),
        (["generate.chat=true"], "It is a riverside pub."),
    ):
        assert run_distributed(call, 1, [*words, *form]) == [0]
        assert capfd.readouterr().out.splitlines()[-1] == answer
    assert run_distributed(call, 1, words) != [0]
    assert "adapted was trained with model.chat_date=today, got None; give the same, or set" in capfd.readouterr().err
    assert run_distributed(call, 1, [*words, told, "generate.chat=false", "generate.system=x"]) != [0]
    assert "system='x' is part of a chat, and this model is asked without one" in capfd.readouterr().err


def test_a_template_that_a_run_was_given_is_merged_with_its_adapter(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHATML + "{# own #}")
    more = ["data=chat", f"data.train={place / 'chat.jsonl'}", f"model.chat_template={template}", "method=lora"]
    run = train(place, "templated", 1, *more, "loop.num_steps=1")
    base = shutil.copytree(place / "base", tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    shutil.copytree(base, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    merge = ["merge", "model=hf", f"model.checkpoint={base}", f"adapter={run}"]
    for output, given, text in (
        ("own", [], template.read_text()),
        ("given", [f"model.chat_template={base / 'chat_template.jinja'}"], CHATML),
        ("elsewhere", [f"model.tokenizer={tmp_path / 'tokenizer'}"], template.read_text()),
    ):
        assert run_distributed(call, 1, [*merge, f"output={tmp_path / output}", *given]) == [0]
        assert (tmp_path / output / "chat_template.jinja").read_text() == text
        assert (tmp_path / output / "generation_config.json").read_text() == '{"eos_token_id": 7}'
    template.unlink()
    assert run_distributed(call, 1, [*merge, f"output={tmp_path / 'none'}"]) != [0]
    assert f"was trained with model.chat_template={template}, which is no file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate.system=x"], "system='x' is part of a chat, and this model is asked without one; set chat=true"),
        (
            ["generate.format=chat", "generate.chat=false"],
            "has conversations, got generate.chat=false; leave it out",
        ),
        (["generate.chat=true", "model.tokenizer=PLAIN"], "has no chat template"),
    ],
)
def test_chats_that_cannot_be(place: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_chat_tokenizer(place / "plain", None)
    words = [word.replace("PLAIN", str(place / "plain")) for word in words]
    call_words = ["generate", "model=hf", f"model.checkpoint={place / 'base'}", "generate.prompt=x", *words]
    assert run_distributed(call, 1, call_words) != [0]
    assert message in capfd.readouterr().err


def test_a_run_goes_on_with_the_conversations_it_began_with(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same file under another system message is other text."""
    words = [
        "data=chat",
        f"data.train={place / 'chat.jsonl'}",
        "method=lora",
        "loop.save_every_epochs=1",
        "resume=auto",
    ]
    first, more = [*words, "loop.num_epochs=2", "data.collate=pad"], ["loop.micro_batch_size=1"]
    train(place, "goes_on", 1, *first, *more)
    assert [line["step"] for line in read_losses(place / "goes_on")][-1] == 2 * len(CHATS)
    train(place, "goes_on", 1, *first, *more, "loop.num_epochs=3")
    assert [line["step"] for line in read_losses(place / "goes_on")][-1] == 3 * len(CHATS)
    before = (place / "goes_on/config.yaml").read_text()
    with pytest.raises(AssertionError):
        train(place, "goes_on", 1, *first, *more, "data.system=Hm.", "loop.num_epochs=4")
    assert "data.tokens is " in capfd.readouterr().err
    assert (place / "goes_on/config.yaml").read_text() == before  # generate reads there how to ask
    train(place, "goes_on", 1, *first, *more, "loop.num_epochs=4")
    assert (place / "goes_on/config.yaml").read_text() == before.replace("num_epochs: 3.0", "num_epochs: 4.0")


def test_everything_a_run_wrote_is_asked_as_it_was_trained(place: Path, learnt: Path) -> None:
    """Its last and its best, from wherever; conversations get the system message that training put before them."""
    words = [
        "data=chat",
        f"data.train={place / 'chat.jsonl'}",
        f"data.valid={place / 'chat.jsonl'}",
        "loop.num_steps=1",
    ]
    words += ["data.system=S", "loop.keep_best=true", "loop.eval_every=1"]
    base = read_family_config(train(place, "best_full", 1, *words) / "best_model")
    train(place, "best_lora", 1, *words, "method=lora")
    chat = QuestionForm(chat=True, system="S")
    pairs = {"chat": None, "system": None}
    for name in ("adapter", "best_adapter"):
        assert choose_form(base, [str(place / "best_lora" / name)], **pairs) == chat
    for name in ("model", "best_model"):
        whole = read_family_config(place / "best_full" / name)
        assert choose_form(whole, [], **pairs) == chat
        assert choose_form(whole, [], **pairs, conversations=True) == replace(chat, conversations=True)
    assert choose_form(read_family_config(place / "base"), [], **pairs) == QuestionForm()
    question = json.dumps(write_messages(CHATS[0]))
    form = replace(chat, conversations=True)
    asked = build_questions([question], read_family_config(place / "best_full/model"), form)
    assert asked.tokenizer.decode(asked.prompts[0]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWhat is The Mill?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_run_of_running_text_is_asked_to_go_on(place: Path) -> None:
    data = ["data=text", f"data.train={place / 'text.jsonl'}", "data.seq_len=24", "loop.num_steps=1"]
    model = read_family_config(train(place, "text_run", 1, *data, "loop.micro_batch_size=1") / "model")
    assert choose_form(model, [], chat=None, system=None) == QuestionForm(end_context=False)
    assert choose_form(model, [], chat=None, system=None, end_context=True) == QuestionForm()
