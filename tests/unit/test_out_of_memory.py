"""What a job whose GPU's memory is full is told to change is what its other settings allow."""

import pytest

from lora_dist.cli.compose import compose_config
from lora_dist.out_of_memory import list_remedies

RECOMPUTE, NF4 = "loop.recompute=full", "model.base_format=nf4"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], ["loop.micro_batch_size=4", RECOMPUTE, NF4]),
        (["loop.micro_batch_size=5"], ["loop.micro_batch_size=1", RECOMPUTE, NF4]),
        (["loop.micro_batch_size=1"], [RECOMPUTE, NF4]),
        (["loop.recompute=full"], ["loop.micro_batch_size=4", NF4]),
        (["cuda_graphs=true"], ["loop.micro_batch_size=4", NF4]),
        (["zero.stage=3"], ["loop.micro_batch_size=4", RECOMPUTE]),
        (["lora.init=pissa"], ["loop.micro_batch_size=4", RECOMPUTE]),
        (["model.base_format=fp8"], ["loop.micro_batch_size=4", RECOMPUTE]),
        (["method=adapter_h"], ["loop.micro_batch_size=4", RECOMPUTE, NF4]),
        (["method=full"], ["loop.micro_batch_size=4", RECOMPUTE, "zero.offload_optimizer=true,"]),
    ],
    ids=str,
)
def test_nothing_is_named_that_would_be_refused(overrides: list[str], named: list[str]) -> None:
    words = ["model=tiny", "data=fake", "data.seq_len=32", "loop.micro_batch_size=8", *overrides]
    *remedies, last = list_remedies(compose_config(words))
    assert [remedy.split()[0] for remedy in remedies] == named
    for word in named:
        compose_config([*words, word.rstrip(",")])
    assert last.startswith("a larger topology.tp_size or pp_size; `lora-dist plan`")
