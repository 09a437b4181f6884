"""Every storage that is alive, by what it is for; and the account of the moment when they took the most."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

BASE = "base weights"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
SAVED = "saved activations"
LOGITS = "logits"
COMMUNICATION = "communication buffers"
TRANSIENT = "transient"
HOST = "host memory"
"""Offloaded: counts under its name, not in any sum."""
KINDS = (BASE, ADAPTERS, OPTIMIZER, GRADIENTS, SAVED, LOGITS, COMMUNICATION, TRANSIENT)
_PASSING = (TRANSIENT, LOGITS, COMMUNICATION)
"""What autograd may come to hold; the other kinds are held anyway."""


@dataclass(slots=True)
class _Storage:
    kind: str
    nbytes: int
    num_saves: int = 0
    finalizer: weakref.ref[torch.UntypedStorage] | None = None


@dataclass(slots=True)
class LiveBytes:
    """Counts storages from the first sight of a tensor of theirs to their end."""

    granularity: int = 1
    """Sizes are rounded up to a multiple of so many bytes, as CUDA's allocator does."""
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*KINDS, HOST), 0))
    total: int = 0
    peak_total: int = 0
    peak: dict[str, int] = field(default_factory=dict)
    """Of each kind, when the sum was largest."""
    largest: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*KINDS, HOST), 0))
    """Of each kind, whenever that was."""
    _storages: dict[int, _Storage] = field(default_factory=dict)
    _gathered: tuple[torch.Tensor, ...] = ()

    def see(self, tensor: torch.Tensor, kind: str = TRANSIENT) -> None:
        """Count the tensor's storage under `kind` if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        nbytes = -(-storage.nbytes() // self.granularity) * self.granularity
        entry = self._storages[key] = _Storage(kind=kind, nbytes=nbytes)
        entry.finalizer = weakref.ref(storage, lambda _: self._forget(key))
        self._add(kind, nbytes)

    def declare(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """From now on these count under `kind`."""
        for tensor in tensors:
            self.see(tensor, kind)
            self._move(self._storages[tensor.untyped_storage()._cdata], kind)

    def declare_rest(self, kind: str, known: Iterable[str]) -> None:
        """Whatever is alive now and not of a `known` kind."""
        known = set(known)
        for entry in self._storages.values():
            if entry.kind not in known:
                self._move(entry, kind)

    def note_communication(self, tensor: torch.Tensor) -> None:
        """A collective reads or writes it."""
        self.see(tensor)
        entry = self._storages[tensor.untyped_storage()._cdata]
        if entry.kind == TRANSIENT:
            self._move(entry, COMMUNICATION)

    def restart_peak(self) -> None:
        """Forget the peaks so far."""
        self.peak_total, self.peak, self.largest = self.total, dict(self.now), dict(self.now)

    @contextmanager
    def watch_saved(self, gathered: Iterable[torch.Tensor] = ()) -> Iterator[None]:
        """Know what autograd keeps for backward; recomputed regions as they run.

        `gathered`: parameters that ZeRO 3 puts into new storages whenever it needs them, which are no activations.
        """
        self._gathered = tuple(gathered)
        with torch.autograd.graph.saved_tensors_hooks(self._save, _unpack):
            yield

    def _save(self, tensor: torch.Tensor) -> "_Saved":
        # An output that held on to its own graph would never be freed; a parameter stays itself, or the storage that
        # ZeRO 3 takes from it would be held here.
        saved = _Saved(tensor if isinstance(tensor, nn.Parameter) else tensor.detach())
        self.see(tensor)
        key = tensor.untyped_storage()._cdata
        entry = self._storages[key]
        if entry.kind in _PASSING:
            is_weight = any(parameter.untyped_storage()._cdata == key for parameter in self._gathered)
            self._move(entry, BASE if is_weight else SAVED)
        if entry.kind == SAVED:
            entry.num_saves += 1
            weakref.finalize(saved, self._release, key, entry).atexit = False
        return saved

    def _release(self, key: int, entry: _Storage) -> None:
        entry.num_saves -= 1
        if entry.num_saves == 0 and entry.kind == SAVED and self._storages.get(key) is entry:
            self._move(entry, TRANSIENT)

    def _forget(self, key: int) -> None:
        entry = self._storages.pop(key)
        self._add(entry.kind, -entry.nbytes)

    def _move(self, entry: _Storage, kind: str) -> None:
        if entry.kind != kind:
            self._add(entry.kind, -entry.nbytes)
            entry.kind = kind
            self._add(kind, entry.nbytes)

    def _add(self, kind: str, nbytes: int) -> None:
        self.now[kind] += nbytes
        self.largest[kind] = max(self.largest[kind], self.now[kind])
        if kind == HOST:
            return
        self.total += nbytes
        if self.total >= self.peak_total:  # equal where a storage only changed its kind: the finer account
            self.peak_total, self.peak = self.total, dict(self.now)


class _Saved:
    """Keeps a tensor for as long as autograd does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor


def watch_gradients(live: LiveBytes, parameters: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Declare each gradient when it has accumulated. Returns what ends the watch."""

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.declare([parameter.grad], GRADIENTS)

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop
