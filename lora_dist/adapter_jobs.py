"""What the adapter verbs do on a live sharded model, from configuration to files; every process of the job runs it."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from lora_dist.adapter_config import ExportConfig, LiveConfig, SwitchConfig
from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.method_store import StoredMethod, load_method, open_method, read_method_name
from lora_dist.checkpoint.store import StoredAdapter, open_adapter
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint, read_dtype
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.adapters import apply_lora
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.hf_weights import fill_base, write_hf_checkpoint
from lora_dist.mcore.indexer_weights import open_indexers
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, attach_adapters, attach_alone, load_shards
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import open_topology
from lora_dist.mcore.prefixes import put_prefixes
from lora_dist.mcore.rounded import dequantize_base
from lora_dist.out_of_memory import ON_MORE_GPUS, explain_out_of_memory
from lora_dist.parameters import TrainableParameter
from lora_dist.prefix.spec import build_prefix_specs
from lora_dist.prefix_config import PrefixConfig
from lora_dist.questions import find_chat_template
from lora_dist.run_dir import find_adapter
from lora_dist.topology import DTYPES, check_device, choose_device, run_on_first


def export_files(config: ExportConfig) -> None:
    """An adapter's own files in another tool's format; one process, no model."""
    fingerprint = compute_base_fingerprint(config.model, config.seed)
    stored = open_adapter(Path(find_adapter(config.adapter)), model=config.model, base_fingerprint=fingerprint)
    export_adapter(stored, Path(config.output), config.format)
    print(f"{config.adapter} is in {config.output} as {config.format}", flush=True)
    if config.format == "peft_split" and config.model.architecture.fused_targets:
        fused = " and ".join("/".join(targets) for targets in config.model.architecture.fused_targets)
        print(
            f"transformers' {config.model.family} makes {fused} with one linear, on which PEFT would pass over"
            " adapters of each; for that model use format=peft",
            flush=True,
        )


def write_merged(config: LiveConfig, adapter: str, output: str) -> None:
    """The base with the adapter in it as a Hugging Face checkpoint; a process holds its shard and one whole tensor.

    A chat template that the run trained with goes with it.

    Under another model.base_format than native the base is what the format makes of it, since the adapter was
    trained on that.
    """
    written = replace(config.model, chat_template=find_chat_template(config.model, adapter))
    with open_base(config) as gpt:
        loaded = load(gpt, open_on_base(gpt, config, adapter))
        if config.model.base_format != "native":
            loaded = _merge_dequantized(gpt, config.model.base_format, loaded)
        LiveMerge(gpt, keep_base=False).merge(loaded)
        write_hf_checkpoint(gpt, output, model=written)
        tell(gpt, f"{adapter} merged into {config.model.name} is in {output}")


def _merge_dequantized(gpt: ShardedGpt, base_format: str, loaded: LoadedAdapter) -> LoadedAdapter:
    """Merge the factors into what `base_format` makes of the base; what is left to merge."""
    error = dequantize_base(gpt, loaded.shards)
    tell(
        gpt,
        f"the base as {base_format} holds it, with the adapter: rounding to {gpt.config.params_dtype} changes a weight"
        f" by {error.largest:.3g} at most, {error.rms:.3g} RMS",
    )
    return replace(loaded, shards={})


def measure_switch(config: SwitchConfig) -> None:
    """Merge every adapter in turn, unmerge, compare with the base, and print what it took."""
    with open_base(config) as gpt:
        adapters = [load(gpt, open_on_base(gpt, config, find_adapter(directory))) for directory in config.adapters]
        open_indexers(gpt, config.seq_len)
        before, live = _hash_parameters(gpt), LiveMerge(gpt)
        forward_ms = _time(gpt, lambda: _run_forward(gpt, config), config.num_repeats)
        tell(gpt, f"one forward pass of {config.batch_size} x {config.seq_len} tokens: {forward_ms:.1f} ms")
        for index, adapter in enumerate(adapters):
            other, merge = adapters[index - 1], partial(live.merge, adapter)
            switch_ms = _time(gpt, merge, config.num_repeats, prepare=partial(live.merge, other))
            kept = live.kept_bytes / 2**20
            tell(gpt, f"switched to {adapter.name}: {switch_ms:.1f} ms, base rows kept {kept:.1f} MiB a process")
        unmerge_ms = _time(gpt, live.unmerge, 1)
        assert _hash_parameters(gpt) == before, "unmerging left a weight changed"
        tell(gpt, f"unmerged: {unmerge_ms:.1f} ms, every weight as before, bit for bit")


@contextmanager
def open_base(config: LiveConfig) -> Iterator[ShardedGpt]:
    """The frozen base on this job's processes, in config.dtype or else the dtype that its checkpoint has."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(config.device, local_rank)
    if config.dtype is not None or config.model.checkpoint is None:
        dtype = DTYPES[config.dtype or "fp32"]
    else:
        dtype = read_dtype(config.model.checkpoint)
    check_device(device, {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32"))
    less = [ON_MORE_GPUS, "for generate and evaluate fewer rows at once (generate.batch_size)"]
    opened = open_topology(config.topology, device=device, local_rank=local_rank, seed=config.seed)
    with opened as topology, explain_out_of_memory(device, less):
        gpt = build_model(config.model, topology, dtype=dtype, clock=DropoutClock())
        fill_base(gpt, config.model, seed=config.seed)
        yield gpt.requires_grad_(False).eval()


Stored = StoredAdapter | StoredMethod


def open_on_base(gpt: ShardedGpt, config: LiveConfig, directory: str) -> Stored:
    """ValueError, on every process, where the adapter is damaged or another base's. Collective."""
    fingerprint = run_on_first(gpt.topology, lambda: compute_base_fingerprint(config.model, config.seed))
    return run_on_first(gpt.topology, lambda: _open_stored(Path(directory), config.model, fingerprint))


def _open_stored(directory: Path, model: ModelConfig, base_fingerprint: str) -> Stored:
    if read_method_name(directory) is not None:
        return open_method(directory, model=model, base_fingerprint=base_fingerprint)
    return open_adapter(directory, model=model, base_fingerprint=base_fingerprint)


def load(gpt: ShardedGpt, stored: Stored) -> LoadedAdapter:
    """This process's shards of the adapter; each reads the file for itself. BitFit's are biases alone.

    ValueError for bottlenecks and prefix vectors, which are in no weight of the base.
    """
    if isinstance(stored, StoredMethod):
        if not stored.needs_merge:
            what = "bottlenecks" if stored.prefix is None else "prefix vectors"
            raise ValueError(
                f"adapter {stored.directory} is of method={stored.method}: {what} cannot be merged, exported or"
                " mixed in one batch; lora-dist generate adapter=DIR runs them beside the weights"
            )
        return load_shards(gpt, str(stored.directory), [], stored.read())
    return load_shards(gpt, str(stored.directory), stored.specs, stored.read().values)


def put_adapters(gpt: ShardedGpt, adapters: Sequence[Stored], *, merge: bool, mixed: bool = False) -> None:
    """Beside the weights, or the one there is into them; `mixed` where each row of a batch names its own."""
    first = adapters[0] if adapters else None
    if isinstance(first, StoredMethod) and not (first.needs_merge or merge or mixed):
        put_beside(gpt, first)
        return
    loaded = [load(gpt, adapter) for adapter in adapters]
    if mixed:
        attach_adapters(gpt, loaded)
    elif merge and loaded:
        LiveMerge(gpt, keep_base=False).merge(loaded[0])
    elif loaded:
        attach_alone(gpt, loaded[0])


def find_slots(adapters: Sequence[Stored]) -> PrefixConfig | None:
    """The positions that the one adapter's method adds to every prompt; None where it adds none."""
    first = adapters[0] if adapters else None
    return first.prefix if isinstance(first, StoredMethod) else None


def put_beside(gpt: ShardedGpt, stored: StoredMethod) -> None:
    """Into a model that does not train, what is in no weight of it; each process reads the file for itself."""
    put = _put_bottlenecks(gpt, stored) if stored.prefix is None else _put_prefixes(gpt, stored, stored.prefix)
    load_method(stored, options={"method": stored.method}, trainable=put, topology=gpt.topology)
    gpt.requires_grad_(False)


def _put_bottlenecks(gpt: ShardedGpt, stored: StoredMethod) -> list[TrainableParameter]:
    assert stored.bottleneck is not None
    specs = build_bottleneck_specs(stored.method, stored.bottleneck, stored.model)
    return apply_bottlenecks(gpt, specs, init_std=stored.bottleneck.init_std, seed=0)


def _put_prefixes(gpt: ShardedGpt, stored: StoredMethod, prefix: PrefixConfig) -> list[TrainableParameter]:
    """With LoRA's factors where the method has them."""
    specs = build_prefix_specs(stored.method, prefix, stored.model)
    vectors = put_prefixes(gpt, specs, init_std=prefix.init_std, seed=0)
    return vectors + apply_lora(gpt, stored.specs, bias="none", seed=0)


def tell(gpt: ShardedGpt, message: str) -> None:
    """A line from the job's first process."""
    if gpt.topology.global_rank == 0:
        print(message, flush=True)


def _hash_parameters(gpt: ShardedGpt) -> dict[str, str]:
    return {
        name: hashlib.sha256(parameter.cpu().flatten().view(torch.uint8).numpy().data).hexdigest()
        for name, parameter in gpt.named_parameters()
    }


def _time(
    gpt: ShardedGpt, action: Callable[[], object], num_repeats: int, prepare: Callable[[], object] = lambda: None
) -> float:
    """Median milliseconds of `action`, each time after `prepare`."""
    times = []
    for _ in range(num_repeats):
        prepare()
        _wait_for_device(gpt)
        start = time.perf_counter()
        action()
        _wait_for_device(gpt)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def _wait_for_device(gpt: ShardedGpt) -> None:
    if gpt.topology.device.type == "cuda":
        torch.cuda.synchronize(gpt.topology.device)


@torch.no_grad()
def _run_forward(gpt: ShardedGpt, config: SwitchConfig) -> None:
    tokens_BS = torch.zeros(config.batch_size, config.seq_len, dtype=torch.long, device=gpt.topology.device)
    gpt(tokens_BS, torch.arange(config.seq_len, device=tokens_BS.device).expand_as(tokens_BS), None)
