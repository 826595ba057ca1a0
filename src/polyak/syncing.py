"""Whether ranks have the same averages, bit for bit, where they should; they never send them to each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, distributed

from polyak.core import Core
from polyak.errors import MismatchError, StateError, listed
from polyak.kernels import parts_of

# What is compared, by the name of a number or of a tensor: where it lies in the whole, and its digest.
_Digests = dict[str, tuple[str, str]]


def check_in_sync(core: Core, *, buffers: bool, group: Any) -> None:
    """Compares the digests of all ranks; see `WeightAverage.check_in_sync`."""
    if not (distributed.is_available() and distributed.is_initialized()):
        if core.source.meshes:
            raise StateError("check_in_sync() after the process group was destroyed: ranks cannot be compared any more")
        return
    mine: _Digests = {}
    failure: Exception | None = None
    try:
        mine = dict(_digests(core, buffers=buffers))
    # Whatever it is, the other ranks wait for a message of this one.
    except Exception as error:
        failure = error
    given: list[Any] = [None] * cast("Any", distributed).get_world_size(group)
    cast("Any", distributed).all_gather_object(given, (mine, failure and f"{type(failure).__name__}: {failure}"), group)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(given) if text]
    if failed:
        raise StateError(f"check_in_sync() raised an error on {listed(failed)}")
    apart = list(_differences([digests for digests, _ in given]))
    if apart:
        raise MismatchError(
            f"ranks have different averages of {listed(apart)}. Each of them must make the same updates of the same "
            "weights. Of buffers such as the statistics of a BatchNorm, DistributedDataParallel lets each rank have "
            "its own; buffers=False leaves them out"
        )


def _digests(core: Core, *, buffers: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    core.verify()
    store = core.store
    yield "the clock", ("", repr((core.clock.state(), store.pending)))
    kinds = [(entry.name, entry.action, str(entry.dtype), tuple(entry.shape)) for entry in core.source.entries]
    yield "the configuration", ("", repr((core.profiles, core.clock.every, core.clock.start, store.modes, kinds)))
    entries = [entry for entry in core.source.entries if entry.is_parameter or buffers]
    for profile in core.profiles:
        tensors, seconds = store.tensors(profile), store.seconds[profile]
        for entry in entries:
            place = "" if entry.sharding is None else entry.sharding.label
            place = place if core.source.flat_rank is None else str(core.source.flat_rank)
            found = [kept[entry.name] for kept in (tensors, seconds) if entry.name in kept]
            if found:
                yield f"{entry.name} ({profile})", (place, _digest(found))


def _digest(tensors: Iterable[Tensor]) -> str:
    """Of the bytes of tensors; a sum would not see that elements have changed places."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        for part in parts_of(tensor.detach().resolve_conj().resolve_neg()):
            digest.update(cast("Any", part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _differences(given: list[_Digests]) -> Iterator[str]:
    """What some ranks have otherwise than others that hold the same part of it."""
    for name in dict.fromkeys(name for digests in given for name in digests):
        ranks: dict[str, dict[str, list[int]]] = {}
        for rank, digests in enumerate(given):
            place, digest = digests.get(name, ("", "nothing"))
            ranks.setdefault(place, {}).setdefault(digest, []).append(rank)
        for by_digest in ranks.values():
            if len(by_digest) > 1:
                sides = " against ".join(", ".join(map(str, side)) for side in by_digest.values())
                yield f"{name}: ranks {sides}"
                break
