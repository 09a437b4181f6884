"""How the modules of a loralib state dict were built, which it does not say: read from the lora_settings.json that
`lora-dist export` writes beside it, else as the user says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.files.directories import read_json
from lora_dist.files.hf_gpt2 import QKV_TARGETS

SETTINGS = "lora_settings.json"
_USUAL_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoralibSettings:
    """Alpha and enable_lora of each module."""

    path: Path
    modules: Mapping[str, Any] | None
    """The content of `path`; None where there is no such file."""
    alpha: float | None
    """The user's, as are `fused_targets`."""
    fused_targets: Sequence[str] | None

    def find_alpha(self, name: str, rank: int) -> float:
        """ValueError where the file has another rank, or another alpha than the user."""
        if self.modules is None:
            assert self.alpha is not None
            return self.alpha
        module = self._find_module(name, self.modules)
        if module["r"] != rank:
            raise ValueError(
                f"{self.path}: {name} has r={module['r']}, but its factors have rank {rank};"
                " if it is of another adapter, move it away and give alpha=..."
            )
        alpha: float = module["lora_alpha"]
        if self.alpha is not None and not math.isclose(self.alpha, alpha):
            raise ValueError(f"alpha={self.alpha}, but {self.path} has lora_alpha={alpha} of {name}; leave alpha out")
        return alpha

    def find_targets(self, name: str, num_parts: int) -> list[str]:
        """Those of q, k, v, in this order, that a MergedLinear adapts. ValueError where they are not `num_parts`."""
        targets: Sequence[str] | None = self._find_enabled(name)
        if targets is None:
            targets = QKV_TARGETS if num_parts == 3 else self.fused_targets or _USUAL_TARGETS
        if len(targets) != num_parts or not set(targets) <= set(QKV_TARGETS):
            raise ValueError(f"{name} adapts {num_parts} of q_proj, k_proj, v_proj; fused_targets={list(targets)}")
        return sorted(targets, key=QKV_TARGETS.index)

    def _find_enabled(self, name: str) -> list[str] | None:
        """None where the file does not say. ValueError where the user says otherwise."""
        enabled = None if self.modules is None else self._find_module(name, self.modules).get("enable_lora")
        if enabled is None:
            return None
        if not isinstance(enabled, list) or len(enabled) != len(QKV_TARGETS):
            raise ValueError(f"{self.path}: {name} has enable_lora={enabled}, no list of three, for q, k and v")
        targets = [target for target, is_on in zip(QKV_TARGETS, enabled, strict=True) if is_on]
        if self.fused_targets is not None and set(self.fused_targets) != set(targets):
            raise ValueError(
                f"fused_targets={list(self.fused_targets)}, but {self.path} has enable_lora={enabled} of {name};"
                " leave fused_targets out"
            )
        return targets

    def _find_module(self, name: str, modules: Mapping[str, Any]) -> Mapping[str, Any]:
        module = modules.get(name)
        keys = ("r", "lora_alpha")
        if not isinstance(module, dict) or not all(isinstance(module.get(key), int | float) for key in keys):
            raise ValueError(
                f"{self.path} has no numbers r and lora_alpha of {name}; if it is of another adapter,"
                " move it away and give alpha=..."
            )
        return module


def read_settings(source: Path, alpha: float | None, fused_targets: Sequence[str] | None) -> LoralibSettings:
    """`alpha` and `fused_targets` are the user's. ValueError where nothing says alpha."""
    path = source.parent / SETTINGS
    modules = read_json(path) if path.is_file() else None
    if modules is None and alpha is None:
        raise ValueError(f"alpha={alpha}: format=loralib: alpha is needed, as there is no {path}")
    return LoralibSettings(path=path, modules=modules, alpha=alpha, fused_targets=fused_targets)
