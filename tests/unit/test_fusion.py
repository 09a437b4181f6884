"""Chains compiled against the same functions as written, and a machine without a compiler."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import run_distributed
from tiers import few_of

from lora_dist.fusion import Chain, compile_chains
from lora_dist.lora.dropout import _drop
from lora_dist.mcore.gates import (
    _compute_bounded,
    _compute_bounded_grad,
    _compute_grad,
    compute_gated,
    compute_weighted_grad,
)
from lora_dist.mcore.head_loss import _exponentiate, _find_max
from lora_dist.mcore.mixing import _add_biases, _add_weighted_biases, _multiply_biases
from lora_dist.mcore.norm import _compute_norm_input_grad, _compute_rms_grads, _divide_by_rms
from lora_dist.mcore.rotary import turn
from lora_dist.mcore.sinks import compute_sink_grad, join_sinks
from lora_dist.mcore.whole_norm import (
    _compute_input_grad,
    _compute_weight_grad,
    _normalise,
    _scale,
    _sum_products,
    _sum_squares,
)
from lora_dist.quant.blocks import _scale_blocks

N, H = 6, 64
EXPERTS = torch.tensor([0, 0, 1, 1, 1, 2])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def draw_hashes(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)


Arguments = Callable[[torch.dtype], tuple]
CHAINS: dict[str, tuple[Chain, Arguments]] = {
    "rms": (_divide_by_rms, lambda dtype: (draw(N, H, dtype=dtype), draw(H, dtype=dtype), 1e-5)),
    "rms_grads": (
        _compute_rms_grads,
        lambda dtype: (draw(N, H, dtype=dtype), draw(N, H, dtype=dtype), draw(N, 1).abs(), draw(H), True, (True, True)),
    ),
    "norm_grad": (
        _compute_norm_input_grad,
        lambda dtype: (
            *(draw(size, H, dtype=dtype) for size in (N, N)),
            draw(N, 1, dtype=dtype).abs(),
            *draw(2, H, dtype=dtype),
        ),
    ),
    "gate": (compute_gated, lambda dtype: (draw(N, 2 * H, dtype=dtype), False)),
    "gate_grad": (_compute_grad, lambda dtype: (draw(N, H, dtype=dtype), draw(N, 2 * H, dtype=dtype), False)),
    "gelu_gate": (compute_gated, lambda dtype: (draw(N, 2 * H, dtype=dtype), True)),
    "gelu_gate_grad": (_compute_grad, lambda dtype: (draw(N, H, dtype=dtype), draw(N, 2 * H, dtype=dtype), True)),
    "weighted_grad": (
        compute_weighted_grad,
        lambda dtype: (draw(N, H, dtype=dtype), draw(N, 2 * H, dtype=dtype), draw(N, dtype=dtype)),
    ),
    "bounded_gate": (_compute_bounded, lambda dtype: (draw(N, 2 * H, dtype=dtype), 1.702, 1.5)),
    "bounded_grad": (
        _compute_bounded_grad,
        lambda dtype: (draw(N, H, dtype=dtype), draw(N, 2 * H, dtype=dtype), draw(N, dtype=dtype), 1.702, 1.5),
    ),
    "biases": (_add_biases, lambda dtype: (draw(N, H, dtype=dtype), draw(3, H, dtype=dtype), EXPERTS)),
    "weighted_biases": (
        _add_weighted_biases,
        lambda dtype: (draw(N, H, dtype=dtype), draw(3, H, dtype=dtype), EXPERTS, draw(N, dtype=dtype)),
    ),
    "bias_weights": (_multiply_biases, lambda dtype: (draw(N, H, dtype=dtype), draw(3, H, dtype=dtype), EXPERTS)),
    "sinks": (join_sinks, lambda dtype: (draw(2, 3, N, H, dtype=dtype), draw(2, 3, N + 2), draw(3, dtype=dtype))),
    "sink_grad": (
        compute_sink_grad,
        lambda dtype: (*(draw(2, 3, N, H, dtype=dtype) for _ in range(2)), draw(2, 3, N + 2), draw(3, dtype=dtype)),
    ),
    "turn": (
        turn,
        lambda dtype: (draw(N, 2, 3, H, dtype=dtype), *(draw(N, 2, 1, H // 2, dtype=dtype) for _ in range(2))),
    ),
    "whole_squares": (_sum_squares, lambda dtype: (draw(N, 2, 3, H, dtype=dtype),)),
    "whole_norm": (_normalise, lambda dtype: (draw(N, 2, 3, H, dtype=dtype), draw(N, 2).abs())),
    "whole_scale": (_scale, lambda dtype: (draw(N, 2, 3, H, dtype=dtype), draw(N, 2).abs(), draw(3, H, dtype=dtype))),
    "whole_products": (
        _sum_products,
        lambda dtype: (draw(N, 2, 3, H, dtype=dtype), draw(N, 2, 3, H), draw(3, H, dtype=dtype)),
    ),
    "whole_weight_grad": (
        _compute_weight_grad,
        lambda dtype: (draw(N, 2, 3, H, dtype=dtype), draw(N, 2, 3, H), draw(3, H, dtype=dtype)),
    ),
    "whole_input_grad": (
        _compute_input_grad,
        lambda dtype: (
            *(draw(N, 2, 3, H, dtype=dtype), draw(N, 2, 3, H), draw(3, H, dtype=dtype)),
            *(draw(N, 2), draw(N, 2)),
        ),
    ),
    "max": (_find_max, lambda dtype: (draw(N, H),)),
    "exponentiate": (_exponentiate, lambda dtype: (draw(N, H), draw(N), 50)),
    "drop": (_drop, lambda dtype: (draw(N, 2, H, dtype=dtype), draw_hashes(N, 2), draw_hashes(H), 0.3)),
    "fp8": (_scale_blocks, lambda dtype: (draw(N, 1, H).to(torch.float8_e4m3fn), draw(N, 1), dtype)),
}


ALWAYS = ("norm_grad", "bounded_grad", "sink_grad", "turn", "drop", "fp8")


def run_both(chain: Chain, arguments: Arguments, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Results, and the arguments that may have been overwritten."""
    outcomes = []
    for function in (chain.written, chain.compiled):
        given = arguments(dtype)
        result = function(*given)
        overwritten = tuple(one for one in given if isinstance(one, torch.Tensor))
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        outcomes.append((*results, *overwritten))
    return outcomes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", few_of(CHAINS, *ALWAYS))
def test_compiled_chains_compute_the_same(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # compiled, bf16 is rounded once, at the end
    written, compiled = run_both(*CHAINS[name], dtype)
    for expected, actual in zip(written, compiled, strict=True):
        assert actual.dtype == expected.dtype
        error = (actual.float() - expected.float()).abs().max()
        assert error <= tolerance * expected.float().abs().max()


def compile_with(compiler: str) -> str:
    torch._inductor.config.cpp.cxx = (compiler,)
    with pytest.raises(
        ValueError, match=r"^compile=true needs a C\+\+ compiler, e\.g\. g\+\+: [^\n]*; set compile=false$"
    ):
        compile_chains(True, torch.device("cpu"))
    return "refused"


def test_a_machine_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert run_distributed(compile_with, 1, str(tmp_path / "none")) == ["refused"]
