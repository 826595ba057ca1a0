"""The swap as a whole: which average stands in which model, and what must not happen meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyak.errors import StateError, listed
from polyak.model import check_not_standing, leave, occupy
from polyak.ranks import Question, all_or_none, local

from .agreement import agreed
from .core import Core


def swap_in(core: Core, name: str) -> None:
    """Puts the average of that name into the source, in which none stands; where it fails, `swap_out` undoes it."""
    with agreed(core, "swapped()", name, sends=core.store.shares.mesh is not None):
        core.verify_values()
        core.warn_if_never_updated("swapped in")
    buffers = [entry.name for entry in core.source.entries if not entry.is_parameter]
    meshes = [] if core.store.shares.mesh is None else core.store.meshes
    with all_or_none(meshes, "swapped()"):
        # It takes memory, and a rank which has none must say so before others wait for its share. A live module reads
        # the store's tensors, which must stay averages then.
        swap = core.store.make_swap(name, buffers=buffers, aside=len(core.live) > 0)
    core.leaving = Question(meshes)
    core.swapped = name
    occupy(core.source.bare, name)
    core.training_hook = register_optimizer_step_pre_hook(_refuse_to_train({id(e.tensor) for e in core.source.entries}))
    core.store.swap_in(swap)
    _note_changes(core)


def swap_out(core: Core) -> list[str]:
    """Puts the source's own weights back; returns the names of parameters that were changed or replaced meanwhile.

    It may be called at any time, also after `swap_in` or itself was interrupted, and does what is left to do.
    """
    if core.swapped is None:
        return []
    # A pass inside has left the average, whole, where the next one would take it for the weights.
    core.source.reshard()
    try:
        changed = core.store.swap_out()
        changed += _take_back_replaced(core, core.swapped)
        if core.leaving is not None and core.leaving.ask(len(changed) > 0) and not changed:
            changed = ["parameters on another rank"]
    except StateError as error:
        raise StateError(
            "the trained weights cannot be put back: each rank holds its share of them, and not all ranks answer. End "
            f"this run, and go on from the last checkpoint. {error}"
        ) from error
    _note_changes(core)
    if core.training_hook is not None:
        core.training_hook.remove()
        core.training_hook = None
    leave(core.source.bare)
    core.swapped = core.leaving = None
    return changed


def _note_changes(core: Core) -> None:
    """So that a graph which used a DTensor notices; the store has written to its local part."""
    torch.autograd.graph.increment_version([e.tensor for e in core.source.entries if e.sharding is not None])


@torch.no_grad()
def _take_back_replaced(core: Core, name: str) -> list[str]:
    """Gives tensors that were replaced inside of a swap the source's own weights; returns the names of parameters.

    A buffer that was replaced was written, in another way: its value belongs to the average.
    """
    raw, averages = core.store.raw() | core.store.wholes, core.store.tensors(name)
    parameters: list[str] = []
    for entry, site in core.source.replaced():
        found = local(site.tensor)
        fits = entry.name in raw and found.shape == raw[entry.name].shape
        # What is equal already was taken back before this was interrupted.
        if fits and not torch.equal(found, raw[entry.name].to(found.device)):
            if not entry.is_parameter:
                averages[entry.name].copy_(found)
            found.copy_(raw[entry.name])
        if entry.is_parameter or not (fits or entry.is_loose):
            parameters.append(site.name)
    return parameters


def raise_if_changed(changed: list[str]) -> None:
    """Raises where parameters were changed while the average stood in the source."""
    if changed:
        raise StateError(
            f"changed inside of swapped(): {listed(changed)}. The trained weights are back as they were; parameters "
            "must not be trained, loaded or moved while the average stands in the model"
        )


@contextmanager
def swapped(core: Core, name: str) -> Generator[None, None, None]:
    """The average stands in the source inside of the `with`, whatever happens there."""
    check_not_standing(core.source.bare, "a swap")
    try:
        swap_in(core, name)
        yield
        changed = swap_out(core)
    except BaseException:
        # Also where the swap itself was interrupted: what is left of it is done before that goes on.
        swap_out(core)
        raise
    raise_if_changed(changed)


def _refuse_to_train(tensors: set[int]) -> Any:
    def check(optimizer: Optimizer, *_: object) -> None:
        if any(id(parameter) in tensors for group in optimizer.param_groups for parameter in group["params"]):
            raise StateError("optimizer.step() inside of swapped(): it would train the average. Leave the swap first")

    return check
