"""What every test needs: heavy packages imported once, before tests fork their processes."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
# A forked process would wait forever for its parent's compiler threads, which a fork does not copy.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from tiers import list_left_out

import lora_dist.run  # noqa: F401
from lora_dist.cli.compose import compose_config
from lora_dist.uncompiled import without_compiler

_ENGINE = (
    *("deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer"),
)
"""What DeepSpeed's first engine loads."""
_OPTIMIZER_AND_PROFILE = ("torch._dynamo", "torch._subclasses.schema_check_mode", "torch.profiler._cupti_monitor")
"""What the first optimizer and the first profile load."""


def _load(modules: tuple[str, ...]) -> None:
    """What not every version has is left to the processes that want it."""
    for module in modules:
        with suppress(ModuleNotFoundError):
            import_module(module)


with without_compiler():
    _load(_ENGINE)
_load(_OPTIMIZER_AND_PROFILE)
torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # loads its lazy modules
compose_config([])  # builds Hydra's grammar
torch.manual_seed(0)  # asks devices that are not there, and reads sources for that
torch.set_num_threads(1)
_CACHE = tempfile.TemporaryDirectory(prefix="lora_dist_tests_")
os.environ["LORA_DIST_CACHE"] = _CACHE.name  # the user's own stays as it is


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run every combination of parameters, not every value")


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("exhaustive") or any("::" in argument for argument in config.args):
        return
    left_out = set(list_left_out(items))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """No forked process walks, and thereby copies, what was there before it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _keep_environment() -> Iterator[None]:
    """A verb that a test runs in this process leaves RANK and its like, which the next test's launches would take."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of toys, and their blocks, are cut where a layer sees a window: forked processes inherit it."""
    monkeypatch.setattr("lora_dist.mcore.window._TILE_MULTIPLE", 1)
    monkeypatch.setattr("lora_dist.mcore.window._TILES_A_WINDOW", 3)
