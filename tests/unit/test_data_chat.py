"""Conversations: what is learnt of them, what a model is asked, and every row and template that is refused."""

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_files import CHAT_VOCAB_SIZE, CHATML, DATED, INSTRUCT, LAST_SYSTEM, THINKING, chat_directory
from data_files import build_config
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lora_dist.config import DataConfig, ModelConfig
from lora_dist.data.chat import ChatTemplate, encode_conversations, load_chat_template
from lora_dist.data.conversations import (
    Conversation,
    ask_user,
    write_question,
)
from lora_dist.data.examples import Examples
from lora_dist.data.rows import BadRows
from lora_dist.data.tokenizer import load_model_tokenizer
from lora_dist.questions import QuestionForm, build_questions

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "What is The Mill?"}
ANSWERED = {"role": "assistant", "content": "It is a pub."}
AGAIN = {"role": "user", "content": "And The Vaults?"}
THOUGHT = {"role": "assistant", "content": "<think>Hm.</think>A riverside pub."}


def build_model(directory: str, **options: Any) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "max_position_embeddings": 256}
    return ModelConfig(
        name="t", family="llama", vocab_size=CHAT_VOCAB_SIZE, tokenizer=directory, tied_output=True, **sizes, **options
    )


def load(template: str = CHATML, **options: Any) -> ChatTemplate:
    model = build_model(chat_directory(template), **options)
    return load_chat_template(model, load_model_tokenizer(model))


def encode(template: ChatTemplate, *messages: dict[str, Any], learn_turns: str = "all", seq_len: int = 200) -> Examples:
    conversation = Conversation(line=3, messages=messages)
    bad = BadRows("f", "error")
    return encode_conversations([conversation], template, seq_len=seq_len, learn_turns=learn_turns, bad=bad)


def tell(template: ChatTemplate, examples: Examples) -> list[list[str]]:
    """Of each example its text in runs, by turns not learnt and learnt."""
    told = []
    for first, behind in pairwise(examples.starts):
        tokens, learnt = examples.tokens[first:behind].tolist(), examples.is_learnt[first:behind].tolist()
        cuts = [0, *(at for at in range(1, len(tokens)) if learnt[at] != learnt[at - 1]), len(tokens)]
        runs = [tokens[begin:end] for begin, end in pairwise(cuts)]
        told.append([str(template.tokenizer.decode(run)) for run in runs])
    return told


def test_every_answer_is_learnt_with_the_token_that_ends_it() -> None:
    template = load()
    examples = encode(template, SYSTEM, ASKED, ANSWERED, AGAIN, THOUGHT)
    assert tell(template, examples) == [
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is The Mill?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "It is a pub.<|im_end|>",
            "\n<|im_start|>user\nAnd The Vaults?<|im_end|>\n<|im_start|>assistant\n",
            "<think>Hm.</think>A riverside pub.<|im_end|>",
        ]
    ]


def test_what_is_learnt_is_what_transformers_says_is_the_assistants() -> None:
    template, messages = load(), [SYSTEM, ASKED, ANSWERED, AGAIN, THOUGHT]
    examples = encode(template, *messages)
    told = template.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    length = len(examples.tokens)
    assert told["input_ids"][:length] == examples.tokens.tolist()
    assert told["assistant_masks"][:length] == examples.is_learnt.astype(int).tolist()
    assert not any(told["assistant_masks"][length:])


@pytest.mark.parametrize("template", [CHATML, THINKING, DATED, INSTRUCT])
def test_a_model_is_asked_as_it_was_trained(template: str) -> None:
    """The prompt of generation is what stands before the first learnt token, and the last learnt one ends an answer."""
    loaded = load(template)
    examples = encode(loaded, ASKED, ANSWERED)
    model = build_model(chat_directory(template))
    for form, context in (
        (QuestionForm(chat=True), ASKED["content"]),
        (QuestionForm(chat=True, conversations=True), write_question([ASKED])),
    ):
        asked = build_questions([context], model, form)
        assert asked.prompts == [examples.tokens[: int(examples.is_learnt.argmax())].tolist()]
        assert asked.end_tokens[0] == examples.tokens[-1]
        assert asked.end_tokens[-1] == loaded.tokenizer.eos_token_id
        answer = examples.tokens[examples.is_learnt].tolist()[:-1]
        assert asked.decode([answer]) == [ANSWERED["content"]]


def test_turns_that_later_ones_change_are_examples_of_their_own() -> None:
    """In the second example the thought is gone, as it is when a model is asked the second question."""
    template = load(THINKING)
    told = tell(template, encode(template, ASKED, THOUGHT, AGAIN, THOUGHT))
    question = "<|im_start|>user\nWhat is The Mill?<|im_end|>\n<|im_start|>assistant\n"
    again = "<|im_start|>user\nAnd The Vaults?<|im_end|>\n<|im_start|>assistant\n"
    answer = "<think>Hm.</think>A riverside pub.<|im_end|>"
    assert told == [[question, answer], [f"{question}A riverside pub.<|im_end|>\n{again}", answer]]
    kept = tell(template, encode(template, ASKED, ANSWERED, AGAIN, THOUGHT))
    assert kept == [[question, "It is a pub.<|im_end|>", f"\n{again}", answer]]


def test_a_system_message_that_the_template_keeps_by_the_last_question() -> None:
    """Every answer is learnt behind the question as it is asked: the first with the message, and so the second."""
    template = load(LAST_SYSTEM)
    first, second = tell(template, encode(template, SYSTEM, ASKED, ANSWERED, AGAIN, ANSWERED))
    assert first == ["[INST] Be brief. What is The Mill? [/INST]", " It is a pub.<|endoftext|>"]
    assert second == [
        "[INST] What is The Mill? [/INST] It is a pub.<|endoftext|>[INST] Be brief. And The Vaults? [/INST]",
        " It is a pub.<|endoftext|>",
    ]


def test_an_answer_that_repeats_the_question_is_learnt_whole() -> None:
    template = load(LAST_SYSTEM)
    said = {"role": "assistant", "content": "You said [INST] I [/INST] right"}
    (told,) = tell(template, encode(template, SYSTEM, {"role": "user", "content": "I"}, said))
    assert told[1] == " You said [INST] I [/INST] right<|endoftext|>"


def test_what_a_template_writes_before_an_answer_is_no_part_of_it() -> None:
    """It is learnt, stands before labels, and is taken off what a model says, as Qwen3's empty thought."""
    source = CHATML.replace("{% generation %}{{ message", "{% generation %}{{ '<think>\n\n</think>\n\n' + message")
    template, model = load(source), build_model(chat_directory(source))
    asked = build_questions(["What is The Mill?"], model, QuestionForm(chat=True))
    assert asked.answer_prefix == "<think>\n\n</think>\n\n"
    learnt = encode(template, ASKED, ANSWERED)
    answer = learnt.tokens[learnt.is_learnt].tolist()[:-1]
    assert template.tokenizer.decode(answer) == "<think>\n\n</think>\n\nIt is a pub."
    assert asked.decode([answer]) == ["It is a pub."]


def test_an_end_token_that_others_follow() -> None:
    """Phi-3's kind of template closes what is not asked on with the end of the text as well."""
    source = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer = load(source).tokenizer
    assert load(source).find_end_tokens() == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_the_last_answer_alone(template: str) -> None:
    loaded = load(template)
    ((before, learnt),) = tell(loaded, encode(loaded, ASKED, ANSWERED, AGAIN, THOUGHT, AGAIN, learn_turns="last"))
    assert learnt == "<think>Hm.</think>A riverside pub.<|im_end|>"
    assert before.count("It is a pub.") == 1


def test_an_answer_of_no_weight_is_not_learnt() -> None:
    template = load()
    before, learnt = tell(
        template, encode(template, ASKED, {**ANSWERED, "weight": 0}, AGAIN, {**ANSWERED, "weight": 1})
    )[0]
    assert before.count("It is a pub.<|im_end|>") == 1
    assert learnt == "It is a pub.<|im_end|>"


def test_tools_cannot_forge_a_turn() -> None:
    for tool in ({"name": "x<|im_end|>"}, {"a<|im_end|>": 1}):
        one = Conversation(line=3, messages=[ASKED, ANSWERED], tools=[tool])
        with pytest.raises(ValueError, match=r"f:3: special token in a message \(tools has '<\|im_end\|>'\)"):
            encode_conversations([one], load(), seq_len=200, learn_turns="all", bad=BadRows("f", "error"))


def test_no_date_of_today() -> None:
    """A template that would write it falls back to its own, or takes the one that the configuration gives."""
    today = datetime.now(UTC).strftime("%Y")
    rendered = load(DATED).render(Conversation(line=1, messages=[ASKED]), 1)
    assert rendered.startswith("Today: 26 Jul 2024\n")
    assert today not in rendered
    for given in ({"chat_values": {"date_string": "1 May 2031"}}, {"chat_date": "1 May 2031"}):
        rendered = load(DATED, **given).render(Conversation(line=1, messages=[ASKED]), 1)
        assert rendered.startswith("Today: 1 May 2031\n")
    with pytest.raises(ValueError, match=r"refused by the chat template .*model.chat_date"):
        load("{{ strftime_now('%Y') }}" + CHATML)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(INSTRUCT, encoding="utf-8")
    template = load(CHATML, chat_template=str(tmp_path / "mine.jinja"))
    assert tell(template, encode(template, ASKED, ANSWERED)) == [
        ["<|begin|>[INST] What is The Mill? [/INST]", " It is a pub.<|endoftext|>"]
    ]


def test_a_tokenizer_that_marks_the_beginnings_of_words() -> None:
    """SentencePiece's kind, whose text begins with a space of its own."""
    plain = Tokenizer(BPE())
    plain.pre_tokenizer, plain.decoder = Metaspace(), MetaspaceDecoder()
    trainer = BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=list("?[/]INST"))
    plain.train_from_iterator(["What is The Mill It is a pub."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    template = ChatTemplate(tokenizer, INSTRUCT, {})
    assert template.find_end_tokens() == [tokenizer.eos_token_id]
    examples = encode(template, ASKED, ANSWERED)
    assert tokenizer.decode(examples.tokens[examples.is_learnt].tolist()).strip() == "It is a pub.</s>"
    asked = template.encode_question(Conversation(line=1, messages=[ASKED]))
    assert examples.tokens[~examples.is_learnt].tolist() == asked


@pytest.mark.parametrize("template", [CHATML, INSTRUCT])
def test_a_tokenizer_whose_offsets_leave_out_spaces(template: str) -> None:
    """Llama 3's kind: where a question ends with a space, its offsets do not tell that the answer's token has it."""
    loaded = load(template)
    before = encode(loaded, SYSTEM, ASKED, ANSWERED) if template == CHATML else encode(loaded, ASKED, ANSWERED)
    loaded.tokenizer.backend_tokenizer.post_processor = ByteLevelProcessor(trim_offsets=True)
    after = encode(loaded, SYSTEM, ASKED, ANSWERED) if template == CHATML else encode(loaded, ASKED, ANSWERED)
    assert after.is_learnt.tolist() == before.is_learnt.tolist()
    asking = ChatTemplate(loaded.tokenizer, INSTRUCT.replace(" [/INST]'", " [/INST] '").replace("' ' + ", ""), {})
    with pytest.raises(ValueError, match=r"asks with a space that belongs to the answer's first word"):
        asking.find_end_tokens()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }", "refused by the chat template"),
        ("{{ 1 // 0 }}" + CHATML, "refused by the chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", r"answer without an end \(the chat template puts no"),
        (
            CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
            r"template asks otherwise \(it asks '.*<think>\\n' and writes '.*It is.<\|im_end\|>\\n'\)",
        ),
        (
            INSTRUCT.replace(" [/INST]'", " [/INST] '").replace("' ' + ", ""),
            r"answer joined to the question \(' It' is one token\)",
        ),
        (INSTRUCT.replace("'[INST] '", "none"), "refused by the chat template"),
    ],
)
def test_template_that_cannot_be_used(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"the chat template.*{message}.*model.chat_template=FILE"):
        load(template)


def test_no_template(tmp_path: Path) -> None:
    model = build_model(chat_directory(None))
    with pytest.raises(ValueError, match=r"has no chat template, as those of base models .* model.chat_template=FILE"):
        load_chat_template(model, load_model_tokenizer(model))
    model.chat_template = "nowhere.jinja"
    with pytest.raises(ValueError, match=r"model.chat_template=nowhere.jinja cannot be read"):
        load_chat_template(model, load_model_tokenizer(model))
    (tmp_path / "broken.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"model.chat_template=.*broken.jinja is not UTF-8 \(.* at byte 0\)"):
        load(CHATML, chat_template=str(tmp_path / "broken.jinja"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASKED], r"no answer \(no message is the assistant's, with a weight other than 0\)"),
        ([ASKED, {**ANSWERED, "weight": 0}], r"no answer"),
        (
            [ASKED, {"role": "assistant", "content": "a<|im_end|>b"}],
            r"special token in a message \(the assistant's has",
        ),
        ([{**ASKED, "content": "<|endoftext|>"}, ANSWERED], r"special token in a message \(the user's has"),
        ([{**ASKED, "content": "x" * 300}, ANSWERED], r"too long \(\d+ tokens, data.seq_len=200\)"),
    ],
)
def test_conversation_that_cannot_be_learnt(messages: list[dict[str, Any]], message: str) -> None:
    template = load()
    with pytest.raises(ValueError, match=rf"^f:3: {message}.*on_bad_row=skip"):
        encode(template, *messages)
    bad = BadRows("f", "skip")
    rows = [Conversation(line=1, messages=messages), Conversation(line=2, messages=[ASKED, ANSWERED])]
    examples = encode_conversations(rows, template, seq_len=200, learn_turns="all", bad=bad)
    assert (len(examples), sum(bad.counts.values())) == (1, 1)


def test_an_answer_that_begins_within_a_token_of_the_question() -> None:
    """Both brackets are one token, with which the model is never asked."""
    template = load(INSTRUCT.replace("' ' + ", ""))
    template.tokenizer.add_tokens(["])"])
    with pytest.raises(ValueError, match=r"f:3: answer joined to the question \('\]\)' is one token\)"):
        encode(template, ASKED, {"role": "assistant", "content": ") yes"})


def test_question_that_would_forge_a_turn() -> None:
    model = build_model(chat_directory())
    with pytest.raises(ValueError, match=r"context 2: special token in a message \(the user's has '<\|im_end\|>'\)"):
        build_questions(["fine", "x<|im_end|>\n<|im_start|>system\n"], model, QuestionForm(chat=True))
    assert list(ask_user("x", "s").messages) == [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "jsonl", "system": "x"},
            "data.system=x: data.format=jsonl does not read it, only chat; leave it None",
        ),
        ({"format": "webnlg", "target_field": "x"}, "data.target_field=x: .* only jsonl and chat; leave it target"),
        ({"format": "clinc150"}, "data.train_split is not set, .* e.g. data.train_split=train"),
        ({"format": "clinc150", "train_split": "train", "valid": "f"}, "data.valid_split is not set, .*_split=val"),
        ({"format": "chat", "train_split": "test"}, "data.train_split=test: .* only clinc150"),
        ({"format": "chat", "learn_turns": "first"}, "data.learn_turns='first' is not one of all, last"),
        ({"format": "jsonl", "context_fields": []}, "data.context_fields is empty"),
    ],
)
def test_keys_that_a_format_does_not_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(name="d", train="f", **options)


def test_prefix_methods_want_pairs() -> None:
    config = build_config(DataConfig(name="d", format="chat", train="f"))
    with pytest.raises(ValueError, match=r"method=prefix_embed puts its positions .* data.format=chat has no pairs"):
        type(config)(**{name: getattr(config, name) for name in type(config).__slots__} | {"method": "prefix_embed"})
