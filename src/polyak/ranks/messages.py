"""The messages between ranks, and which ranks send them. Each call waits until every rank concerned makes it.

A rank that is lost, or that does not make the same call, ends the waiting by the timeout of torch's process group.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, distributed

from polyak.errors import StateError

from .sharding import Sharding, local, sharding_of


def is_initialized() -> bool:
    """Whether torch.distributed is there, and has a process group."""
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def sending() -> Generator[None, None, None]:
    """Says what it means where torch cannot send a message, or gets none.

    Raises:
        StateError: it could not.
    """
    if not is_initialized():
        raise StateError(
            "ranks cannot send messages: the process group was destroyed, or never made. Do this before "
            "destroy_process_group()"
        )
    try:
        yield
    # torch raises all of these, in the backend's words.
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise StateError(
            "a message between ranks failed: one of them is lost, has raised an error, or has not made the same call "
            f"within the timeout of the process group. torch says: {type(error).__name__}: {first_line}"
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """All parts of a tensor put together; a plain one itself.

    Raises:
        StateError: a message failed.
    """
    sharding = sharding_of(tensor)
    if sharding is None:
        return tensor
    part = local(tensor)
    # Messages go between the devices of the mesh.
    wrapped = cast("Any", sharding.wrap(part.to(sharding.mesh.device_type)))
    with sending():
        for placements in sharding.unrolled():
            wrapped = wrapped.redistribute(placements=placements)
        return wrapped.full_tensor().to(part.device)


def any_rank(mine: bool, meshes: Sequence[Any]) -> bool:
    """Whether it is so on any rank of these meshes.

    Raises:
        StateError: a message failed.
    """
    for mesh in meshes:
        with sending():
            flag = torch.tensor([int(mine)], dtype=torch.int32, device=mesh.device_type)
            for dimension in range(mesh.ndim):
                _reduce(flag, distributed.ReduceOp.MAX, mesh.get_group(dimension))
            mine = bool(flag.item())
    return mine


class Question:
    """`any_rank`, asked once: who is interrupted while waiting asks again, and goes on to wait.

    Args:
        meshes: the ranks.
    """

    def __init__(self, meshes: Sequence[Any]) -> None:
        self._meshes = [(mesh, dimension) for mesh in meshes for dimension in range(mesh.ndim)]
        self._asked: list[tuple[Tensor, Any]] = []

    def ask(self, mine: bool) -> bool:
        """Whether it is so on any rank; all of them ask.

        Raises:
            StateError: a message failed.
        """
        for number, (mesh, dimension) in enumerate(self._meshes):
            with sending():
                if len(self._asked) == number:
                    flag = torch.tensor([int(mine)], dtype=torch.int32, device=mesh.device_type)
                    work = _reduce(flag, distributed.ReduceOp.MAX, mesh.get_group(dimension), waits=False)
                    self._asked.append((flag, work))
                flag, work = self._asked[number]
                work.wait()
                mine = bool(flag.item())
        return mine


def reduced(numbers: Sequence[int], mesh: Any, dimension: int) -> list[int]:
    """The largest at each place of what the ranks along a dimension of a mesh have, in numbers of 64 bits with a sign.

    Raises:
        StateError: a message failed.
    """
    with sending():
        mine = torch.tensor(numbers, dtype=torch.int64, device=mesh.device_type)
        _reduce(mine, distributed.ReduceOp.MAX, mesh.get_group(dimension))
        return mine.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  # torch leaves it half untyped


def apart(numbers: Sequence[int], mesh: Any) -> list[int]:
    """The positions at which ranks of a mesh have different numbers, of 64 bits; each gives as many.

    Raises:
        StateError: a message failed.
    """
    with sending():
        mine = torch.tensor([_signed(number) for number in numbers], dtype=torch.int64, device=mesh.device_type)
        # The complement of the largest complement is the smallest.
        both = torch.stack([mine, ~mine])
        for dimension in range(mesh.ndim):
            _reduce(both, distributed.ReduceOp.MAX, mesh.get_group(dimension))
        return (both[0] != ~both[1]).nonzero().flatten().cpu().tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  # torch leaves it half untyped


def given_by_all(mine: Any, group: Any) -> list[Any]:
    """What each rank of a group gives, in the order of the group; None is the group of all.

    Raises:
        StateError: a message failed.
    """
    with sending():
        given: list[Any] = [None] * cast("Any", distributed).get_world_size(group)
        cast("Any", distributed).all_gather_object(given, mine, group)
    return given


def sums_of_parts(
    mine: Mapping[str, Sequence[float]], lies: Mapping[str, Sharding | None]
) -> dict[str, tuple[float, ...]]:
    """The sums, over the parts of each tensor that ranks have, of what each rank says of its part; replicas count once.

    Args:
        mine: numbers by name, as many for each.
        lies: how they lie over the ranks, by name; None for what is whole on each rank.

    Raises:
        StateError: a message failed.
    """
    found = {name: tuple(numbers) for name, numbers in mine.items()}
    alike: dict[tuple[Any, tuple[int, ...]], list[str]] = {}
    for name in mine:
        sharding = lies[name]
        if sharding is not None:
            alike.setdefault((sharding.mesh, sharding.cutting), []).append(name)
    for (mesh, dimensions), names in alike.items():
        with sending():
            numbers = torch.tensor([found[name] for name in names], dtype=torch.float64, device=mesh.device_type)
            for dimension in dimensions:
                _reduce(numbers, distributed.ReduceOp.SUM, mesh.get_group(dimension))
            found |= zip(names, map(tuple, numbers.tolist()), strict=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]  # torch leaves it half untyped
    return found


def _reduce(numbers: Tensor, operation: Any, group: Any, *, waits: bool = True) -> Any:
    return cast("Any", distributed).all_reduce(numbers, op=operation, group=group, async_op=not waits)


def _signed(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def meshes_of(shardings: Iterable[Sharding | None]) -> list[Any]:
    """The meshes that this rank is in, each once, the largest last: what all of its ranks know then, all know."""
    found = dict.fromkeys(sharding.mesh for sharding in shardings if sharding is not None)
    return sorted((mesh for mesh in found if mesh.get_coordinate() is not None), key=lambda mesh: mesh.size())


def is_alone() -> bool:
    """Whether no other process trains together with this one, as far as torch.distributed knows; sends nothing."""
    return not is_initialized() or distributed.get_world_size() == 1


def is_first(meshes: Sequence[Any]) -> bool:
    """Whether this rank is the one that acts for all of these meshes; alone it does."""
    return not meshes or not any(meshes[-1].get_coordinate())


@contextmanager
def all_or_none(meshes: Sequence[Any], what: str) -> Generator[None, None, None]:
    """Every rank comes out of the `with`, or every rank raises; each of them must go in.

    Raises:
        StateError: another rank raised an error, or is lost.
    """
    try:
        yield
    except BaseException:
        # What this rank knows says more than that the others do not answer any more.
        with suppress(StateError):
            any_rank(True, meshes)
        raise
    if any_rank(False, meshes):
        raise StateError(f"{what}: another rank raised an error, which says why; nothing was written")
