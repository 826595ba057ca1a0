"""Whether ranks average alike: the same model, updates and bits where they should. They send digests only."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from polyak.errors import MismatchError, StateError, listed
from polyak.kernels import checksums, parts_of
from polyak.model import Entry
from polyak.ranks import all_or_none, any_rank, apart, given_by_all, is_initialized, sending

from .core import Core

# What is compared, by the name of a number or of a tensor: where it lies in the whole, and its digest.
_Digests = dict[str, tuple[str, str]]


def check_in_sync(core: Core, *, buffers: bool, group: Any) -> None:
    """Compares the digests of all ranks; see `WeightAverage.check_in_sync`."""
    if not is_initialized():
        if core.store.meshes:
            raise StateError("check_in_sync() after the process group was destroyed: ranks cannot be compared any more")
        return
    mine: _Digests = {}
    failure: Exception | None = None
    try:
        mine = dict(_digests(core, buffers=buffers))
    # Whatever it is, the other ranks wait for a message of this one.
    except Exception as error:
        failure = error
    given = given_by_all((mine, failure and f"{type(failure).__name__}: {failure}"), group)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(given) if text]
    if failed:
        raise StateError(f"check_in_sync() raised an error on {listed(failed, quoted=False)}")
    found = list(_differences([digests for digests, _ in given]))
    if found:
        raise MismatchError(
            f"ranks are apart: {listed(found, quoted=False)}. Each of them must make the same updates of the same "
            "weights. Of buffers such as the statistics of a BatchNorm, DistributedDataParallel lets each rank have "
            "its own; buffers=False leaves them out"
        )


def check_alike(core: Core) -> None:
    """Raises on every rank where some keep averages of another model, or in another way; for when they are made.

    Where ranks share the averages of one model, their weights must be the same as well.

    Raises:
        MismatchError: ranks differ.
        StateError: a message failed.
    """
    meshes = core.store.meshes
    if not meshes:
        return
    found: list[str] = []
    for mesh in reversed(meshes):
        mine = dict(_settings(core, _entries_over(core, mesh)))
        with sending():
            groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        found += [name for group in groups for name in _differences(given_by_all(mine, group))]
    if any_rank(len(found) > 0, meshes):
        what = listed(dict.fromkeys(found), quoted=False) or "others than this one"
        raise MismatchError(
            f"ranks average differently: {what}. Each of them must have the same model, and a WeightAverage with the "
            "same arguments"
        )
    check_replicas(core, "shard_over")


@contextmanager
def together(core: Core, call: str, *asked: object, sends: bool = True) -> Generator[None, None, None]:
    """What ranks do before they send each other tensors: all of them come out of the `with`, or all of them raise.

    Args:
        core: whose ranks.
        call: for the error.
        asked: what ranks must ask for alike, such as the name of an average.
        sends: whether ranks will send anything; where not, each is on its own.

    Raises:
        StateError: another rank raised an error, or is lost.
        MismatchError: ranks have made different updates, ask for different things, or share averages and have other
            weights.
    """
    meshes = core.store.meshes if sends else []
    with all_or_none(meshes, call):
        yield
    numbers = [_number((core.clock.state(), core.store.pending)), _number((call.partition("(")[0], asked))]
    # Meshes may cross, so that each rank sees those along its own lines only, and hears of the rest.
    seen = [
        position
        for mesh in meshes
        for position in apart([*numbers, _number(_kinds(core, _entries_over(core, mesh)))], mesh)
    ]
    if any_rank(len(seen) > 0, meshes[:-1]):
        if 1 in seen:
            difference = f"ask for different things, this one for {', '.join(map(str, asked)) or call}"
        elif 2 in seen:
            difference = "average different tensors, as after an adapt() on some of them"
        else:
            difference = (
                f"have made different updates, this one {core.clock.num_updates} until time {core.clock.time:g}"
            )
        raise MismatchError(
            f"{call}: ranks {difference}, so that their parts do not belong together. Nothing was written. Every rank "
            "must make the same calls"
        )
    if sends:
        check_replicas(core, call)


def _number(state: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=8).digest(), "big")


def check_targets(core: Core, call: str, targets: Mapping[str, Tensor]) -> None:
    """Raises on every rank where ranks that share averages are about to write them to tensors of another kind.

    Raises:
        MismatchError: ranks differ.
        StateError: a message failed.
    """
    replicas = core.store.replicas
    if replicas is None:
        return
    # Messages hold numbers as they lie in memory.
    kinds = {name: _number((targets[name].dtype, targets[name].stride())) for name in core.store.shared}
    found = [list(kinds)[position] for position in apart(list(kinds.values()), replicas.mesh)]
    if any_rank(len(found) > 0, core.store.meshes):
        raise MismatchError(
            f"{call}: ranks gave models that differ in {listed(found) or 'tensors, others than this one'}. Those that "
            "share averages need models of the same dtypes, in the same order in memory. Nothing was written"
        )


def check_replicas(core: Core, call: str) -> None:
    """Raises on every rank where ranks that share the averages of one model have other weights.

    Raises:
        MismatchError: ranks differ.
        StateError: a message failed.
    """
    replicas = core.store.replicas
    if replicas is None:
        return
    weights = {e.name: e.local for e in core.source.entries if _is_weight(e)}
    # Messages hold numbers as they lie in memory.
    strides = [_number(tensor.stride()) for tensor in weights.values()]
    sums = checksums(list(weights.values()))
    positions = apart([total ^ stride for total, stride in zip(sums, strides, strict=True)], replicas.mesh)
    found = [list(weights)[position] for position in positions]
    if any_rank(len(found) > 0, core.store.meshes):
        raise MismatchError(
            f"{call}: ranks that share averages have different {listed(found) or 'weights, others than this one'}. "
            "Each takes what the others have for its own, so nothing was written. They must start from the same "
            "weights, in the same order in memory, as DistributedDataParallel makes them, and make the same steps"
        )


def _entries_over(core: Core, mesh: Any) -> list[Entry]:
    """What all ranks of a mesh must have alike.

    Other plain tensors are each rank's own business: experts of a mixture may well be others elsewhere. So are sharded
    ones of ranks outside of their mesh.
    """
    shardings, replicas = core.store.shardings, core.store.replicas
    replicated = replicas is not None and replicas.mesh == mesh
    return [
        e
        for e in core.source.entries
        if (shardings[e.name].mesh == mesh if e.name in shardings else replicated and _is_weight(e))
    ]


def _is_weight(entry: Entry) -> bool:
    return entry.is_parameter and entry.action == "average"


def _kinds(core: Core, entries: Sequence[Entry]) -> list[tuple[object, ...]]:
    # The shapes of stretches are each rank's own.
    shapes = [() if core.source.flat_rank else tuple(e.shape) for e in entries]
    return [
        (e.name, e.aliases, e.action, str(e.dtype), shape, None if e.sharding is None else e.sharding.placements)
        for e, shape in zip(entries, shapes, strict=True)
    ]


def _settings(core: Core, entries: Sequence[Entry]) -> Iterator[tuple[str, tuple[str, str]]]:
    """What all ranks must have alike."""
    store = core.store
    shared = store.shared
    yield "the tensors of the model, or rules=", ("", repr(_kinds(core, entries)))
    yield "the profiles", ("", repr(core.profiles))
    yield "every= or start=", ("", repr((core.clock.every, core.clock.start)))
    yield "dtype=, compensated= or seed=", ("", repr(store.modes))
    yield "nonfinite=", ("", repr(core.nonfinite))
    yield "shard_over=", ("", repr(sorted(e.name for e in entries if e.name in shared)))


def _digests(core: Core, *, buffers: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    core.verify()
    store = core.store
    yield "the clock", ("", repr((core.clock.state(), store.pending)))
    yield from _settings(core, core.source.entries)
    entries = [entry for entry in core.source.entries if entry.is_parameter or buffers]
    for profile in core.profiles:
        tensors, seconds = store.tensors(profile), store.seconds[profile]
        for entry in entries:
            sharding = store.shardings.get(entry.name)
            place = "" if sharding is None else sharding.label
            place = place if core.source.flat_rank is None else str(core.source.flat_rank)
            found = [kept[entry.name] for kept in (tensors, seconds) if entry.name in kept]
            if found:
                yield f"{entry.name} ({profile})", (place, _digest(found))
    if core.swapped is None:
        # Of what is shared, no two ranks have the same part: they are as right as its source is.
        for entry in (entry for entry in entries if entry.name in store.shared):
            place = "" if entry.sharding is None else entry.sharding.label
            yield f"{entry.name} of the model", (place, _digest([entry.local]))


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
