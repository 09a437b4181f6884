"""A sharded model run step by step: keys and values kept on the ranks that own their heads, or the latents that they
come from on each, stages in turn.

The last stage's first TP rank alone gathers the vocabulary, of the last position only, and chooses; the others are
told the tokens. Replicas never wait for each other.

Shapes: B contexts, R rows that run, C columns of one forward pass, V vocabulary, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist

from lora_dist.generation.batches import PromptBatch, compute_mask, compute_positions, find_text
from lora_dist.generation.cache import LayerCache, StateCache
from lora_dist.generation.decode import Choice, Search
from lora_dist.mcore.attention import LayerMasks, SdpaAttention
from lora_dist.mcore.delta_net import DeltaHeads
from lora_dist.mcore.indexer import Indexer
from lora_dist.mcore.latent_attention import LatentAttention
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.selected_attention import SelectedAttention
from lora_dist.prefix.slots import split_slots

_GOES_ON, _FINISHED, _NOT_FINITE = range(3)


@contextmanager
def open_incremental(gpt: ShardedGpt, *, num_rows: int, num_columns: int) -> Iterator["IncrementalGpt"]:
    """`gpt` with room in each of its layers for `num_rows` rows of `num_columns` tokens, given up at the end.

    Dropout is off from here on.
    """
    caches = {
        module: StateCache() if isinstance(module, DeltaHeads) else LayerCache(num_rows, num_columns)
        for module in gpt.modules()
        if isinstance(module, SdpaAttention | LatentAttention | DeltaHeads | Indexer)
        and not isinstance(module, SelectedAttention)  # whose layer keeps latents
    }
    model = IncrementalGpt(gpt, list(caches.values()))
    gpt.eval()
    gpt.only_last_position, gpt.clock.row_keys_B = True, None
    for attention, cache in caches.items():
        attention.cache = cache
    try:
        yield model
    finally:
        gpt.only_last_position, gpt.clock.adapter_of_row, gpt.slots_BS = False, (), None
        for attention in caches:
            attention.cache = None


def check_cache_fits(gpt: ShardedGpt, *, num_rows: int, num_columns: int) -> None:
    """ValueError, with the numbers, on every process where one of them has not the memory. Collective."""
    needed = compute_cache_bytes(gpt, num_rows=num_rows, num_columns=num_columns)
    room = torch.tensor([_read_free_bytes(gpt.topology.device) - needed], device=gpt.topology.device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN)
    if room.item() < 0:
        raise ValueError(
            f"keys and values of {num_rows} rows of {num_columns} tokens take {needed / 2**30:.1f} GiB a process,"
            f" {-room.item() / 2**30:.1f} GiB more than a process has free; lower generate.batch_size or num_beams"
        )


def _read_free_bytes(device: torch.device) -> int:
    """What new tensors may take, memory that torch holds unused included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def compute_cache_bytes(gpt: ShardedGpt, *, num_rows: int, num_columns: int) -> int:
    """Bytes that the keys and values, latents or states of this process's layers and heads take, and indexers' keys."""
    config = gpt.config
    bytes_per_token = _count_kept_features(gpt) * config.params_dtype.itemsize
    num_recurrent = sum(map(gpt.model.has_delta_net, gpt.stage_layers))
    states = num_recurrent * num_rows * compute_state_bytes(gpt) if num_recurrent else 0
    num_indexers = sum(map(gpt.model.has_indexer, gpt.stage_layers)) if gpt.indexes else 0
    bytes_of_indexers = num_indexers * (gpt.model.indexer_head_size or 0) * config.params_dtype.itemsize
    bytes_per_token = (gpt.num_stage_layers - num_recurrent) * bytes_per_token + bytes_of_indexers
    return num_rows * num_columns * bytes_per_token + states


def _count_kept_features(gpt: ShardedGpt) -> int:
    """Of one token in one layer with attention, on this process."""
    if gpt.model.kv_latent_size is not None:
        return gpt.model.kv_latent_size + gpt.model.rotary_size
    num_heads = max(1, gpt.config.num_query_groups // gpt.topology.tp_size)
    return num_heads * (gpt.model.head_dim + gpt.model.value_dim)


def compute_state_bytes(gpt: ShardedGpt) -> int:
    """Of one row in one gated DeltaNet, on this process."""
    sizes, dtype = gpt.model.delta_sizes.cut(gpt.topology.tp_size), gpt.config.params_dtype
    state = sizes.value_heads * sizes.key_size * sizes.value_size
    tails = sizes.key_heads * sizes.convolved_per_key * (sizes.kernel_size - 1)
    return state * torch.promote_types(dtype, torch.float32).itemsize + tails * dtype.itemsize


class IncrementalGpt:
    """`generation.decode.IncrementalModel` over this process's shard; all processes of a replica call it alike."""

    def __init__(self, gpt: ShardedGpt, caches: list[LayerCache | StateCache]) -> None:
        self._gpt, self._caches = gpt, caches
        self._rows = self._num_padding_R = torch.zeros(0, dtype=torch.int64, device=gpt.topology.device)
        self._adapter_of_row: tuple[int | None, ...] = ()

    @property
    def num_columns_kept(self) -> int:
        """Columns in the cache before the next forward pass."""
        return self._caches[0].length

    def prefill(self, batch: PromptBatch) -> torch.Tensor | None:
        """Logits [B, V] after each context, on the process that chooses."""
        self._num_padding_R, self._adapter_of_row = batch.num_padding_B, batch.adapter_of_row
        self._rows = torch.arange(batch.num_rows, device=batch.tokens_BS.device)
        return self._run(batch.tokens_BS)

    def step(self, choice: Choice) -> torch.Tensor | None:
        """Logits [R, V] after one more token a row, on the process that chooses."""
        self._num_padding_R = self._num_padding_R.index_select(0, choice.source_R)
        if self._adapter_of_row:
            self._adapter_of_row = tuple(self._adapter_of_row[row] for row in choice.source_R.tolist())
        if not torch.equal(choice.source_R, self._rows):
            for cache in self._caches:
                cache.select(choice.source_R)
        self._rows = torch.arange(len(choice.source_R), device=choice.source_R.device)
        return self._run(choice.tokens_R[:, None])

    def agree(self, search: Search, logits_RV: torch.Tensor | None) -> Choice:
        """What the process with the logits chooses, told to the rest of the replica. Collective over TP x PP.

        ValueError, on all of them, where a logit is not finite.
        """
        topology = self._gpt.topology
        told = torch.empty(2 * search.num_rows + 1, dtype=torch.int64, device=topology.device)
        if logits_RV is not None:
            told = _choose(search, logits_RV, told)
        source = topology.tp_size * (topology.dp_rank + topology.dp_size * (topology.pp_size - 1))
        dist.broadcast(told, src=source, group=topology.model_parallel_group)
        state, (tokens_R, source_R) = int(told[0]), told[1:].chunk(2)
        if state == _NOT_FINITE:
            raise ValueError(
                f"logits after {self.num_columns_kept} tokens are not finite, so no token can be chosen; look at the"
                " checkpoint and the adapter, and where they are fp16 use fp32 or bf16"
            )
        return Choice(tokens_R=tokens_R, source_R=source_R, finished=state == _FINISHED)

    def _run(self, tokens_RC: torch.Tensor) -> torch.Tensor | None:
        """One forward pass through all stages."""
        gpt, topology = self._gpt, self._gpt.topology
        gpt.clock.adapter_of_row = self._adapter_of_row
        first, num_columns = self.num_columns_kept, tokens_RC.shape[1]
        if not topology.is_first_stage:
            gpt.set_input_tensor(self._receive(tokens_RC))
        tokens_RC, gpt.slots_BS = split_slots(tokens_RC)
        output = gpt(
            tokens_RC,
            compute_positions(self._num_padding_R, first, num_columns),
            self._build_masks(first, num_columns),
        )
        if topology.is_last_stage:
            return self._gather_logits(output[:, -1])
        dist.send(output.contiguous(), group=topology.pp_group, group_dst=topology.pp_rank + 1)
        return None

    def _build_masks(self, first: int, num_columns: int) -> LayerMasks:
        full = compute_mask(self._num_padding_R, first, num_columns)
        window = self._gpt.model.sliding_window
        windowed = full if window is None else compute_mask(self._num_padding_R, first, num_columns, window)
        return LayerMasks(full, windowed, recurrent=find_text(self._num_padding_R, first, num_columns))

    def _receive(self, tokens_RC: torch.Tensor) -> torch.Tensor:
        config, topology = self._gpt.config, self._gpt.topology
        num_rows, num_columns = tokens_RC.shape
        hidden_CRH = torch.empty(
            num_columns, num_rows, config.hidden_size, dtype=config.pipeline_dtype, device=topology.device
        )
        dist.recv(hidden_CRH, group=topology.pp_group, group_src=topology.pp_rank - 1)
        return hidden_CRH

    def _gather_logits(self, local_RV: torch.Tensor) -> torch.Tensor | None:
        """fp32 (fp64 in an fp64 model), without the rows that pad the vocabulary; on tp_rank 0 alone."""
        topology = self._gpt.topology
        parts = [torch.empty_like(local_RV) for _ in range(topology.tp_size)] if topology.tp_rank == 0 else None
        dist.gather(local_RV.contiguous(), parts, group=topology.tp_group, group_dst=0)
        if parts is None:
            return None
        whole_RV = torch.cat(parts, 1)[:, : self._gpt.true_vocab_size]
        return whole_RV.to(torch.promote_types(whole_RV.dtype, torch.float32))


def _choose(search: Search, logits_RV: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """[1 + 2 R]: the state, the tokens, the rows that they continue."""
    if not logits_RV.isfinite().all():
        return told.fill_(_NOT_FINITE)
    choice = search.choose(logits_RV)
    state = torch.tensor([_FINISHED if choice.finished else _GOES_ON], device=told.device)
    return torch.cat([state, choice.tokens_R, choice.source_R])


def check_runs_in_steps(gpt: ShardedGpt) -> None:
    """ValueError where the model is split along the sequence or partitioned over DP."""
    if gpt.topology.sequence_parallel:
        raise ValueError(
            "topology.sequence_parallel=true: generation runs one position at a time, which cannot be split; set false"
        )
    if any(hasattr(parameter, "ds_id") for parameter in gpt.parameters()):
        raise ValueError("zero.stage=3 has partitioned the base: generate from the saved adapter, or use zero.stage<=2")
