"""A small tokenizer with chat templates of the kinds in circulation."""

import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CHAT_VOCAB_SIZE = 320
_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

CHATML = (
    "{% for message in messages %}"
    + _TURN
    + "{% if message['role'] == 'assistant' %}"
    + "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    + "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    + _ASK
)
"""One turn after another; its marks tell transformers too what is the assistant's."""
THINKING = (
    "{% for message in messages %}"
    + _TURN
    + "{% set content = message['content'] %}"
    + "{% if message['role'] == 'assistant' and not loop.last %}"
    + "{% set content = content.split('</think>')[-1] %}{% endif %}"
    + "{{ content + '<|im_end|>\\n' }}{% endfor %}"
    + _ASK
)
"""Leaves out what was thought in all turns but the last."""
DATED = (
    "{% if not date_string is defined %}"
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ 'Today: ' + date_string + '\\n' }}"
    + CHATML
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('only users and assistants speak here') }}{% endif %}{% endfor %}"
)
"""No special token before an answer."""
LAST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'] + ' ', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""The system message is part of the last question, where no answer follows it."""


def write_chat_tokenizer(directory: Path, template: str | None = CHATML) -> Path:
    """Byte-level BPE with the end-of-text token of its kind, and two that mark turns."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    special = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        vocab_size=CHAT_VOCAB_SIZE,
        show_progress=False,
    )
    lines = [
        "user assistant system",
        "The Vaults is a pub near The Mill",
        "What is The Mill? It is a riverside pub.",
    ] * 3
    tokenizer.train_from_iterator(lines, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|endoftext|>")
    whole.chat_template = template
    whole.save_pretrained(directory)
    return directory


@cache
def chat_directory(template: str | None = CHATML) -> str:
    """One directory for each template and process."""
    return str(write_chat_tokenizer(Path(mkdtemp(prefix="chat", dir=os.environ["LORA_DIST_CACHE"])), template))
