"""Trainable parameters of the baselines: from the paper's formula, from the configuration, as the paper prints them."""

import pytest
import torch

from lora_dist.base_shapes import count_parameters
from lora_dist.bottleneck.layer import Bottleneck
from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.bottleneck_config import BottleneckConfig
from lora_dist.cli.compose import compose_config
from lora_dist.methods.count import count_trainable

_NORMS = (0, 24, 48, 49)
"""None, one a layer, both, and the last one too."""
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
    assert count("model=gpt3_175b", "method=full") == count_parameters(compose_config(["model=gpt3_175b"]).model)


def compute_formula(num_bottlenecks: int, h: int, r: int, num_norms: int) -> int:
    """L_adpt (2 d_model r + r + d_model) + 2 L_LN d_model, the paper's section 5.1."""
    return num_bottlenecks * (2 * h * r + r + h) + 2 * num_norms * h


@pytest.mark.parametrize(("size", "paper"), [(224, 11.09), (6, 0.37)])
def test_adapter_l_of_gpt2_medium(size: int, paper: float) -> None:
    ours = count("model=gpt2_medium", "method=adapter_l", f"bottleneck.size={size}")
    assert ours == compute_formula(24, 1024, size, num_norms=24)
    assert ours / 1e6 == pytest.approx(paper, abs=0.005)


@pytest.mark.parametrize(("size", "paper"), [(1, 7.1), (8, 40.1)])
def test_adapter_h_of_gpt3(size: int, paper: float) -> None:
    ours = count("model=gpt3_175b", "method=adapter_h", f"bottleneck.size={size}")
    assert ours == compute_formula(2 * 96, 12288, size, num_norms=0)
    assert ours / 1e6 == pytest.approx(paper, abs=0.05)


def test_adapter_h_of_gpt2_medium_is_not_the_papers() -> None:
    """The paper prints 11.09M, AdapterL's count; by its formula no size gives that, with norms counted or without."""
    counts = {
        (size, norms): compute_formula(48, 1024, size, norms) / 1e6
        for size in range(1, 256)
        for norms in (0, 24, 48, 49)
    }
    assert not [key for key, millions in counts.items() if millions == pytest.approx(11.09, abs=0.005)]
    nearest = count("model=gpt2_medium", "method=adapter_h", "bottleneck.size=112")
    assert nearest == compute_formula(48, 1024, 112, num_norms=0) == 11_064_576


@pytest.mark.parametrize("method", ["adapter_h", "adapter_l"])
def test_the_modules_hold_what_is_counted(method: str) -> None:
    config = compose_config(["model=tiny", "data.seq_len=128", f"method={method}", "bottleneck.size=5"])
    specs = build_bottleneck_specs(method, config.bottleneck, config.model)
    modules = [Bottleneck(spec, init_std=0.01, seed=0) for spec in specs]
    assert sum(p.numel() for module in modules for p in module.parameters()) == count_trainable(config)


def test_bottlenecks_start_near_the_identity_and_do_what_they_say() -> None:
    config = BottleneckConfig(size=5, activation="relu")
    model = compose_config(["model=tiny", "data.seq_len=128"]).model
    spec = build_bottleneck_specs("adapter_l", config, model)[1]
    module = Bottleneck(spec, init_std=0.01, seed=0).double()
    x = torch.randn(3, 2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 0 < (module(x) - x).abs().max() < 0.02
    other = Bottleneck(spec, init_std=0.01, seed=0)
    assert all(torch.equal(a.double(), b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
    assert module.down_weight.detach().abs().max() <= 0.02
    assert module.down_weight.detach().std() == pytest.approx(
        0.88 * 0.01, rel=0.15
    )  # cut off at two standard deviations
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    deviation = x.var(-1, correction=0, keepdim=True).add(spec.norm_epsilon).sqrt()
    normed = (x - x.mean(-1, keepdim=True)) / deviation * module.norm_weight + module.norm_bias
    hidden = (normed @ module.down_weight.T + module.down_bias).clamp(min=0)
    torch.testing.assert_close(module(x), x + hidden @ module.up_weight.T + module.up_bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bottleneck.size=0", "bottleneck.size=0 must be at least 1"),
        ("bottleneck.activation=tanh", "bottleneck.activation='tanh' is not one of gelu, relu"),
        ("bottleneck.init_std=0", "bottleneck.init_std=0.0 must be positive"),
        ("method=prefix", "no file conf/method/prefix.yaml"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        compose_config([override])
    assert message in str(refusal.value)
