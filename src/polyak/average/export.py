"""The average under the names of the bare model: as a dictionary, and as a file for others to load."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import StateError, listed, outside
from polyak.kernels import cast_floating_point, check_floating_point, is_plain
from polyak.model import ADAPTER_FILE, adapter_weights, extra_states, is_adapted, write_adapter_config
from polyak.ranks import all_or_none, is_first, local, whole

from .agreement import agreed
from .core import Core

_PICKLED = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar"})


def by_every_name(core: Core, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the store's tensors, whole, under each name that the bare model's `state_dict` has for them.

    Those not given are the source's. Where one is sharded, every rank must ask for it.
    """
    found = _live_by_every_name(core, tensors)
    # Each name of a tied tensor has the same copy.
    copies = {key: _copy(tensor) for key, tensor in {id(tensor): tensor for tensor in found.values()}.items()}
    return {name: copies[id(tensor)] for name, tensor in found.items()}


def raw_weights(core: Core) -> dict[str, Tensor]:
    """The source's own weights, wherever they stand; see `WeightAverage.raw_weights`."""
    # Outside of a swap each rank has its part of them, and they are right whatever updates other ranks have made.
    with all_or_none(core.store.meshes if core.swapped else core.source.meshes, "raw_weights()"):
        core.verify()
        check_can_be_whole(core, "raw_weights()")
    return by_every_name(core, core.store.raw() if core.swapped else {}) | extra_states(core.source.model)


def _copy(tensor: Tensor) -> Tensor:
    made = whole(tensor)
    return made.clone() if made is tensor else made


def _live_by_every_name(core: Core, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors themselves, as they lie over the ranks."""
    found: dict[str, Tensor] = {}
    for entry in core.source.entries:
        if entry.persistent_names:
            tensor = tensors.get(entry.name, entry.local).detach()
            sharding = core.store.lies[entry.name] if entry.name in tensors else entry.sharding
            if sharding is not None:
                tensor = sharding.wrap(tensor)
            found.update(dict.fromkeys(entry.persistent_names, tensor))
    return found


def check_can_be_whole(core: Core, call: str) -> None:
    """Raises where no rank can put a tensor together."""
    if core.source.flat_rank is not None:
        raise StateError(
            f"{call} of a model that FullyShardedDataParallel spreads over {core.source.flat_rank[1]} ranks: each has "
            "stretches of parameters, without their shapes. Inside of `with average.swapped(): ...` it is what "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict gives; or shard by fully_shard (FSDP2)"
        )


def export(core: Core, name: str, path: str | os.PathLike[str], *, dtype: torch.dtype | None) -> None:
    """Writes an average to a file; see `Average.export`.

    Of the ranks over which a model is sharded one writes, and takes tensor by tensor what all of them give.
    """
    # Imported here, because the file formats take as long to import as everything that training needs.
    from polyak.files.writing import in_file_order, write_safetensors

    check_can_be_whole(core, "export()")
    meshes = core.store.meshes
    what = f"export({os.fspath(path)!r})"
    with agreed(core, what, name, dtype):
        target, tensors = _prepare(core, name, path, dtype, writes=is_first(meshes))
    metadata = {
        "profile": json.dumps(core.profiles[name].describe()),
        "time": repr(core.clock.time),
        "num_updates": str(core.num_updates),
    }
    given = iter(in_file_order(tensors))

    def give(key: str) -> Tensor:
        assert next(given) == key
        return whole(tensors[key])

    with all_or_none(meshes, what):
        try:
            if is_first(meshes):
                write_safetensors(target, tensors, metadata=metadata, give=give)
        finally:
            # Whatever became of the file, others wait for what this rank has of each tensor.
            for key in given:
                whole(tensors[key])


def _prepare(
    core: Core, name: str, path: str | os.PathLike[str], dtype: torch.dtype | None, *, writes: bool
) -> tuple[Path, dict[str, Tensor]]:
    """The file, and the tensors that are to be in it, as they lie over the ranks."""
    if dtype is not None:
        check_floating_point(dtype)
    core.verify_values()
    core.warn_if_never_updated("exported")
    bare = core.source.bare
    tensors = _live_by_every_name(core, core.store.tensors(name))
    left_out = extra_states(bare)
    if left_out:
        warnings.warn(f"left out of the file, which holds tensors only: {listed(left_out)}", stacklevel=outside())
    target = Path(path)
    if target.suffix in _PICKLED:
        raise ValueError(
            f"{os.fspath(path)!r}: an export is a safetensors file, and {target.suffix} says that it is one of "
            "torch.save; name it .safetensors, or polyak.save(average.weights(), ...)"
        )
    if is_adapted(bare):
        tensors = adapter_weights(bare, tensors)
        if target.is_dir():
            if writes:
                write_adapter_config(bare, target)
            target = target / ADAPTER_FILE
    if dtype is not None:
        tensors = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    return target, tensors


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # What each rank has is looked at where it is.
    made = cast_floating_point(local(tensor), dtype, what=repr(name))
    return made if is_plain(tensor) else tensor.to(made.dtype)
