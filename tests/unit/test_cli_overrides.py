"""Text that a user types arrives as it was typed, and paths from home as the shell would have written them."""

from pathlib import Path

import pytest
from tiers import few_of

from lora_dist.cli.compose import compose_as, compose_config
from lora_dist.generation_config import GenerateConfig

TEXTS = ["true", "1.50", "1e3", "1_000", "nan", "What is LoRA?", "a, b: {c} [d]", "it's", 'say "a"', "x ${device} y"]
TEXTS += ['"Yes" or "no"', "'a' 'b'", "\\", "a\\${h}", "\u00e9 \u4e2d", "~/x", "'", "=", "(a|b)", "$h", "  spaced "]


def read_prompt(override: str) -> str | None:
    return compose_as(GenerateConfig, ["model=demo", override]).generate.prompt


@pytest.mark.parametrize("text", few_of(TEXTS, *TEXTS[::3]))
def test_a_prompt_is_what_was_typed(text: str) -> None:
    assert read_prompt(f"generate.prompt={text}") == text
    if '"' not in text and not text.endswith("\\"):
        assert read_prompt(f'generate.prompt="{text}"') == text
    if "'" not in text and not text.endswith("\\"):
        assert read_prompt(f"generate.prompt='{text}'") == text


def test_null_is_no_text() -> None:
    config = compose_as(GenerateConfig, ["model=demo", "generate.prompt=null", "generate.input=f"])
    assert config.generate.prompt is None


@pytest.mark.parametrize("name", ["2026_11_29", "1e3", "true", "run-1.5", "0x10", "null1"])
def test_a_name_that_looks_like_a_number_stays_a_name(name: str) -> None:
    config = compose_config([f"run_dir={name}", f"track.project={name}", "data.train_split=null"])
    assert (config.run_dir, config.track.project, config.data.train_split) == (name, name, None)


@pytest.mark.parametrize("path", ["/a (b)/c, d", "[a,b]", "it's/x", "a=b", "{x}", "50%/#1", "a\\b", "C:\\x\\"])
def test_a_path_is_what_was_typed(path: str) -> None:
    assert compose_config([f"data.valid={path}"]).data.valid == path


def read_adapters(*elements: str) -> list[str]:
    return compose_as(GenerateConfig, ["model=demo", "generate.input=f", f"adapters=[{','.join(elements)}]"]).adapters


@pytest.mark.parametrize(
    "path", ["/日本/x", "/a(1)/x", "/a (b)", "a=b", "50%/#1", "a\\b", "a&b;c!", "2026_11_29", "1e3", "true", "C:\\x"]
)
def test_a_path_in_a_list_is_what_was_typed(path: str) -> None:
    assert read_adapters(path) == [path]
    assert read_adapters(f" {path}", f"{path} ", "/z") == [path, path, "/z"]
    assert read_adapters(f"'{path}'", f'"{path}"') == [path, path]


def test_lists_are_hydras_where_they_say_so() -> None:
    """Quotes, references, and what a backslash stands before."""
    assert read_adapters(r"a\,b", r"\[0\]", r"日\=\(", "'it,s'", "${model.name}/x") == [
        "a,b",
        "[0]",
        "日=(",
        "it,s",
        "demo/x",
    ]
    assert compose_config(["lora.layers=[0-1,3]"]).lora.layers == ["0-1", "3"]
    assert compose_config(["lora.layers=null", "lora.modules_to_save=[]"]).lora.modules_to_save == []
    with pytest.raises(ValueError, match=r"^adapters=\[a\[0\]\]: cannot be read"):
        read_adapters("a[0]")


def test_references_and_groups_are_hydras() -> None:
    config = compose_config(["run_dir=runs/${model.name}-${loop.seed}", "method=full", "model=tiny", "data=fake"])
    assert (config.run_dir, config.method) == ("runs/tiny-0", "full")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("~/a b", "'~/a b'", '"~/a b"'):
        assert compose_config([f"run_dir={written}"]).run_dir == f"{tmp_path}/a b"
    assert compose_config(["run_dir=~"]).run_dir == str(tmp_path)
    assert compose_config(["run_dir=a~b"]).run_dir == "a~b"
    several = compose_as(GenerateConfig, ["model=demo", "generate.input=f", "adapters=[~/x, ~/y,z]"]).adapters
    assert several == [f"{tmp_path}/x", f"{tmp_path}/y", "z"]


def test_a_pattern_that_cannot_be_read_is_told_as_typed() -> None:
    typed = "lora.rank_pattern={layers.[01].q_proj:3}"
    with pytest.raises(ValueError, match=r"^lora.rank_pattern=\{layers.*: cannot be read; put a backslash before each"):
        compose_config([typed])
    config = compose_config([r"lora.rank_pattern={layers.\[01\].q_proj: 3}"])
    assert dict(config.lora.rank_pattern) == {"layers.[01].q_proj": 3}
