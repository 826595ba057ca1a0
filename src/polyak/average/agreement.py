"""Whether ranks average alike: the same model, updates and bits where they should. They send digests only."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, distributed

from polyak.errors import MismatchError, StateError, listed
from polyak.kernels import checksums, pieces_of
from polyak.model import Entry
from polyak.ranks import apart, given_by_all, is_initialized, reduced, sending

from .core import Core

# By the name of a setting or a tensor: which part of the whole it is, and its digest.
_Digests = dict[str, tuple[str, str]]
# The topic of ranks that have raised an error.
_ERROR = "error"
# Topics that only ranks which share averages compare.
_AMONG_SHARES = frozenset({"weights", "targets"})
# Below every digest and its complement: a rank without a number agrees with all.
_NOTHING = -(1 << 63)


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
    weights = _number(_weights(core))
    numbers = {
        mesh: {"settings": _number(list(_settings(core, _entries_over(core, mesh)))), "weights": weights}
        for mesh in meshes
    }
    differing = _compare(core, ("settings", "weights"), numbers)
    if "settings" in differing:
        found: list[str] = []
        for mesh in reversed(meshes):
            mine = dict(_settings(core, _entries_over(core, mesh)))
            with sending():
                groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
            found += [name for group in groups for name in _differences(given_by_all(mine, group))]
        what = listed(dict.fromkeys(found), quoted=False) or "others than this one"
        raise MismatchError(
            f"ranks average differently: {what}. Each of them must have the same model, and a WeightAverage with the "
            "same arguments"
        )
    if "weights" in differing:
        _raise_for_weights(core, "shard_over")


@contextmanager
def agreed(core: Core, call: str, *asked: object, sends: bool = True) -> Generator[dict[str, Tensor], None, None]:
    """Runs the body, then compares the ranks: either all of them leave the `with`, or all of them raise.

    If the ranks agree, each sends one small message per mesh dimension (a second one if there are several meshes).
    Names are exchanged only if something differs.

    Args:
        core: whose ranks.
        call: for the error.
        asked: what ranks must ask for alike, such as the name of an average.
        sends: whether ranks will send anything; where not, each is on its own.

    Yields:
        A dictionary for the tensors to which averages will be written, by name: ranks that share averages must have
        them alike in dtype and in the order in memory.

    Raises:
        StateError: another rank raised an error, or is lost.
        MismatchError: ranks have made different updates, ask for different things, share averages and have other
            weights, or have targets of other kinds.
    """
    meshes = core.store.meshes
    if not (sends and meshes):
        yield {}
        return
    topics = ("asked", "tensors", "updates", "weights", "targets")
    targets: dict[str, Tensor] = {}
    try:
        yield targets
        ledger = core.ledger()
        # Messages hold numbers as they lie in memory.
        kinds = {name: (targets[name].dtype, targets[name].stride()) for name in core.store.wholes if name in targets}
        common = {
            "asked": _number((call.partition("(")[0], asked)),
            "updates": _number((core.clock, ledger.made, ledger.since, ledger.pending)),
            "weights": _number(_weights(core)),
            "targets": _number(kinds),
        }
        numbers = {mesh: {**common, "tensors": _number(_kinds(core, _entries_over(core, mesh)))} for mesh in meshes}
    except BaseException:
        # What this rank knows says more than that the others do not answer any more.
        with suppress(StateError):
            _compare(core, topics, None)
        raise
    differing = _compare(core, topics, numbers)
    if _ERROR in differing:
        raise StateError(f"{call}: another rank raised an error, which says why; nothing was written")
    difference = {
        "asked": f"ask for different things, this one for {', '.join(map(str, asked)) or call}",
        "tensors": "average different tensors, as after an adapt() on some of them",
        "updates": f"have made different updates, this one {ledger.made} until time {core.clock.time:g}",
    }
    for topic, text in difference.items():
        if topic in differing:
            raise MismatchError(
                f"{call}: ranks {text}, so that their parts do not belong together. Nothing was written. "
                "Every rank must make the same calls"
            )
    if "weights" in differing:
        _raise_for_weights(core, call)
    if "targets" in differing:
        names = _names_apart(core, {name: _number(kind) for name, kind in kinds.items()})
        raise MismatchError(
            f"{call}: ranks gave models that differ in {listed(names) or 'tensors, others than this one'}. Those that "
            "share averages need models of the same dtypes, in the same order in memory. Nothing was written"
        )


def _compare(core: Core, topics: Sequence[str], numbers: Mapping[Any, Mapping[str, int]] | None) -> set[str]:
    """The topics whose numbers differ between any two ranks; every rank gets the same set.

    Args:
        core: whose ranks.
        topics: what is compared.
        numbers: for each mesh a number of each topic, as it must be on all of its ranks. None: it raised an error.

    Raises:
        StateError: a message failed.
    """
    found = {_ERROR} if numbers is None else set[str]()
    every = (_ERROR, *topics)
    for mesh, dimension, compared in _lines(core, topics):
        mine: Mapping[str, int] = {} if numbers is None else numbers[mesh]
        ends = [(mine[topic], ~mine[topic]) if topic in mine else (_NOTHING, _NOTHING) for topic in compared]
        flags = [int(topic in found) for topic in every]
        highest = reduced([*flags, *(number for pair in ends for number in pair)], mesh, dimension)
        found = {topic for topic, flag in zip(every, highest, strict=False) if flag}
        # The complement of the largest complement is the smallest.
        pairs = zip(highest[len(every) :: 2], highest[len(every) + 1 :: 2], strict=True)
        found |= {topic for topic, (high, low) in zip(compared, pairs, strict=True) if high != ~low}
    # Meshes may cross, so that each rank sees those along its own lines only, and hears of the rest.
    for mesh in core.store.meshes[:-1]:
        for dimension in range(mesh.ndim):
            flags = reduced([int(topic in found) for topic in every], mesh, dimension)
            found = {topic for topic, flag in zip(every, flags, strict=True) if flag}
    return found


def _lines(core: Core, topics: Sequence[str]) -> list[tuple[Any, int, list[str]]]:
    """What ranks compare along each dimension of each mesh; the largest mesh is last."""
    lines = [
        (mesh, d, [topic for topic in topics if topic not in _AMONG_SHARES])
        for mesh in core.store.meshes
        for d in range(mesh.ndim)
    ]
    shared = core.store.shares
    if shared.by_name:
        ranks_of = distributed.get_process_group_ranks
        with sending():
            compared = next(each for mesh, d, each in lines if ranks_of(mesh.get_group(d)) == ranks_of(shared.group))
        compared += [topic for topic in topics if topic in _AMONG_SHARES]
    return lines


def _number(state: object) -> int:
    """A digest of 63 bits, so that it and its complement are numbers of 64 bits with a sign."""
    return int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=8).digest(), "big") >> 1


def _names_apart(core: Core, numbers: Mapping[str, int]) -> list[str]:
    """Names whose numbers differ among the ranks that share averages."""
    positions = apart(list(numbers.values()), core.store.shares.mesh)
    return [list(numbers)[position] for position in positions]


def _weights(core: Core) -> dict[str, int]:
    """What must be the same, bit for bit, on ranks that share the averages of one model."""
    if core.store.shares.mesh is None:
        return {}
    weights = {e.name: e.local for e in core.source.entries if _is_weight(e)}
    sums = checksums(list(weights.values()))
    # Messages hold numbers as they lie in memory.
    kinds = [_number(tensor.stride()) for tensor in weights.values()]
    return {name: total ^ kind for name, total, kind in zip(weights, sums, kinds, strict=True)}


def _raise_for_weights(core: Core, call: str) -> None:
    found = _names_apart(core, _weights(core))
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
    lies, shared = core.store.lies, core.store.shares.mesh
    there = {name: mesh if sharding is None else sharding.mesh for name, sharding in lies.items()}
    return [
        e
        for e in core.source.entries
        if there[e.name] == mesh and (lies[e.name] is not None or (mesh == shared and _is_weight(e)))
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
    """The settings that must be equal on all ranks of a mesh."""
    store = core.store
    yield "the tensors of the model, or rules=", ("", repr(_kinds(core, entries)))
    yield "the profiles", ("", repr(core.profiles))
    yield "every= or start=", ("", repr((core.clock.every, core.clock.start)))
    yield "dtype=, compensated= or seed=", ("", repr(store.modes))
    yield "nonfinite=", ("", repr(core.nonfinite))
    yield "shard_over=", ("", repr(sorted(e.name for e in entries if e.name in store.wholes)))


def _digests(core: Core, *, buffers: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    core.verify()
    store = core.store
    yield "the clock", ("", repr((core.clock, core.ledger())))
    yield from _settings(core, core.source.entries)
    entries = [entry for entry in core.source.entries if entry.is_parameter or buffers]
    for profile in core.profiles:
        tensors, seconds = store.tensors(profile), store.seconds[profile]
        for entry in entries:
            sharding = store.lies[entry.name]
            place = "" if sharding is None else sharding.label
            place = place if core.source.flat_rank is None else str(core.source.flat_rank)
            found = [kept[entry.name] for kept in (tensors, seconds) if entry.name in kept]
            if found:
                yield f"{entry.name} ({profile})", (place, _digest(found))
    if core.swapped is None:
        # Of what is shared, no two ranks have the same part: they are as right as its source is.
        for entry in (entry for entry in entries if entry.name in store.wholes):
            place = "" if entry.sharding is None else entry.sharding.label
            yield f"{entry.name} of the model", (place, _digest([entry.local]))


def _digest(tensors: Iterable[Tensor]) -> str:
    """Of the bytes of tensors; a sum would not see that elements have changed places."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        for part in pieces_of(tensor.detach().resolve_conj().resolve_neg()):
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
