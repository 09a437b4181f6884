"""The tokenizer loads whole from local files or is refused with the reason; examples have the authors' form."""

import json
from pathlib import Path

import pytest
from data_files import END_OF_TEXT, VOCAB_SIZE, build_config, tiny_tokenizer, write_tokenizer
from tokenizer_files import write_llama_tokenizer
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lora_dist.config import DataConfig
from lora_dist.data.contexts import encode_contexts
from lora_dist.data.examples import draw_fake_examples, encode_pairs
from lora_dist.data.rows import BadRows, Pair
from lora_dist.data.tokenizer import find_start_tokens, find_target_prefix, load_model_tokenizer, load_tokenizer
from lora_dist.files.tokenizer_files import copy_tokenizer

END = VOCAB_SIZE - 1


def test_vocab_and_merges(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path)), VOCAB_SIZE)
    ids = tokenizer("The Vaults \u00e9", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "The Vaults \u00e9"
    assert len(ids) < 10
    assert tokenizer.eos_token_id == END


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "files")
    whole = ByteLevelBPETokenizer(str(tmp_path / "files/vocab.json"), str(tmp_path / "files/merges.txt"))
    whole.add_special_tokens([END_OF_TEXT])
    (tmp_path / "whole").mkdir()
    whole.save(str(tmp_path / "whole/tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "whole"), VOCAB_SIZE)
    text = " The Vaults near The Mill"
    options = {"add_special_tokens": False}
    assert tokenizer(text, **options)["input_ids"] == tiny_tokenizer()(text, **options)["input_ids"]


def test_a_copied_tokenizer_is_the_same_with_all_its_templates(tmp_path: Path) -> None:
    source, target = write_llama_tokenizer(tmp_path / "source"), tmp_path / "target"
    given = PreTrainedTokenizerFast.from_pretrained(source)
    given.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    given.save_pretrained(source)
    (source / "tekken.json").write_text("{}")
    (source / "model.safetensors").touch()
    target.mkdir()
    copy_tokenizer(source, target)
    copied = PreTrainedTokenizerFast.from_pretrained(target)
    assert copied.chat_template == given.chat_template
    assert copied.get_vocab() == given.get_vocab()
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == names - {
        "model.safetensors"
    }


def test_vocabulary_of_another_model(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{directory} has 290 tokens, but model.vocab_size=50257; set model.tokenizer"
    ):
        load_tokenizer(str(directory), 50257)


def test_vocabulary_without_an_end_token(tmp_path: Path) -> None:
    """transformers adds the missing token, one more than the model has."""
    directory = write_tokenizer(tmp_path)
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    del vocab[END_OF_TEXT]
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 290 tokens, but model.vocab_size=289"):
        load_tokenizer(str(directory), VOCAB_SIZE - 1)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    """Without a check of ours the tokenizer would be the end-of-text token alone."""
    (write_tokenizer(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} does not exist; model.tokenizer .* must be a directory with"):
        load_tokenizer(str(tmp_path), VOCAB_SIZE)


def test_missing_directory() -> None:
    with pytest.raises(ValueError, match=r"gpt2/vocab.json does not exist"):
        load_tokenizer("gpt2", 50257)


def test_a_tokenizer_that_its_own_code_reads(tmp_path: Path) -> None:
    """Kimi K2's."""
    for name in ("tiktoken.model", "tokenization_kimi.py"):
        (tmp_path / name).write_text("raise RuntimeError")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_kimi.Kimi", null]}}')
    with pytest.raises(
        ValueError, match=r"has tiktoken.model, which code of its own reads.*; set model.tokenizer to a"
    ):
        load_tokenizer(str(tmp_path), VOCAB_SIZE, family="deepseek_v3")
    write_llama_tokenizer(tmp_path / "written")
    (tmp_path / "tokenizer.json").write_text((tmp_path / "written/tokenizer.json").read_text())
    with pytest.raises(ValueError, match=r"names no eos_token; add it to its tokenizer_config.json"):
        load_tokenizer(str(tmp_path), 1000, family="deepseek_v3")
    config = {"eos_token": "<|end|>", "auto_map": {"AutoTokenizer": ["tokenization_kimi.Kimi", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "TikTokenTokenizer"}))
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k2"}')
    assert load_tokenizer(str(tmp_path), 1000, family="deepseek_v3").eos_token == "<|end|>"


def test_truncated_file(tmp_path: Path) -> None:
    vocab = write_tokenizer(tmp_path) / "vocab.json"
    vocab.write_bytes(vocab.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"vocab.json is not JSON \(.*\)"):
        load_tokenizer(str(tmp_path), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json holds no JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json has no model, so it is no tokenizer's"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (write_tokenizer(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path), VOCAB_SIZE)


def test_directory_of_the_model(tmp_path: Path) -> None:
    """model.tokenizer goes before model.checkpoint; neither is an error that says what to set."""
    model = build_config(DataConfig(name="fake", format="fake")).model
    model.tokenizer, model.checkpoint = str(write_tokenizer(tmp_path)), "elsewhere"
    assert len(load_model_tokenizer(model)) == VOCAB_SIZE
    model.tokenizer, model.checkpoint = None, str(tmp_path)
    assert len(load_model_tokenizer(model)) == VOCAB_SIZE
    model.checkpoint = None
    with pytest.raises(ValueError, match=r"model.tokenizer is not set; give the directory"):
        load_model_tokenizer(model)


def test_form_of_an_example() -> None:
    """Context, end token, a space and the target, end token; the learnt ones are the target's and its end."""
    examples = encode_pairs(
        [Pair(1, "name : Q", "The Mill"), Pair(2, "", "Q")], tiny_tokenizer(), seq_len=40, bad=BadRows("f", "error")
    )
    first, second = (examples.tokens[a:b].tolist() for a, b in zip(examples.starts, examples.starts[1:], strict=False))
    assert tiny_tokenizer().decode(first) == f"name : Q{END_OF_TEXT} The Mill{END_OF_TEXT}"
    assert tiny_tokenizer().decode(second) == f"{END_OF_TEXT} Q{END_OF_TEXT}"
    asks = first.index(END)
    assert examples.is_learnt.tolist() == [
        *(at > asks for at in range(len(first))),
        *(at > 0 for at in range(len(second))),
    ]
    assert examples.num_positions.tolist() == [len(first) - 1, len(second) - 1]
    assert examples.num_loss_tokens.tolist() == [len(first) - 1 - asks, len(second) - 1]


def test_end_token_spelt_in_a_file_is_plain_text() -> None:
    examples = encode_pairs([Pair(1, "a", f"b {END_OF_TEXT}")], tiny_tokenizer(), seq_len=40, bad=BadRows("f", "error"))
    assert examples.tokens.tolist().count(END) == 2


@pytest.mark.parametrize("seq_len", [2, 7, 8])
def test_fake_examples_fill_a_row(seq_len: int) -> None:
    examples = draw_fake_examples(5, vocab_size=11, seq_len=seq_len, seed=3)
    assert examples.num_positions.tolist() == [seq_len] * 5
    assert all(seq_len / 2 <= loss <= seq_len / 2 + 1 for loss in examples.num_loss_tokens)
    assert 0 <= examples.tokens.min() <= examples.tokens.max() < 11
    again = draw_fake_examples(5, vocab_size=11, seq_len=seq_len, seed=4)
    assert examples.tokens.tolist() != again.tokens.tolist()


def test_a_llamas_example_begins_with_its_begin_token(tmp_path: Path) -> None:
    directory = str(write_llama_tokenizer(tmp_path))
    tokenizer = load_tokenizer(directory, 512, family="llama")
    examples = encode_pairs([Pair(1, "The Vaults", "a pub")], tokenizer, seq_len=40, bad=BadRows("f", "error"))
    assert tokenizer.decode(examples.tokens.tolist()) == "<|begin|>The Vaults<|end|> a pub<|end|>"
    assert examples.tokens[int(examples.is_learnt.argmax()) - 1] == tokenizer.eos_token_id
    [context], end = encode_contexts(["The Vaults"], tokenizer, end_context=True)
    assert context == examples.tokens[: len(context)].tolist()
    assert end == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match=r"tokens, but model.vocab_size=100; set model.tokenizer"):
        load_tokenizer(directory, 100, family="llama")


def test_a_tokenizer_that_begins_every_text_with_a_space_gets_no_second_one() -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), MetaspaceDecoder()
    tokenizer.train_from_iterator(["The Vaults is a pub"], BpeTrainer(special_tokens=["<s>", "</s>"]))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert (find_target_prefix(whole), find_start_tokens(whole)) == ("", [])
    assert (find_target_prefix(tiny_tokenizer()), find_start_tokens(tiny_tokenizer())) == (" ", [])
