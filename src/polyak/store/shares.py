"""Averages that are divided among ranks which all have the same weights, as those of data-parallel training have.

Each rank keeps and updates its share of every large tensor: one slice, along the dimension that lies outermost in
memory, of the part of the source that is here. Shares are DTensors, so that what saves and lays out sharded averages
does so with these. Nothing is sent until somebody asks for whole tensors.
`gathering` makes them, by operations between which a swap can be interrupted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed

from polyak.errors import StateError
from polyak.kernels import stretches_of
from polyak.model import Entry
from polyak.ranks import Sharding, describe, is_initialized, sending

Operation = Callable[[], None]
# Of what all ranks give in one message; of each, where they are many, no less than the second.
_MESSAGE_BYTES = 1 << 24
_LEAST_BYTES = 1 << 16
# Its name since torch 2.13, and the one before.
_all_gather = getattr(distributed, "all_gather_single", None) or cast("Any", distributed).all_gather_into_tensor


@dataclass(frozen=True)
class Share:
    """Which slice of a tensor is whose.

    Attributes:
        sharding: how the average lies over all ranks.
        dimension: along which the source's part is sliced.
        sizes: of the slices, in the order of the ranks that share.
        rank: this one's place among them.
    """

    sharding: Sharding
    dimension: int
    sizes: tuple[int, ...]
    rank: int

    def of(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """The slice of a tensor that is this rank's, or another's; a view."""
        rank = self.rank if rank is None else rank
        return tensor.narrow(self.dimension, sum(self.sizes[:rank]), self.sizes[rank])


class Shares:
    """The share that each of the ranks which share the averages of one model has of each tensor.

    Averaged parameters of more than one number are shared. Buffers are not: data-parallel ranks may have their own.

    Attributes:
        over: the ranks, as they were given.
        mesh: the same as a DeviceMesh of one dimension; None where nothing is shared.
        group: the same as a process group.
        size: how many they are.
        rank: this one's place among them.
        by_name: the shares, by the entry's name.

    Args:
        over: the ranks, as torch's process group or a DeviceMesh of one dimension; None for no others.
        entries: of the source.

    Raises:
        TypeError: it is neither.
        StateError: torch.distributed is not initialised, this rank is none of them, or they do not have the same parts
            of a tensor.
    """

    def __init__(self, over: Any, entries: Iterable[Entry]) -> None:
        self.over = over
        self.mesh: Any = None
        self.group: Any = None
        self.size, self.rank = 1, 0
        self.by_name: dict[str, Share] = {}
        if over is None:
            return
        averaged = [entry for entry in entries if entry.action == "average"]
        self.mesh = _mesh_of(over, averaged[0].device.type)
        self.group = self.mesh.get_group(0)
        self.size = int(self.mesh.size())
        self.rank = int(self.mesh.get_local_rank())
        found = {entry.name: self._share(entry) for entry in averaged if entry.is_parameter}
        self.by_name = {name: share for name, share in found.items() if share is not None}

    def sharding_of(self, entry: Entry) -> Sharding | None:
        """How the average of an entry lies over the ranks."""
        return self.by_name[entry.name].sharding if entry.name in self.by_name else entry.sharding

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor, or all of one that is not shared."""
        return self.by_name[name].of(tensor) if name in self.by_name else tensor

    def _share(self, entry: Entry) -> Share | None:
        if entry.sharding is None:
            return self._share_of_plain(entry)
        return self._share_of_sharded(entry, entry.sharding)

    def _share_of_plain(self, entry: Entry) -> Share | None:
        from torch.distributed.tensor import Shard

        dimension = _outermost(entry.shape, entry.local.stride(), [self.size] * len(entry.shape))
        if dimension is None:
            return None
        # As an average lies that is not shared, which has no gaps: noise is counted by places in memory.
        stride = torch.empty_like(entry.local, device="meta").stride()
        sharding = Sharding(self.mesh, (Shard(dimension),), entry.shape, stride)
        return Share(sharding, dimension, _chunks(entry.shape[dimension], self.size), self.rank)

    def _share_of_sharded(self, entry: Entry, there: Sharding) -> Share | None:
        ranks = distributed.get_process_group_ranks(self.group)
        if not _is_in_order(there.mesh):
            raise StateError(
                f"shard_over: {entry.name!r} is sharded over a mesh of the ranks {there.mesh.mesh.tolist()}, which "
                "torch numbers in one way where it sends messages and in another where it saves; give them in "
                "ascending order"
            )
        mine = [
            dimension
            for dimension in range(there.mesh.ndim)
            if distributed.get_process_group_ranks(there.mesh.get_group(dimension)) == ranks
        ]
        if not mine or not there.placements[mine[0]].is_replicate():
            raise StateError(
                f"shard_over: {entry.name!r} is {describe(there)}, which is not replicated over the {self.size} ranks "
                "given; give the dimension of its mesh over which it is, as in shard_over=mesh['replicate']. What is "
                "sharded over all ranks already is averaged so without shard_over"
            )
        return _share_of_mesh(there, mine[0], self.rank)


def _mesh_of(over: Any, device_type: str) -> Any:
    if not is_initialized():
        raise StateError(f"shard_over={over!r}: torch.distributed is not initialised; call init_process_group() first")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(over, DeviceMesh):
        if over.ndim != 1:
            raise StateError(
                f"shard_over={over!r}: a mesh of one dimension is needed; take one of its {over.ndim}, as in "
                f"mesh[{(over.mesh_dim_names or ('replicate',))[0]!r}]"
            )
        # Messages come in the order of the group, which is that of the mesh where its ranks ascend.
        mesh = over if _is_in_order(over) else DeviceMesh.from_group(over.get_group(0), over.device_type)
    elif over is distributed.GroupMember.NON_GROUP_MEMBER:
        raise StateError(f"shard_over: rank {distributed.get_rank()} is not in the process group that was given")
    elif isinstance(over, distributed.ProcessGroup):
        mesh = DeviceMesh.from_group(over, device_type)
    else:
        raise TypeError(
            f"shard_over={over!r}: a process group, such as torch.distributed.group.WORLD, or a DeviceMesh of one "
            "dimension is needed"
        )
    if mesh.get_coordinate() is None:
        raise StateError(f"shard_over={over!r}: rank {distributed.get_rank()} is none of its ranks")
    return mesh


def _is_in_order(mesh: Any) -> bool:
    """Whether ranks ascend along every dimension of a mesh."""
    return all(bool((mesh.mesh.diff(dim=dimension) > 0).all()) for dimension in range(mesh.ndim))


def _outermost(shape: Sequence[int], stride: Sequence[int], needed: Sequence[int]) -> int | None:
    """The dimension to slice: the outermost in memory that has enough for every rank, or else the longest."""
    if math.prod(shape) < 2:  # nothing to divide
        return None
    outer_first = sorted(range(len(shape)), key=lambda d: (-stride[d], d))
    enough = (d for d in outer_first if shape[d] >= needed[d])
    return next(enough, max(outer_first, key=lambda d: shape[d]))


def _chunks(size: int, count: int) -> tuple[int, ...]:
    """The sizes of torch.chunk, with zeros for ranks that get nothing."""
    each = -(-size // count)
    return tuple(max(0, min(each, size - rank * each)) for rank in range(count))


def _share_of_mesh(there: Sharding, replicated: int, rank: int) -> Share | None:
    """Slices what each rank of the other dimensions of a mesh has, along the dimension over which they all have it."""
    size = there.mesh.size(replicated)
    needed = [size * _num_parts(there, d) for d in range(len(there.shape))]
    dimension = _outermost(there.shape, there.stride, needed)
    if dimension is None:
        return None
    placement = _placement(there, replicated, dimension)
    placements = (*there.placements[:replicated], placement, *there.placements[replicated + 1 :])
    sharding = Sharding(there.mesh, placements, there.shape, there.stride)
    if there.shape[dimension] % needed[dimension] and not _is_named_right(there, sharding, replicated, dimension):
        return None
    here = there.places(dimension, cast("list[int]", there.mesh.get_coordinate()))
    return Share(sharding, dimension, _chunks(len(here), size), rank)


def _is_named_right(there: Sharding, sharding: Sharding, replicated: int, dimension: int) -> bool:
    """Whether torch takes the placements for the same slices on every rank; of few, uneven rows it may not.

    Every rank looks at all of them, so that all come to the same without a message.
    """
    for coordinates in itertools.product(*map(range, there.mesh.shape)):
        part = there.places(dimension, coordinates)
        sizes = _chunks(len(part), there.mesh.size(replicated))
        start = sum(sizes[: coordinates[replicated]])
        mine = part[start : start + sizes[coordinates[replicated]]]
        if not torch.equal(mine, sharding.places(dimension, coordinates)):
            return False
    return True


def _num_parts(there: Sharding, dimension: int) -> int:
    """Into how many parts a dimension is cut already."""
    cuts = (there.mesh.size(n) for n, p in enumerate(there.placements) if getattr(p, "dim", None) == dimension)
    return math.prod(cuts)


def _placement(there: Sharding, replicated: int, dimension: int) -> Any:
    """The placement that cuts after all others have cut, which in torch's words are those to the left of it."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    right = range(replicated + 1, len(there.placements))
    factor = math.prod(there.mesh.size(n) for n in right if getattr(there.placements[n], "dim", None) == dimension)
    return Shard(dimension) if factor == 1 else _StridedShard(dimension, split_factor=factor)


class _Buffer:
    """Memory for one message, which is there while messages are sent."""

    def __init__(self, num_ranks: int, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._shape = (num_ranks, num_elements)
        self.kept: tuple[Tensor, Tensor] | None = None
        # A message on its way, and what it fills: who is interrupted while waiting goes on to wait.
        self.sending: tuple[Any, Tensor] | None = None

    def get(self) -> tuple[Tensor, Tensor]:
        """What is sent, and what is received: a row from each rank."""
        if self.kept is None:
            sent = torch.empty(self._shape[1], **self._options)
            self.kept = sent, torch.empty(self._shape, **self._options)
        return self.kept


def gathering(shares: Shares, tensors: Mapping[str, Tensor]) -> list[Operation]:
    """The operations that give every rank the shares of all others, to be run by all of them in this order, once.

    Of each tensor this rank's share is as it should be before, and all of it afterwards.

    Args:
        shares: whose share is what.
        tensors: whole ones, by the names of shared entries; a part of a model that is sharded besides is one, too.
    """
    if shares.size == 1:
        return []
    groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.dtype, tensor.device), {})[name] = tensor.detach()
    return [
        operation for (dtype, device), group in groups.items() for operation in _gathering(shares, group, dtype, device)
    ]


def _gathering(
    shares: Shares, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Iterator[Operation]:
    flat = [
        [part for name, tensor in tensors.items() for part in stretches_of(shares.by_name[name].of(tensor, rank))]
        for rank in range(shares.size)
    ]
    longest = max(sum(part.numel() for part in parts) for parts in flat)
    bound = max(_LEAST_BYTES, _MESSAGE_BYTES // shares.size) // dtype.itemsize
    if longest == 0:
        return
    buffer = _Buffer(shares.size, min(bound, longest), dtype, device)
    rounds = [list(_rounds(parts, bound)) for parts in flat]
    for number in range(-(-longest // bound)):
        pieces = [each[number] if number < len(each) else [] for each in rounds]
        # Apart, so that what is interrupted between them sends nothing twice.
        yield partial(_send, shares, buffer, pieces[shares.rank])
        yield partial(_receive, buffer, {r: each for r, each in enumerate(pieces) if r != shares.rank})
    yield partial(setattr, buffer, "kept", None)


def _rounds(parts: list[Tensor], bound: int) -> Iterator[list[Tensor]]:
    """Flat tensors in lists of so many elements, the last one of what is left."""
    pieces: list[Tensor] = []
    room = bound
    for part in parts:
        while part.numel() > 0:
            pieces.append(part[:room])
            room -= pieces[-1].numel()
            part = part[pieces[-1].numel() :]  # the rest of it
            if room == 0:
                yield pieces
                pieces, room = [], bound
    if pieces:
        yield pieces


def _send(shares: Shares, buffer: _Buffer, mine: list[Tensor]) -> None:
    sent, received = buffer.get()
    with sending():
        if buffer.sending is None:
            start = 0
            for piece in mine:
                sent[start : start + piece.numel()].copy_(piece)
                start += piece.numel()
            # On a mesh of another device than the tensors' the messages go between the devices of the mesh.
            there = sent.to(shares.mesh.device_type)
            whole = received.to(shares.mesh.device_type)
            # As bytes, for not every backend takes every dtype.
            bytes_there, all_bytes = there.view(torch.uint8), whole.view(torch.uint8).flatten()
            buffer.sending = _all_gather(all_bytes, bytes_there, group=shares.group, async_op=True), whole
        work, whole = buffer.sending
        work.wait()
        if whole is not received:
            received.copy_(whole)


def _receive(buffer: _Buffer, pieces_of: Mapping[int, list[Tensor]]) -> None:
    _, received = buffer.get()
    for rank, pieces in pieces_of.items():
        start = 0
        for piece in pieces:
            piece.copy_(received[rank, start : start + piece.numel()])
            start += piece.numel()
    buffer.sending = None
