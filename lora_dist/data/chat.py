"""Conversations as tokens: the model's chat template makes text of them, in which the assistant's turns are learnt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from lora_dist.config import ModelConfig
from lora_dist.data.conversations import Conversation, Message, is_learnt, list_texts
from lora_dist.data.examples import Examples, join_examples, show_progress
from lora_dist.data.rows import BadRow, BadRows, read_file

_NO_CLOCK = "{%- set strftime_now = model_chat_date_is_null %}"
_CLOCK = "{%- macro strftime_now(format) -%}{{ chat_date }}{%- endmacro %}"
"""One or the other stands before a template: one that is told today's date would train on another text tomorrow."""
_REMEDY = "give model.chat_template=FILE, or model.chat_date or model.chat_values={name: value} where it takes them"
_ANSWER = "It is."
_PROBE: list[Message] = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": _ANSWER}]


@dataclass(frozen=True, slots=True)
class Part:
    """Text of a conversation up to an answer's end, and where its learnt answers stand (characters, end excluded)."""

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A chat template on its tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, source: str, values: Mapping[str, Any], date: str | None = None
    ) -> None:
        """`values` are handed to the template by name; `date` is what it writes as today's."""
        self.tokenizer, self._values = tokenizer, {**values, "chat_date": date}
        self._source = (_NO_CLOCK if date is None else _CLOCK) + source
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        spelt = sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(self._special))), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, spelt)))

    def render(self, conversation: Conversation, num_messages: int, *, ask: bool = False) -> str:
        """Text of the first messages; with `ask` and what asks for an answer. BadRow where the template refuses."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(conversation.messages[:num_messages]),
                tools=None if conversation.tools is None else list(conversation.tools),  # type: ignore[arg-type]
                chat_template=self._source,
                add_generation_prompt=ask,
                tokenize=False,
                **self._values,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise BadRow("refused by the chat template", " ".join(str(error).split())) from None
        return str(text)

    def encode(self, text: str) -> tuple[list[int], NDArray[np.int64]]:
        """Tokens of a rendered text, and [tokens, 2] where each begins and ends in it."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    def encode_question(self, conversation: Conversation) -> list[int]:
        """What a model is asked: the whole conversation and what asks for an answer. BadRow as `render`."""
        self.check(conversation)
        return self.encode(self.render(conversation, len(conversation.messages), ask=True))[0]

    def check(self, conversation: Conversation) -> None:
        """BadRow where a message spells out a special token, which would end a turn or begin another one."""
        tools = [("tools", tool) for tool in conversation.tools or ()]
        for owner, said in [*((f"the {message['role']}'s", message) for message in conversation.messages), *tools]:
            for text in list_texts(said):
                if found := self._spelt.search(text):
                    raise BadRow("special token in a message", f"{owner} has {found[0]!r}")

    def split(self, conversation: Conversation, *, learn_turns: str) -> list[Part]:
        """The conversation cut before each answer that was asked with other words than those learnt so far.

        Most templates give one part. Those that leave out what was thought in earlier turns give several, each as a
        model is asked. BadRow where there is no answer, or where the template writes one otherwise than it asks for it.
        """
        turns = [turn for turn, message in enumerate(conversation.messages) if is_learnt(message)]
        if not turns:
            raise BadRow("no answer", "no message is the assistant's, with a weight other than 0")
        parts: list[Part] = []
        for turn in turns if learn_turns == "all" else turns[-1:]:
            asked = self.render(conversation, turn, ask=True)
            whole = asked + self._write_answer(conversation, turn, asked)
            answer = (len(asked), len(whole))
            if parts and asked.startswith(parts[-1].text):
                parts[-1] = Part(whole, (*parts[-1].answers, answer))
            else:
                parts.append(Part(whole, (answer,)))
        return parts

    def _write_answer(self, conversation: Conversation, turn: int, asked: str) -> str:
        """What the template writes behind the question `asked`, the message `turn`.

        Mistral's templates write the system message into the last question, if no answer follows; there the answer is
        what follows the same question without it.
        """
        answered = self.render(conversation, turn + 1)
        if answered.startswith(asked):
            return answered[len(asked) :]
        question = "" if turn == 0 else conversation.messages[turn - 1]["content"]
        ending = asked[asked.rfind(question) :] if question and question in asked else asked
        head, found, answer = answered.rpartition(ending)
        while found and conversation.messages[turn]["content"] not in answer:  # the answer repeats the question
            head, found, tail = head.rpartition(ending)
            answer = f"{tail}{ending}{answer}"
        if not found:
            raise BadRow("template asks otherwise", f"it asks {asked[-40:]!r} and writes {answered[-80:]!r}")
        return answer

    def encode_part(self, part: Part) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and which are learnt: each answer's, up to the special token that ends it, behind which the text ends.

        BadRow where an answer has no such token, or begins within one of the question's.
        """
        tokens, places = self.encode(part.text)
        is_special = np.isin(tokens, list(self._special))
        learnt = np.zeros(len(tokens), dtype=np.bool_)
        for begin, end in part.answers:
            first, behind = np.searchsorted(places[:, 1], [begin, end], side="right")
            ends = np.flatnonzero(is_special[first:behind])
            if not len(ends):
                raise BadRow("answer without an end", "the chat template puts no special token behind it")
            if places[first, 0] < begin:
                joined = part.text[places[first, 0] : places[first, 1]]
                raise BadRow("answer joined to the question", f"{joined!r} is one token")
            learnt[first : first + ends[-1] + 1] = True
        length = int(np.flatnonzero(learnt)[-1]) + 1
        return np.array(tokens[:length], dtype=np.int32), learnt[:length]

    def find_end_tokens(self) -> list[int]:
        """What ends an answer: the template's tokens behind it, the first ahead, and the tokenizer's own.

        ValueError where the template cannot be learnt from: it refuses a question and an answer, ends no answer, or
        asks so that a first word has another token than it has in running text.
        """
        part = self._probe()
        try:
            tokens, learnt = self.encode_part(part)
            asked = self.encode_question(Conversation(line=1, messages=_PROBE[:1]))
        except BadRow as problem:
            raise ValueError(f"the chat template: {problem.reason} ({problem.detail}); {_REMEDY}") from None
        if tokens[: int(learnt.argmax())].tolist() != asked:
            raise ValueError(f"the chat template asks with a space that belongs to the answer's first word; {_REMEDY}")
        behind = self.encode(part.text[part.text.rindex(_ANSWER) + len(_ANSWER) :])[0]
        ends = [token for token in behind if token in self._special]
        return list(dict.fromkeys([*ends, int(self.tokenizer.eos_token_id)]))

    def find_answer_prefix(self) -> str:
        """What the template writes of its own between question and answer, such as an empty thought."""
        part = self._probe()
        return part.text[part.answers[0][0] : part.text.rindex(_ANSWER)]

    def _probe(self) -> Part:
        """A question and an answer, as the template writes them."""
        try:
            (part,) = self.split(Conversation(line=1, messages=_PROBE), learn_turns="all")
        except BadRow as problem:
            raise ValueError(f"the chat template: {problem.reason} ({problem.detail}); {_REMEDY}") from None
        return part


def load_chat_template(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """That of model.chat_template, or the tokenizer's own; ValueError where there is none or it cannot be used."""
    if model.chat_template is not None:
        source = _read_template(model.chat_template)
    elif tokenizer.chat_template is not None:
        source = tokenizer.get_chat_template()
    else:
        directory = Path(model.tokenizer or model.checkpoint or "")
        raise ValueError(
            f"the tokenizer in {directory} has no chat template, as those of base models have none; give"
            " model.chat_template=FILE, a Jinja file such as an instruction-tuned model's chat_template.jinja"
        )
    template = ChatTemplate(tokenizer, source, model.chat_values, model.chat_date)
    template.find_end_tokens()
    return template


def _read_template(path: str) -> str:
    try:
        return read_file("model.chat_template", path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"model.chat_template={path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def encode_conversations(
    conversations: Sequence[Conversation], template: ChatTemplate, *, seq_len: int, learn_turns: str, bad: BadRows
) -> Examples:
    """Tokens of the conversations that fit into `seq_len` positions; the others, and broken ones, go to `bad`.

    A conversation is one example, or several where its template changes what came before (see `ChatTemplate.split`); it
    is left out whole where one of them is bad.
    """
    rows: list[NDArray[np.int32]] = []
    learnt: list[NDArray[np.bool_]] = []
    for conversation in show_progress(conversations, "conversations"):
        try:
            template.check(conversation)
            encoded = [template.encode_part(part) for part in template.split(conversation, learn_turns=learn_turns)]
            longest = max(len(tokens) - 1 for tokens, _ in encoded)
            if longest > seq_len:
                raise BadRow("too long", f"{longest} tokens, data.seq_len={seq_len}")
        except BadRow as problem:
            bad.add(conversation.line, problem.reason, problem.detail)
            continue
        rows += [tokens for tokens, _ in encoded]
        learnt += [mask for _, mask in encoded]
    return join_examples(rows, learnt)
