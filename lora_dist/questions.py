"""Contexts as a model is asked them: in the form of a pair's context, as running text, or through its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lora_dist.config import ModelConfig
from lora_dist.data.chat import load_chat_template
from lora_dist.data.contexts import decode_texts, encode_contexts
from lora_dist.data.conversations import ask_user, parse_question
from lora_dist.data.rows import BadRow
from lora_dist.data.tokenizer import find_target_prefix, load_model_tokenizer
from lora_dist.prefix_config import PrefixConfig
from lora_dist.run_dir import find_model_run, find_run, read_run


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionForm:
    """How a context is put to a model."""

    end_context: bool = True
    """The end token follows it and asks for the target, as in training on pairs; false continues it. Not of a chat."""
    chat: bool = False
    """It is a user's message, and the model's chat template asks for the answer."""
    conversations: bool = False
    """It is not one message but a conversation, in the form of `write_question`."""
    system: str | None = None
    """The system message before it."""

    @property
    def is_asked(self) -> bool:
        """Whether what follows is an answer, which stands for itself."""
        return self.chat or self.end_context


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Contexts as a model takes them."""

    prompts: list[list[int]]
    end_tokens: list[int]
    """Any of them ends an answer; the first is the one that is learnt."""
    tokenizer: PreTrainedTokenizerFast
    form: QuestionForm
    adapter_of_row: Sequence[int | None] = ()
    """Where adapters are attached: each row's, None for the base alone."""

    @property
    def answer_prefix(self) -> str:
        """Before an answer, so that its first word has the token that was learnt."""
        return "" if self.form.chat else find_target_prefix(self.tokenizer)

    def choose_adapters(self, rows: Sequence[int]) -> list[int | None]:
        """Of some rows; empty where none is attached."""
        return [self.adapter_of_row[row] for row in rows] if self.adapter_of_row else []

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return decode_texts(rows, self.tokenizer, strip=self.form.is_asked)


def choose_form(
    model: ModelConfig,
    adapters: Sequence[str],
    *,
    chat: bool | None,
    system: str | None,
    conversations: bool = False,
    end_context: bool = True,
) -> QuestionForm:
    """With `chat` null as the runs that wrote the adapters, or the whole model, have trained; reads their files.

    ValueError where they have trained in several forms or with another template, or where `system` has no chat.
    """
    if conversations:
        return QuestionForm(chat=True, conversations=True)
    if chat is None:
        forms = [_read_form(find_run(directory), model) for directory in adapters]
        forms = forms or [_read_form(find_model_run(model.checkpoint), model, has_template=True)]
        if any(form != forms[0] for form in forms):
            raise ValueError("the adapters were trained in different forms (pairs, chats, system messages); set chat")
        chat, system = forms[0].chat, forms[0].system if system is None else system
    if system is not None and not chat:
        raise ValueError(f"system={system!r} is part of a chat, and this model is asked without one; set chat=true")
    return QuestionForm(chat=chat, system=system, end_context=end_context)


def _read_form(run_dir: Path | None, model: ModelConfig, *, has_template: bool = False) -> QuestionForm:
    """In which the run has trained; that of pairs where there is no run. A whole model has its template with it."""
    run = {} if run_dir is None else read_run(run_dir)
    if run.get("data", {}).get("format") != "chat":
        return QuestionForm()
    for key in ("chat_values", "chat_date") if has_template else ("chat_template", "chat_values", "chat_date"):
        trained, given = run["model"][key], getattr(model, key)
        if trained != given:
            raise ValueError(
                f"{run_dir} was trained with model.{key}={trained}, got {given}; give the same, or set chat"
            )
    return QuestionForm(chat=True, system=run["data"]["system"])


def build_questions(
    contexts: Sequence[str],
    model: ModelConfig,
    form: QuestionForm,
    *,
    adapter_of_row: Sequence[int | None] = (),
    slots: PrefixConfig | None = None,
) -> Questions:
    """Tokens of each context, in their order, with the slots of the method that was trained.

    ValueError for a model without tokenizer or chat template, and for a conversation that the template refuses.
    """
    tokenizer = load_model_tokenizer(model)
    if form.chat:
        prompts, end_tokens = _encode_chat(contexts, model, tokenizer, form, slots)
    else:
        prompts, end_tokens = encode_contexts(contexts, tokenizer, end_context=form.end_context, slots=slots)
    return Questions(
        prompts=prompts, end_tokens=end_tokens, tokenizer=tokenizer, form=form, adapter_of_row=adapter_of_row
    )


def _encode_chat(
    contexts: Sequence[str],
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    form: QuestionForm,
    slots: PrefixConfig | None,
) -> tuple[list[list[int]], list[int]]:
    if slots is not None:
        raise ValueError("chat=true: the adapter's prefix positions stand around a pair's context; set chat=false")
    template = load_chat_template(model, tokenizer)
    prompts = []
    for number, context in enumerate(contexts, 1):
        try:
            conversation = parse_question(context) if form.conversations else ask_user(context, form.system)
            prompts.append(template.encode_question(conversation))
        except BadRow as problem:
            raise ValueError(f"context {number}: {problem.reason} ({problem.detail})") from None
    return prompts, template.find_end_tokens()
