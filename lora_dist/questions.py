"""Contexts as a model is asked them: in the form of a pair's context, as running text, or through its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lora_dist.config import ModelConfig
from lora_dist.data.chat import ChatTemplate, load_chat_template
from lora_dist.data.contexts import decode_texts, encode_contexts
from lora_dist.data.conversations import ask_user, parse_question
from lora_dist.data.rows import BadRow
from lora_dist.data.tokenizer import find_target_prefix, load_model_tokenizer
from lora_dist.prefix_config import PrefixConfig
from lora_dist.run_dir import find_trainer, read_run


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionForm:
    """How a context is put to a model."""

    end_context: bool = True
    """The end token follows it and asks for the target, as in training on pairs; false continues it, as in training on
    running text. Not of a chat."""
    chat: bool = False
    """It is a user's message, and the model's chat template asks for the answer."""
    conversations: bool = False
    """It is not one message but a conversation, in the form of `write_question`."""
    system: str | None = None
    """The system message before it, of a conversation before one that has none."""

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
    answer_prefix: str
    """What stands before an answer's own text: the space that gives its first word the token that was learnt, or what
    the chat template writes there."""
    adapter_of_row: Sequence[int | None] = ()
    """Where adapters are attached: each row's, None for the base alone."""

    def choose_adapters(self, rows: Sequence[int]) -> list[int | None]:
        """Of some rows; empty where none is attached."""
        return [self.adapter_of_row[row] for row in rows] if self.adapter_of_row else []

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts = decode_texts(rows, self.tokenizer, strip=self.form.is_asked)
        return [text.removeprefix(self.answer_prefix.strip()).strip() for text in texts] if self.form.chat else texts


def choose_form(
    model: ModelConfig,
    adapters: Sequence[str],
    *,
    chat: bool | None,
    system: str | None,
    conversations: bool = False,
    end_context: bool | None = None,
) -> QuestionForm:
    """With `chat` null as the runs that wrote the adapters, or the whole model, have trained; reads their files.

    ValueError where they have trained in several forms or with another template, or where `system` has no chat.
    """
    asks = QuestionForm(chat=bool(chat or conversations))
    if chat is None:
        forms = [_read_form(find_trainer(directory), model) for directory in adapters]
        forms = forms or [_read_form(find_trainer(model.checkpoint), model, has_template=True)]
        if any(form != forms[0] for form in forms):
            raise ValueError("the adapters were trained in different forms (pairs, chats, system messages); set chat")
        asks = replace(forms[0], chat=forms[0].chat or conversations)
    if system is not None and not asks.chat:
        raise ValueError(f"system={system!r} is part of a chat, and this model is asked without one; set chat=true")
    return replace(
        asks,
        conversations=conversations,
        system=asks.system if system is None else system,
        end_context=asks.end_context if end_context is None else end_context,
    )


def _read_form(run_dir: Path | None, model: ModelConfig, *, has_template: bool = False) -> QuestionForm:
    """In which the run has trained; that of pairs where there is no run. A whole model has its template with it."""
    run = {} if run_dir is None else read_run(run_dir)
    data = run.get("data", {})
    if data.get("format") != "chat":
        return QuestionForm(end_context=data.get("format") != "text")
    for key in ("chat_values", "chat_date") if has_template else ("chat_template", "chat_values", "chat_date"):
        trained, given = run["model"][key], getattr(model, key)
        if trained != given and not (key == "chat_template" and _have_same_content(trained, given)):
            raise ValueError(
                f"{run_dir} was trained with model.{key}={trained}, got {given}; give the same, or set chat"
            )
    return QuestionForm(chat=True, system=data["system"])


def find_chat_template(model: ModelConfig, adapter: str) -> str | None:
    """The file of model.chat_template, else of the run's that wrote the adapter: what its answers were learnt behind.

    ValueError where that file is gone.
    """
    run_dir = find_trainer(adapter)
    if model.chat_template is not None or run_dir is None:
        return model.chat_template
    trained: str | None = read_run(run_dir).get("model", {}).get("chat_template")
    if trained is not None and not Path(trained).is_file():
        raise ValueError(f"{run_dir} was trained with model.chat_template={trained}, which is no file; give its copy")
    return trained


def _have_same_content(first: str | None, second: str | None) -> bool:
    paths = [Path(path) for path in (first, second) if path is not None]
    return len(paths) == 2 and all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()


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
    prefix = find_target_prefix(tokenizer)
    if not form.chat:
        prompts, end_tokens = encode_contexts(contexts, tokenizer, end_context=form.end_context, slots=slots)
    else:
        if slots is not None:
            raise ValueError("chat=true: the adapter's prefix positions stand around a pair's context; set chat=false")
        template = load_chat_template(model, tokenizer)
        prompts = _encode_chat(contexts, template, form)
        end_tokens, prefix = template.find_end_tokens(), template.find_answer_prefix()
    return Questions(
        prompts=prompts,
        end_tokens=end_tokens,
        tokenizer=tokenizer,
        form=form,
        answer_prefix=prefix,
        adapter_of_row=adapter_of_row,
    )


def _encode_chat(contexts: Sequence[str], template: ChatTemplate, form: QuestionForm) -> list[list[int]]:
    prompts = []
    for number, context in enumerate(contexts, 1):
        try:
            asked = parse_question(context, form.system) if form.conversations else ask_user(context, form.system)
            prompts.append(template.encode_question(asked))
        except BadRow as problem:
            raise ValueError(f"context {number}: {problem.reason} ({problem.detail})") from None
    return prompts
