"""One training step under every instrument at once: bytes, FLOPs, collectives. Too slow to be timed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from lora_dist.measure.collectives import Collective, compute_count_per_layer, count_collectives
from lora_dist.measure.flops import count_flops
from lora_dist.measure.ledger import StepLedger, open_step_ledger
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology


@dataclass(slots=True)
class Probe:
    """What one step took on this process; complete once the context that made it has closed."""

    step: StepLedger = field(default_factory=StepLedger)
    flops: int = 0
    collectives: list[Collective] = field(default_factory=list)
    tp_collectives_per_layer: float = 0.0
    """Calls over TP that a transformer layer issues in one microbatch's forward and backward, on average."""


@contextmanager
def open_probe(
    gpt: nn.Module,
    layers: Sequence[nn.Module],
    trainable: Sequence[TrainableParameter],
    topology: Topology,
    *,
    num_microbatches: int,
) -> Iterator[Probe]:
    """Around one whole training step; `layers` are this stage's transformer layers. Communicates nothing itself."""
    probe = Probe()
    with (
        open_step_ledger(gpt, trainable) as step,
        count_collectives(topology, layers) as counter,
        count_flops() as flops,
    ):
        yield probe
    probe.step, probe.flops, probe.collectives = step, flops.get_total_flops(), counter.read()
    probe.tp_collectives_per_layer = compute_count_per_layer(
        probe.collectives, group="tp", num_layers=len(layers), num_microbatches=num_microbatches
    )
