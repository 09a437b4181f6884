"""Trainable parameters of the baselines: from the paper's formula, from the configuration, as the paper prints them."""

import pytest

from lora_dist.cli.compose import compose_config
from lora_dist.methods.count import count_trainable

GPT3 = {"num_layers": 96, "hidden_size": 12288}


def count(*overrides: str) -> int:
    return count_trainable(compose_config(list(overrides), on_paper=True))


def test_bitfit() -> None:
    """The paper says 14.2M for GPT-3: hidden_size a layer more than the biases of GPT-3's blocks and norms."""
    biases = count("model=gpt3_175b", "method=bitfit")
    layers, h = GPT3["num_layers"], GPT3["hidden_size"]
    assert biases == layers * (3 * h + h + 4 * h + h + 2 * h) + h == 12_988_416
    assert (biases + layers * h) / 1e6 == pytest.approx(14.2, abs=0.05)


def test_lora_and_full() -> None:
    assert count("model=gpt3_175b", "method=lora") == 18_874_368
    assert count("model=gpt3_175b", "method=full") == compose_config(["model=gpt3_175b"]).model.num_parameters
