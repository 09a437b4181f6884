"""What `lora-dist analyse` does, from adapters and a sharded base to tables and heat maps; every process runs it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lora_dist.adapter_config import AnalyseConfig
from lora_dist.adapter_jobs import Stored, open_base, open_on_base, tell
from lora_dist.analysis.projections import WeightShard, draw_directions
from lora_dist.analysis.subspaces import compute_input_directions, compute_similarity, decompose_update
from lora_dist.checkpoint.store import Adapter, StoredAdapter
from lora_dist.files.directories import open_new_directory, write_json
from lora_dist.lora.factors import derive_seed
from lora_dist.lora.function import read_weight
from lora_dist.lora.layer import compute_fused_rows, find_shared_ranges
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import WHOLE_TARGETS, find_linear, parse_layers
from lora_dist.mcore.model import ShardedGpt
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.plots import save_heat_map
from lora_dist.run_dir import find_adapter
from lora_dist.topology import run_on_first

_Row = TypeVar("_Row")
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Amplification:
    """Section 7.3 of the paper (table 7) for one adapted weight; U and V hold lora_rank directions each."""

    adapter: str
    name: str
    """layers.N.TARGET"""
    target: str
    lora_rank: int
    weight_norm: float
    """||W||_F"""
    update_norm: float
    """||dW||_F"""
    in_update_directions: float
    """||U^T W V||_F with the update's own directions."""
    in_weight_directions: float
    """The same with the weight's strongest."""
    in_random_directions: float

    @property
    def factor(self) -> float:
        """||dW||_F / ||U^T W V||_F: how far the update amplifies what the weight does little of."""
        return self.update_norm / self.in_update_directions


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """Section 7.2 for one weight of two adapters."""

    first: str
    second: str
    name: str
    target: str
    in_features: int
    phi: list[list[float]]
    """phi[i - 1][j - 1]"""


def analyse(config: AnalyseConfig) -> None:
    """Compare the adapters with one another and with the base; analysis.json, heat maps and a table."""
    layers = parse_layers("layers", config.layers, config.model.num_layers)
    with open_base(config) as gpt:
        stored = [_require_lora(open_on_base(gpt, config, find_adapter(directory))) for directory in config.adapters]
        adapters = {directory: one.read() for directory, one in zip(config.adapters, stored, strict=True)}
        for directory, adapter in adapters.items():
            _check_trained(directory, adapter)
        amplifications = _gather(
            gpt,
            [row for directory, one in adapters.items() for row in amplify(gpt, directory, one, layers, config.seed)],
        )
        similarities = compare_pairs(adapters, layers)
        run_on_first(gpt.topology, lambda: _write(config, stored, amplifications, similarities))
        tell(gpt, f"{format_amplifications(amplifications)}\n\n{format_similarities(similarities)}")
        tell(gpt, f"analysis.json and heat maps are in {config.output}")


def _require_lora(stored: Stored) -> StoredAdapter:
    if not isinstance(stored, StoredAdapter):
        raise ValueError(f"{stored.directory} is of method={stored.method}; name a LoRA, nothing beside it")
    return stored


def _check_trained(directory: str, adapter: Adapter) -> None:
    """The whole adapter, so that every stage refuses it."""
    if adapter.specs[0].use_dora:
        raise ValueError(f"{directory}: DoRA scales the base's rows, so its update is not of low rank; name another")
    for spec in adapter.specs:
        if spec.num_experts is not None:
            raise ValueError(f"{directory}: {spec.name} adapts experts, whose updates analyse has no place for")
        if not adapter.values[f"{spec.name}.lora_B"].any():
            raise ValueError(f"{directory}: {spec.name} changes nothing (its lora_B is zero); name a trained adapter")


def amplify(gpt: ShardedGpt, directory: str, adapter: Adapter, layers: set[int], seed: int) -> list[Amplification]:
    """This stage's weights. Collective over TP."""
    return [
        _amplify_one(gpt, directory, adapter, spec, derive_seed(seed, spec.name, "analyse"))
        for spec in adapter.specs
        if spec.layer in layers and spec.layer in gpt.stage_layers
    ]


@torch.no_grad()
def _amplify_one(gpt: ShardedGpt, directory: str, adapter: Adapter, spec: AdapterSpec, seed: int) -> Amplification:
    update = decompose_update(
        adapter.values[f"{spec.name}.lora_A"], adapter.values[f"{spec.name}.lora_B"], spec.scaling
    )
    weight = cut_weight(gpt, spec)
    k = spec.lora_rank
    random = [draw_directions(size, k, seed + i) for i, size in enumerate((spec.out_features, spec.in_features))]
    return Amplification(
        adapter=directory,
        name=spec.name,
        target=spec.target,
        lora_rank=k,
        weight_norm=weight.compute_norm(),
        update_norm=update.norm,
        in_update_directions=float(weight.project(update.u_OR, update.v_HR).norm()),
        in_weight_directions=float(weight.compute_top_values(k, seed).norm()),
        in_random_directions=float(weight.project(*random).norm()),
    )


def cut_weight(gpt: ShardedGpt, spec: AdapterSpec) -> WeightShard:
    """The target's rows of the linear that holds it, on this rank, in fp32."""
    linear = gpt.get_submodule(f"decoder.layers.{spec.layer - gpt.first_layer}.{find_linear(spec.target, gpt.model)}")
    tp_size = gpt.topology.tp_size
    rows = compute_fused_rows(spec.target, gpt.model, spec.layer, tp_size)
    if spec.target in find_shared_ranges(gpt.model, tp_size):
        raise ValueError(
            f"{spec.name}: topology.tp_size={tp_size} keeps each key-value head on several ranks, which analyse would"
            f" count twice; use at most {gpt.model.num_query_groups}"
        )
    whole = read_weight(linear.weight, torch.float32)
    weight = whole if rows is None else whole[rows[spec.target].to(whole.device)]
    topology, is_whole = gpt.topology, spec.target in WHOLE_TARGETS
    return WeightShard(
        weight_oh=weight.float(),
        column_parallel=linear.column_parallel,
        tp_rank=0 if is_whole else topology.tp_rank,
        group=None if is_whole or topology.tp_size == 1 else topology.tp_group,
    )


def compare_pairs(adapters: dict[str, Adapter], layers: set[int]) -> list[Similarity]:
    """Every pair of adapters on every weight that both adapt."""
    found = []
    for (first, one), (second, other) in combinations(adapters.items(), 2):
        shared = [spec for spec in one.specs if spec.layer in layers and f"{spec.name}.lora_A" in other.values]
        for spec in shared:
            directions = (compute_input_directions(each.values[f"{spec.name}.lora_A"]) for each in (one, other))
            found.append(
                Similarity(
                    first=first,
                    second=second,
                    name=spec.name,
                    target=spec.target,
                    in_features=spec.in_features,
                    phi=compute_similarity(*directions).tolist(),
                )
            )
    return found


def _gather(gpt: ShardedGpt, rows: list[Amplification]) -> list[Amplification]:
    """Those of all stages, on every process; each weight once."""
    topology = gpt.topology
    mine = rows if topology.tp_rank == 0 and topology.zero_rank == 0 else []
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, mine)
    return [row for part in gathered for row in part]


_NORMS = ("weight_norm", "update_norm", "in_update_directions", "in_weight_directions", "in_random_directions")


def format_amplifications(rows: Sequence[Amplification]) -> str:
    """Means over the layers of each target, as the paper's table 7 has them for one layer."""
    lines = [
        f"{'adapter':<24} {'target':<10} {'rank':>4} {'|W|':>9} {'|dW|':>9} {'W in dW':>9} {'W in W':>9}"
        f" {'random':>9} {'amplified':>9}"
    ]
    for (adapter, target, lora_rank), group in _group(
        rows, lambda row: (row.adapter, row.target, row.lora_rank)
    ).items():
        norms = [fmean(getattr(row, key) for row in group) for key in _NORMS]
        cells = " ".join(f"{norm:>9.3f}" for norm in norms)
        lines.append(f"{adapter[-24:]:<24} {target:<10} {lora_rank:>4} {cells} {fmean(r.factor for r in group):>9.2f}")
    return "\n".join(lines)


def format_similarities(rows: Sequence[Similarity]) -> str:
    """phi of the strongest direction alone and of all, by pair and target, and what chance would give."""
    if not rows:
        return "no two adapters adapt the same weight: no similarity to show"
    lines = [f"{'pair':<44} {'target':<10} {'phi(1, 1)':>9} {'phi(1, R)':>9} {'phi(R, R)':>9} {'by chance':>9}"]
    for (first, second, target, *ranks), group in _group(rows, _describe_pair).items():
        firsts = [fmean(row.phi[i][j] for row in group) for i, j in ((0, 0), (0, -1), (-1, -1))]
        cells = " ".join(f"{value:>9.3f}" for value in (*firsts, max(ranks) / group[0].in_features))
        lines.append(f"{first[-20:] + ' / ' + second[-20:]:<44} {target:<10} {cells}")
    return "\n".join(lines)


def _describe_pair(row: Similarity) -> tuple[str, str, str, int, int]:
    """Rows that agree in it have matrices of one shape: ranks may differ from layer to layer."""
    return row.first, row.second, row.target, len(row.phi), len(row.phi[0])


def _group(rows: Sequence[_Row], describe: Callable[[_Row], _Key]) -> dict[_Key, list[_Row]]:
    groups: dict[_Key, list[_Row]] = {}
    for row in rows:
        groups.setdefault(describe(row), []).append(row)
    return groups


def _write(
    config: AnalyseConfig,
    stored: Sequence[StoredAdapter],
    amplifications: Sequence[Amplification],
    similarities: Sequence[Similarity],
) -> None:
    content = {
        "base": config.model.name,
        "adapters": {directory: one.manifest for directory, one in zip(config.adapters, stored, strict=True)},
        "amplification": [asdict(row) | {"factor": row.factor} for row in amplifications],
        "similarity": [asdict(row) for row in similarities],
        "environment": describe_environment(),
    }
    with open_new_directory(Path(config.output)) as output:
        write_json(output / "analysis.json", content)
        _draw(output, similarities)


def _draw(output: Path, similarities: Sequence[Similarity]) -> None:
    for number, ((first, second, target, *_), group) in enumerate(_group(similarities, _describe_pair).items()):
        mean = torch.tensor([row.phi for row in group]).mean(0).tolist()
        save_heat_map(
            output / f"similarity-{number:02d}-{target}.png",
            title=f"phi(i, j), {target}, mean of {len(group)} layers",
            xlabel=f"j, directions of {second[-40:]}",
            ylabel=f"i, directions of {first[-40:]}",
            values=mean,
        )
