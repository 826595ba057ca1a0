"""How sources come to the host: beside the training, from an accelerator; or by plain copies.

From an accelerator each tensor is copied into pinned memory on a stream of its own, after what the training has queued
so far. What is queued later waits for the copy only where it writes to parameters: optimizers, see host.py. Buffers are
written by the next forward pass already, so they, and small tensors, which would each cost a launch, are first put
together on the device in the training's own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polyak.kernels import Copies, is_capturing, is_dense

# What the widest vectors of a CPU like, and a multiple of the size of every dtype.
_ALIGNMENT = 64
# torch rounds pinned buffers up to a power of two: many of this size, and the last, waste little.
_BUFFER_BYTES = 1 << 28
# Below this a copy takes less time than its launch.
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class Buffer:
    """What is in one buffer.

    Attributes:
        offsets: the first byte of each tensor, by name.
        num_bytes: of all of them, with the gaps between.
    """

    offsets: dict[str, int]
    num_bytes: int

    def views(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of a flat tensor of bytes as tensors by name, in dtypes, shapes and layouts of the given ones."""
        return {name: _view(flat, offset, tensors[name]) for name, offset in self.offsets.items()}


def pack(tensors: Mapping[str, Tensor], limit: int = _BUFFER_BYTES) -> list[Buffer]:
    """Distributes tensors over buffers, in their order; one that is larger than the limit has a buffer of its own.

    Example:
        >>> tensors = {"a": torch.ones(3), "b": torch.ones(2, 20), "c": torch.ones(300)}
        >>> pack(tensors, limit=256)
        [Buffer(offsets={'a': 0, 'b': 64}, num_bytes=256), Buffer(offsets={'c': 0}, num_bytes=1216)]
    """
    buffers: list[Buffer] = []
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        size = -(-num_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT
        if offsets and end + size > limit:
            buffers.append(Buffer(offsets, end))
            offsets, end = {}, 0
        offsets[name] = end
        end += size
    return [*buffers, Buffer(offsets, end)] if offsets else buffers


def num_bytes(tensor: Tensor) -> int:
    """What the elements of a tensor take."""
    return tensor.numel() * tensor.element_size()


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    # Without gaps, in the order of dimensions that the average of such a tensor has.
    layout = torch.empty_like(like, device="meta")
    stretch = flat[offset : offset + num_bytes(layout)]
    return stretch.view(like.dtype).as_strided(layout.shape, layout.stride())


class Copied(Protocol):
    """One copy of all sources that was begun."""

    def is_made(self) -> bool:
        """Whether it is done; waits for nothing."""
        ...

    def wait(self) -> None:
        """Returns when it is done."""
        ...

    def hold(self) -> None:
        """Lets what the calling thread does to the sources from now on happen after it."""
        ...


@dataclass(frozen=True)
class Staging:
    """One set of host memory for all sources.

    Attributes:
        tensors: the memory of each source, by name.
        num_bytes: of all of it.
        start: begins to copy the sources into it.
    """

    tensors: dict[str, Tensor]
    num_bytes: int
    start: Callable[[], Copied]


class Transfer(Protocol):
    """Brings sources into sets of host memory, one after another."""

    def make_set(self) -> Staging:
        """A new set; several share the rest."""
        ...


def transfer_for(
    sources: Mapping[str, Tensor], averages: Mapping[str, Tensor], parameters: AbstractSet[str]
) -> Transfer | None:
    """What brings the sources to averages on the host; None where all are in one place, or the averages elsewhere.

    Args:
        sources: what is averaged or copied, by name.
        averages: of some of the sources.
        parameters: the names of sources that optimizers write, and nothing else.
    """
    kinds = {sources[name].device.type for name in averages}
    if not kinds or "cpu" in kinds or {average.device.type for average in averages.values()} != {"cpu"}:
        return None
    has_streams = all(hasattr(torch.get_device_module(kind), "Stream") for kind in kinds)
    return SideStreams(sources, parameters) if has_streams else PlainCopies(sources)


class PlainCopies:
    """Copies that are done when `start` returns."""

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        self._sources = sources

    def make_set(self) -> Staging:
        """Memory that any process has."""
        tensors: dict[str, Tensor] = {}
        buffers = pack(self._sources)
        for buffer in buffers:
            flat = torch.empty(buffer.num_bytes, dtype=torch.uint8, device="cpu")
            tensors.update(buffer.views(flat, self._sources))
        copies = Copies([tensors[name] for name in self._sources], list(self._sources.values()))

        def start() -> Copied:
            copies.run()
            return _Events([])

        return Staging(tensors, sum(buffer.num_bytes for buffer in buffers), start)


class SideStreams:
    """Copies into pinned memory, on one stream for each accelerator that has sources."""

    def __init__(self, sources: Mapping[str, Tensor], parameters: AbstractSet[str]) -> None:
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, source in sources.items():
            by_device.setdefault(source.device, {})[name] = source
        on_host = {name: t for device, few in by_device.items() if device.type == "cpu" for name, t in few.items()}
        self._plain = PlainCopies(on_host)
        self._lanes = [_Lane(device, few, parameters) for device, few in by_device.items() if device.type != "cpu"]

    def make_set(self) -> Staging:
        """Pinned memory, which an accelerator reaches by itself."""
        plain = self._plain.make_set()
        rooms = [lane.make_room() for lane in self._lanes]
        tensors = {**plain.tensors, **{name: tensor for room in rooms for name, tensor in room.tensors.items()}}

        def start() -> Copied:
            plain.start()
            try:
                return _Events([room.start() for room in rooms])
            except BaseException:
                # Nobody knows of those that were begun.
                for lane in self._lanes:
                    lane.settle()
                raise

        return Staging(tensors, plain.num_bytes + sum(room.num_bytes for room in rooms), start)


@dataclass(frozen=True)
class _Room:
    tensors: dict[str, Tensor]
    num_bytes: int
    start: Callable[[], _Event]


@dataclass(frozen=True)
class _Event:
    module: Any  # torch.cuda, torch.xpu, ...
    device: torch.device
    event: Any


@dataclass(frozen=True)
class _Events:
    events: Sequence[_Event]

    def is_made(self) -> bool:
        return all(each.event.query() for each in self.events)

    def wait(self) -> None:
        for each in self.events:
            # The worker's thread is on no device of its own, and must not make a context on the first one.
            with each.module.device(each.device):
                each.event.synchronize()

    def hold(self) -> None:
        # A capture must not depend on what is outside of it; what it captured runs later.
        if self.events and not is_capturing():
            for each in self.events:
                each.module.current_stream(each.device).wait_event(each.event)


class _Lane:
    """The way from one accelerator."""

    def __init__(self, device: torch.device, sources: Mapping[str, Tensor], parameters: AbstractSet[str]) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device=device)
        self._direct = {name: t for name, t in sources.items() if name in parameters and _is_large_and_dense(t)}
        self._others = {name: t for name, t in sources.items() if name not in self._direct}
        together: dict[str, Tensor] = {}
        self._flats: list[Tensor] = []
        # The memory belongs to the stream that reads it last.
        with self._module.device(device), self._module.stream(self._stream):
            for buffer in pack(self._others):
                flat = torch.empty(buffer.num_bytes, dtype=torch.uint8, device=device)
                self._flats.append(flat)
                together.update(buffer.views(flat, self._others))
        self._module.current_stream(device).wait_stream(self._stream)
        # One launch for many tensors takes them of one dtype.
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, source in self._others.items():
            by_dtype.setdefault(source.dtype, []).append(name)
        self._put_together = [
            Copies([together[name] for name in names], [sources[name] for name in names]) for names in by_dtype.values()
        ]
        self._last: _Event | None = None

    def make_room(self) -> _Room:
        tensors: dict[str, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        total = 0
        for buffer in pack(self._direct):
            flat = _pinned(buffer.num_bytes)
            total += buffer.num_bytes
            views = buffer.views(flat, self._direct)
            tensors.update(views)
            pairs += [(_flat(views[name]), _flat(self._direct[name])) for name in views]
        for buffer, source in zip(pack(self._others), self._flats, strict=True):
            flat = _pinned(buffer.num_bytes)
            total += buffer.num_bytes
            tensors.update(buffer.views(flat, self._others))
            pairs.append((flat, source))
        return _Room(tensors, total, lambda: self._start(pairs))

    def settle(self) -> None:
        """Waits until nothing is copied any more."""
        self._stream.synchronize()

    @torch.no_grad()
    def _start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> _Event:
        training = self._module.current_stream(self._device)
        if self._last is not None and self._put_together:
            # The copy before reads what is written here.
            training.wait_event(self._last.event)
        for copies in self._put_together:
            copies.run()
        self._stream.wait_stream(training)
        # To choose a stream of another device than the present one would go back to that, and make a context there.
        with self._module.device(self._device), self._module.stream(self._stream):
            for host, source in pairs:
                host.copy_(source, non_blocking=True)
        # Who waits for it sleeps, and leaves the core to others.
        event = self._module.Event(blocking=True) if self._device.type == "cuda" else self._module.Event()
        event.record(self._stream)
        self._last = _Event(self._module, self._device, event)
        return self._last


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory: what is alike on both sides is copied as it lies."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_large_and_dense(tensor: Tensor) -> bool:
    if tensor.is_conj() or tensor.is_neg() or not is_dense(tensor):
        return False
    return num_bytes(tensor) >= _SMALL_BYTES
