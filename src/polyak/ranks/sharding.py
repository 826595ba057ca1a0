"""Tensors whose parts are on several ranks: the part that is here, where it lies in the whole, and the whole.

What averages, swaps and saves is given the local part, a plain tensor, and knows nothing of the others. Nothing here
sends a message. torch's part for it is looked for, not imported: who has none of its tensors need not wait for it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from polyak.errors import StateError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, replicated ones included.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return _is_sharded(type(tensor))


@functools.lru_cache(maxsize=256)
def _is_sharded(kind: type) -> bool:
    # If it was not imported, no tensor is one.
    found = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return found is not None and issubclass(kind, found)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of a plain one, itself."""
    return cast("Any", tensor)._local_tensor if is_sharded(tensor) else tensor


@dataclass(frozen=True)
class Sharding:
    """How a tensor lies over the ranks.

    Attributes:
        mesh: the ranks, as torch's DeviceMesh.
        placements: one for each dimension of the mesh.
        shape: of the whole.
        stride: of the whole.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.placements} over a mesh of {tuple(self.mesh.shape)} ranks"

    @property
    def is_partial(self) -> bool:
        """Whether the whole is a sum over ranks, and no rank holds elements of it."""
        return any(placement.is_partial() for placement in self.placements)

    @property
    def cutting(self) -> tuple[int, ...]:
        """The dimensions of the mesh over which ranks have different parts of the whole."""
        return tuple(number for number, placement in enumerate(self.placements) if not placement.is_replicate())

    def unrolled(self) -> Iterator[tuple[Any, ...]]:
        """The placements that are left after each cut is undone that was made after those to the right of it.

        torch undoes cuts from the right, and warns where it has to find such an order by itself.
        """
        from torch.distributed.tensor import Replicate

        left = list(self.placements)
        for number, placement in enumerate(self.placements):
            if type(placement).__name__ == "_StridedShard":
                left[number] = Replicate()
                yield tuple(left)

    @property
    def label(self) -> str:
        """The same on all ranks that have the same part of the whole."""
        where = cast("list[int] | None", self.mesh.get_coordinate()) or [-1] * len(self.placements)
        return str([where[number] for number in self.cutting])

    def wrap(self, part: Tensor) -> Tensor:
        """The DTensor of which this is the part that is here; complex numbers may be given as pairs of real ones.

        It shares the part's memory, also where that is on another device than the mesh, as averages on the host are.
        """
        from torch.distributed.tensor import DTensor

        shape, stride = self.shape, self.stride
        if part.dim() == len(shape) + 1:
            shape, stride = torch.Size((*shape, 2)), (*(2 * each for each in stride), 1)
        part = part.detach()
        if part.device.type != self.mesh.device_type:
            # The usual way would copy it to the device of the mesh.
            from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

            spec = DTensorSpec(self.mesh, self.placements, tensor_meta=TensorMeta(shape, stride, part.dtype))
            return cast("Any", DTensor)(part, spec, requires_grad=False)
        # Shape and stride are not left to be inferred, which goes wrong where ranks have parts of different sizes.
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor that belongs here."""
        for dimension, places in enumerate(self._places):
            whole = whole.index_select(dimension, places.to(whole.device))
        return whole

    @property
    def first(self) -> int:
        """The place of the part's first element in the memory of the whole.

        Raises:
            StateError: the part is not one block of the whole.
        """
        for places in self._places:
            if len(places) and int(places[-1]) - int(places[0]) + 1 != len(places):
                raise StateError(
                    f"a tensor of shape {tuple(self.shape)} is sharded as {self}, where a rank holds several blocks "
                    "of it; averages that are rounded stochastically need one block a rank. Leave dtype= out"
                )
        return sum(
            int(places[0]) * stride for places, stride in zip(self._places, self.stride, strict=True) if len(places)
        )

    @functools.cached_property
    def _places(self) -> list[Tensor]:
        """For each dimension, the indices in the whole of what is here."""
        coordinates: list[int] | None = self.mesh.get_coordinate()
        if coordinates is None:
            return [torch.arange(0, device="cpu") for _ in self.shape]
        return [self.places(dimension, coordinates) for dimension in range(len(self.shape))]

    def places(self, dimension: int, coordinates: Sequence[int]) -> Tensor:
        """The indices along a dimension of the whole that the rank with these coordinates in the mesh has."""
        indices = torch.arange(self.shape[dimension], device="cpu")
        # A line along this dimension, for placements split a tensor along the dimension that they name.
        line = indices.view([-1 if d == dimension else 1 for d in range(len(self.shape))])
        for number, placement in enumerate(self.placements):
            if getattr(placement, "dim", None) == dimension:
                pieces, _ = placement._split_tensor(line, self.mesh.size(number), with_padding=False)
                line = pieces[coordinates[number]]
        return line.flatten()


def sharding_of(tensor: Tensor) -> Sharding | None:
    """How a DTensor lies over the ranks; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    kept = cast("Any", tensor)
    return Sharding(kept.device_mesh, tuple(kept.placements), kept.shape, tuple(kept.stride()))


def describe(sharding: Sharding | None) -> str:
    """For errors."""
    return "not sharded" if sharding is None else f"sharded as {sharding}"
