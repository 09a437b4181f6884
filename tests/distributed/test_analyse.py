"""`lora-dist analyse` on sharded bases: what one process finds by decomposing whole matrices."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_toy import draw_adapter_values, write_toy_checkpoint
from processes import run_distributed
from safetensors.torch import load_file
from tiers import exhaustive

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.cli.main import main
from lora_dist.config import LoraConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.lora.targets import build_adapter_specs

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def call(words: list[str]) -> int:
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main(words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it with different ranks, and one that has learnt nothing."""
    root = tmp_path_factory.mktemp("analyse")
    model = write_toy_checkpoint(root / "base")
    fingerprint = compute_base_fingerprint(model, 0)
    for name, rank in (("r2", 2), ("r5", 5), ("zero", 1)):
        pattern = {"layers.3.o_proj": 4} if name == "r5" else {}  # a rank of its own among the layers of one target
        specs = build_adapter_specs(LoraConfig(rank=rank, alpha=3, target_modules=TARGETS, rank_pattern=pattern), model)
        values = draw_adapter_values(specs, model, "none")
        if name == "zero":
            values = {key: value * 0 if key.endswith("lora_B") else value for key, value in values.items()}
        adapter = Adapter(specs=specs, bias="none", values=values)
        write_adapter_directory(root / name, adapter, model, {"task": name}, base_fingerprint=fingerprint)
    return root


def analyse(place: Path, output: Path, world_size: int, *more: str) -> dict:
    adapters = f"adapters=[{place / 'r2'},{place / 'r5'}]"
    words = ["analyse", "model=hf", f"model.checkpoint={place / 'base'}", adapters, f"output={output}", *more]
    output.mkdir(parents=True)  # an empty directory is as good as none
    assert run_distributed(call, world_size, words) == [0] * world_size
    return json.loads((output / "analysis.json").read_text())


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return analyse(place, tmp_path_factory.mktemp("whole") / "out", 1)


def find_weight(place: Path, name: str) -> torch.Tensor:
    """[O, H] of one target, out of GPT-2's own file."""
    _, layer, target = name.split(".")
    tensors = load_file(place / "base" / "model.safetensors")
    modules = {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
    module = modules.get(target, "attn.c_attn")
    [weight_HO] = [value for key, value in tensors.items() if key.endswith(f"h.{layer}.{module}.weight")]
    weight_OH = weight_HO.t()
    return weight_OH.chunk(3)["qkv".index(target[0])] if module == "attn.c_attn" else weight_OH


def test_one_process_finds_what_whole_decompositions_say(place: Path, whole: dict) -> None:
    rows = whole["amplification"]
    assert len(rows) == 2 * len(TARGETS) * len({row["name"].split(".")[1] for row in rows})
    for row in rows:
        weight_OH = find_weight(place, row["name"]).double()
        s = torch.linalg.svdvals(weight_OH)
        assert row["weight_norm"] == pytest.approx(float(weight_OH.norm()), rel=1e-5)
        assert row["in_weight_directions"] == pytest.approx(float(s[: row["lora_rank"]].norm()), rel=1e-4)
        assert row["in_update_directions"] <= row["in_weight_directions"] * (1 + 1e-4)
        assert row["factor"] == pytest.approx(row["update_norm"] / row["in_update_directions"])


@pytest.mark.parametrize("sizes", [*exhaustive({"tp_size": 2}, {"pp_size": 2}), {"tp_size": 2, "pp_size": 2}], ids=str)
def test_shards_give_the_same(place: Path, whole: dict, sizes: dict[str, int], tmp_path: Path) -> None:
    world_size = sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    found = analyse(place, tmp_path / "out", world_size, *(f"topology.{key}={size}" for key, size in sizes.items()))
    assert found["similarity"] == whole["similarity"]
    expected = {(row["adapter"], row["name"]): row for row in whole["amplification"]}
    assert len(found["amplification"]) == len(expected)
    for row in found["amplification"]:
        numbers = {key: value for key, value in row.items() if key not in ("adapter", "name", "target")}
        whole_row = expected[row["adapter"], row["name"]]
        assert numbers == pytest.approx({key: whole_row[key] for key in numbers}, rel=1e-4)


def test_heat_maps_and_a_choice_of_layers(place: Path, tmp_path: Path) -> None:
    found = analyse(place, tmp_path / "out", 1, "layers=[1]")
    assert {row["name"] for row in found["amplification"]} == {f"layers.1.{target}" for target in TARGETS}
    assert len(list((tmp_path / "out").glob("similarity-*.png"))) == len(TARGETS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["layers=[9]"], "layers: 9 does not exist"),
        (["adapters=[{place}/zero]"], "layers.0.q_proj changes nothing (its lora_B is zero)"),
        (["adapters=[{place}/none]"], "is not a directory"),
        (["adapters=[]"], "name one or more"),
    ],
)
def test_what_cannot_be_analysed_is_refused(
    more: list[str], message: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["analyse", "model=hf", f"model.checkpoint={place / 'base'}", f"adapters=[{place / 'r2'}]"]
    words = [*words, f"output={tmp_path / 'out'}", *(word.format(place=place) for word in more)]
    assert run_distributed(call, 1, words) == [2]
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
