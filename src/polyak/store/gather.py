"""Tensors of which each rank has its share become whole on every rank: in place, by messages of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed

from polyak.kernels import stretches_of
from polyak.ranks import sending

from .shares import Shares

Operation = Callable[[], None]

# Of what all ranks give in one message; of each, where they are many, no less than the second.
_MESSAGE_BYTES = 1 << 24
_LEAST_BYTES = 1 << 16
# Its name since torch 2.13, and the one before.
_all_gather = getattr(distributed, "all_gather_single", None) or cast("Any", distributed).all_gather_into_tensor


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
