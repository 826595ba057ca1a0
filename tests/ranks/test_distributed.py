"""Data-parallel training in real processes: the averages of all ranks are the same, bit for bit, without a message."""

import sys

import pytest
import torch
from torch import distributed, multiprocessing, nn

import polyak
import zoo

PROFILES = {"power": polyak.Power(), "ema": polyak.Exponential(0.9)}


def rank_main(rank, directory):
    distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(zoo.mlp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average, ema = polyak.WeightAverage(model, PROFILES), polyak.ModelEma(model, decay=0.9)
    generator = torch.Generator().manual_seed(rank)  # every rank has batches of its own
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        average.update()
        ema.update(model)
        if step == 3:
            with average["ema"].swapped(), torch.no_grad():
                model(torch.randn(4, 6, generator=generator))
    torch.save({name: average[name].weights() for name in PROFILES}, f"{directory}/{rank}.pt")
    torch.save(ema.ema.module.state_dict(), f"{directory}/classic-{rank}.pt")
    # A rank that closes its connections while the other still reads from them would break it.
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.protects
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's files need POSIX")
def test_averages_of_all_ranks_are_bit_equal(tmp_path):
    multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in PROFILES:
        assert zoo.bit_equal(one[name], other[name])
    classic = [torch.load(tmp_path / f"classic-{rank}.pt") for rank in range(2)]
    assert zoo.bit_equal(*classic)
    assert zoo.bit_equal(classic[0], one["ema"])
