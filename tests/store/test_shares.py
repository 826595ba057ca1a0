"""Which slice of a tensor is whose, where ranks share averages; without ranks, for meshes of any size."""

import itertools

import pytest
import torch
from torch import distributed

import polyak.store.shares
from polyak.ranks.sharding import Sharding

if not distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset


class Mesh:
    """What of a DeviceMesh is asked, seen by the rank at some coordinates."""

    def __init__(self, shape, coordinates):
        self.shape, self.ndim, self._coordinates = shape, len(shape), coordinates

    def size(self, dimension):
        return self.shape[dimension]

    def get_coordinate(self):
        return list(self._coordinates)


def share(shape, coordinates, placements, size, replicated):
    mesh = Mesh(shape, coordinates)
    sharding = Sharding(mesh, placements, torch.Size([size]), (1,))
    return polyak.store.shares._share_of_mesh(sharding, replicated, coordinates[replicated])


@pytest.mark.protects
@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (4, 3), (2, 4)])
@pytest.mark.parametrize("replicated", [0, 1])
def test_each_element_is_in_one_share_and_torch_knows_where(shape, replicated):
    placements = (Replicate(), Shard(0)) if replicated == 0 else (Shard(0), Replicate())
    shared = []
    for size in range(2, 51):
        found = {
            coordinates: share(shape, coordinates, placements, size, replicated)
            for coordinates in itertools.product(*map(range, shape))
        }
        # All ranks come to the same, without a message.
        assert len({each is None for each in found.values()}) == 1
        if None in found.values():
            continue
        shared.append(size)
        seen = []
        for coordinates, each in found.items():
            part = Sharding(Mesh(shape, coordinates), placements, torch.Size([size]), (1,)).cut(torch.arange(size))
            mine = each.of(part)
            assert torch.equal(mine, each.sharding.cut(torch.arange(size)))
            local, offset = _compute_local_shape_and_global_offset(
                (size,), shape, list(coordinates), each.sharding.placements
            )
            assert local == mine.shape
            assert len(mine) == 0 or offset == (mine[0],)
            seen += mine.tolist()
        assert sorted(seen) == list(range(size))
    # What divides evenly always is, and all else nearly always.
    assert {size for size in range(2, 51) if size % (shape[0] * shape[1]) == 0} <= set(shared)
    assert len(shared) > 35


@pytest.mark.protects
def test_slices_that_torch_would_place_elsewhere_are_not_shared():
    assert share((3, 2), (0, 0), (Replicate(), Shard(0)), 7, 0) is None


def test_large_tensors_are_cut_where_they_are_one_stretch():
    outermost = polyak.store.shares._outermost
    assert outermost((64, 12), (12, 1), (4, 4)) == 0
    assert outermost((64, 12), (1, 64), (4, 4)) == 1  # transposed
    assert outermost((8, 3, 5, 5), (75, 1, 15, 3), (4,) * 4) == 0  # channels-last
    assert outermost((3, 50), (50, 1), (4, 4)) == 1  # fewer rows than ranks
    assert outermost((2, 3), (3, 1), (4, 4)) == 1
    assert outermost((), (), ()) is outermost((1, 1), (1, 1), (4, 4)) is outermost((0, 4), (4, 1), (4, 4)) is None
