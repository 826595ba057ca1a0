"""Models that FSDP manages, in both of its kinds: that they hold their shards, and nothing that was gathered before.

After a forward pass without gradients some parts keep whole parameters, which are neither the ones that an optimizer
trains nor see what is written to those: the next pass would use them as they are, be they averages or not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from polyak.errors import StateError
from polyak.ranks import is_alone


@torch.no_grad()
def reshard(model: nn.Module) -> None:
    """Lets every part of a model hold its shards, and forget what it has gathered; sends no message.

    Raises:
        StateError: somebody has gathered the parameters to look at them, and would write them back.
    """
    for module in (*_managed(model, "FSDPModule"), *_managed_from_outside(model)):
        module.reshard()
        for group in _groups(module):
            # Where a pass was interrupted, groups still wait for its end, or for parameters that are on their way.
            if getattr(group, "_all_gather_result", None) is not None:
                group.wait_for_unshard()
            if not group.is_sharded:
                group._to_sharded()
    for handle in _flat_handles(model):
        if handle._training_state.name == "SUMMON_FULL_PARAMS":
            raise StateError(
                "inside of summon_full_params() the model has whole parameters, and each rank averages its own part of "
                "them: leave it first"
            )
        if hasattr(handle.flat_param, "_full_param_padded") and not handle.needs_unshard():
            handle.reshard(True)


def flat_rank(model: nn.Module) -> tuple[int, int] | None:
    """The rank and the number of ranks where FullyShardedDataParallel spreads stretches of parameters over several.

    Raises:
        StateError: it holds them in a form of its own, without names; or it is not a part of this model.
    """
    wrappers = list(_managed(model, "FullyShardedDataParallel"))
    is_stretch = (getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())
    if not wrappers and not is_alone() and any(is_stretch):
        raise StateError(
            f"what this {type(model).__name__} has are stretches of parameters, of a FullyShardedDataParallel that it "
            "is a part of: average that, or better shard the model by fully_shard (FSDP2)"
        )
    for module in wrappers:
        if not module._use_orig_params:
            raise StateError(
                "FullyShardedDataParallel without use_orig_params=True hides parameters and their names in flat ones; "
                "set it, or better shard the model by fully_shard (FSDP2)"
            )
        if module._handle is not None and module._handle.uses_sharded_strategy and module.process_group.size() > 1:
            return module.process_group.rank(), module.process_group.size()
    return None


def _managed(model: nn.Module, kind: str) -> Iterator[Any]:
    """The modules of a kind of FSDP; where nobody has imported it, there are none."""
    found = getattr(sys.modules.get("torch.distributed.fsdp"), kind, None)
    if found is not None:
        yield from (cast("Any", module) for module in model.modules() if isinstance(module, found))


def _managed_from_outside(model: nn.Module) -> list[Any]:
    """The modules by which FSDP2 manages parameters of a model that is a part of theirs."""
    found = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", ())
    inside = set(model.modules())
    return [
        module
        for module in list(known)
        if isinstance(module, found) and module not in inside and not inside.isdisjoint(_holders(module))
    ]


def _holders(module: Any) -> Iterator[nn.Module]:
    """The modules that hold parameters which FSDP2 manages by this one; several where they are tied."""
    for group in _groups(module):
        for parameter in group.fsdp_params:
            yield parameter._module_info.module
            yield from parameter._module_info.shared_modules


def _groups(module: Any) -> Iterable[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return several
    only = getattr(state, "_fsdp_param_group", None)
    return [] if only is None else [only]


def _flat_handles(model: nn.Module) -> Iterator[Any]:
    for module in _managed(model, "FullyShardedDataParallel"):
        if module._handle is not None and module._handle.uses_sharded_strategy:
            yield module._handle
