"""What the first step of a run tells about all of them: bytes that come and go, collectives, FLOPs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_dist.measure.collectives import Collective, count_collectives
from lora_dist.measure.flops import count_flops
from lora_dist.measure.ledger import StepLedger, open_step_ledger
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStep:
    """Of this process; a finished run that is resumed has none."""

    ledger: StepLedger
    collectives: list[Collective]
    flops: int


@contextmanager
def open_first_step_probe(
    gpt: Any, trainable: Sequence[TrainableParameter], topology: Topology, keep: Callable[[FirstStep], None]
) -> Iterator[None]:
    """Around one training step: `keep` gets what it told. The step is slower for it and must not be timed."""
    layers: Sequence[nn.Module] = list(gpt.decoder.layers)
    with (
        count_collectives(topology, layers) as collectives,
        count_flops() as flops,
        open_step_ledger(gpt, trainable) as ledger,
    ):
        yield
    keep(FirstStep(ledger=ledger, collectives=collectives.read(), flops=flops.get_total_flops()))
