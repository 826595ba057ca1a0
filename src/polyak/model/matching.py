"""Whether two sets of tensors are alike: in names, in ties, and in shape and kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from polyak.errors import MismatchError, listed
from polyak.kernels import kind_of
from polyak.names import renaming
from polyak.ranks import describe, sharding_of

from .entries import Entry, Rules, gather, make_entry
from .walk import Site


def match_sites(
    model: nn.Module, entries: Iterable[Entry], *, given_by: str, rules: Rules | None = None, hint: str = ""
) -> dict[str, tuple[Site, ...]]:
    """The places of a model that hold what these entries are, by name, after everything was checked.

    Loose entries (caches) may be missing, and there may be others.

    Raises:
        MismatchError: the model has other tensors.
    """
    known = {entry.name: entry for entry in entries}
    strict = {name: entry for name, entry in known.items() if not entry.is_loose}
    groups = gather(model)
    rename = renaming((sites[0].name for sites in groups), known)
    found = {rename(sites[0].name): tuple(sites) for sites in groups}
    loose = {name for name, sites in found.items() if name not in strict and make_entry(sites, rules or {}).is_loose}
    check_same_names(
        {name: [rename(site.name) for site in sites] for name, sites in found.items() if name not in loose},
        {name: [name, *map(rename, entry.aliases)] for name, entry in strict.items()},
        given_by=given_by,
        wanted_by="the average",
        hint=hint,
    )
    for name, entry in strict.items():
        _check_same_kind(entry, found[name][0].tensor, given_by=given_by, hint=hint)
    return found


def check_same_names(
    given: Mapping[str, Sequence[str]],
    wanted: Mapping[str, Sequence[str]],
    *,
    given_by: str,
    wanted_by: str,
    hint: str = "",
) -> None:
    """Raises MismatchError unless both have the same tensors under the same names, tied in the same way.

    Args:
        given: the names of each tensor, by its first name.
        wanted: the same, as it should be.
        given_by: whose tensors the first are, for the error.
        wanted_by: whose tensors the others are.
        hint: what to do, at the end of the error.
    """
    missing, extra = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    aliases = {alias: name for name, names in wanted.items() for alias in names[1:]}
    cut = next((name for name in extra if name in aliases), None)
    if cut is not None:
        cause = f"{cut!r} was tied to {aliases[cut]!r} and is a tensor of its own now"
    elif len(missing) == len(extra):
        cause = "it is another model, or its layers were renamed"
    else:
        cause = "layers were added or removed"
    if missing or extra:
        raise MismatchError(
            f"{given_by} and {wanted_by} hold different tensors. Only {wanted_by}: {listed(missing) or 'none'}. Only "
            f"{given_by}: {listed(extra) or 'none'}. Probably {cause}. Nothing was written{hint}"
        )
    for name, names in given.items():
        if set(names) != set(wanted[name]):
            raise MismatchError(
                f"{given_by} and {wanted_by} tie {name!r} differently: {listed(names)} against {listed(wanted[name])}. "
                "Nothing was written"
            )


def _check_same_kind(entry: Entry, tensor: Tensor, *, given_by: str, hint: str) -> None:
    if tensor.shape != entry.shape:
        difference = f"the shape {tuple(tensor.shape)}, not {tuple(entry.shape)}"
    elif kind_of(tensor.dtype) != kind_of(entry.dtype):
        difference = f"the dtype {tensor.dtype}, not {entry.dtype}"
    elif sharding_of(tensor) != entry.sharding:
        raise MismatchError(
            f"{entry.name!r} of {given_by} is {describe(sharding_of(tensor))}, and was {describe(entry.sharding)} when "
            "the average was made. Nothing was written. Make the average after the model is sharded. Its state goes "
            "from one layout to another by torch.distributed.checkpoint, and weights() gives whole tensors"
        )
    else:
        return
    raise MismatchError(f"{entry.name!r} of {given_by} has {difference}. Nothing was written{hint}")
