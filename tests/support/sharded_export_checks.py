"""Files of sharded averages: one rank writes for all, and all of them return or all of them raise."""

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor.debug import CommDebugMode

import polyak
import sharded_layout_checks
import sharded_zoo
import zoo
from polyak.files import writing
from ranks import on
from sharded_zoo import PROFILES, make, shard


def _trained():
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, PROFILES)
    sharded_zoo.drift(model, torch.Generator().manual_seed(1))
    average.update()
    return model, average["ema"]


@on(4)
def one_rank_writes_the_whole_file(folder):
    _, average = _trained()
    writers = []
    write = writing.write_safetensors

    def noting(path, tensors, **options):
        writers.append(distributed.get_rank())
        largest = max(tensor.to_local().numel() if hasattr(tensor, "to_local") else 0 for tensor in tensors.values())
        assert largest < 11 * 8  # nothing is whole before it is written
        write(path, tensors, **options)

    writing.write_safetensors = noting
    try:
        average.export(folder / "whole.safetensors")
        average.export(folder / "short.safetensors", dtype=torch.bfloat16)
    finally:
        writing.write_safetensors = write
    assert writers == ([0, 0] if distributed.get_rank() == 0 else [])
    right = average.weights()
    assert zoo.bit_equal(load_file(folder / "whole.safetensors"), right)
    short = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in right.items()}
    assert zoo.bit_equal(load_file(folder / "short.safetensors"), short)
    sharded_zoo.Net().load_state_dict(load_file(folder / "whole.safetensors"))


@on(4)
def all_ranks_raise_where_the_writer_fails(folder):
    _, average = _trained()
    path = folder / "failing.safetensors"
    average.export(path)
    distributed.barrier()
    before = path.read_bytes()
    content, calls = polyak.files.writing.safetensors._content, []

    def full(tensor):
        calls.append(tensor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return content(tensor)

    polyak.files.writing.safetensors._content = full
    try:
        kind, text = (
            (OSError, "cannot be written")
            if distributed.get_rank() == 0
            else (polyak.StateError, "another rank raised")
        )
        with pytest.raises(kind, match=text):
            average.export(path)
    finally:
        polyak.files.writing.safetensors._content = content
    distributed.barrier()
    assert path.read_bytes() == before
    kind = OSError if distributed.get_rank() == 0 else polyak.StateError
    with pytest.raises(kind):
        average.export(folder / "none" / "there.safetensors")
    average.export(path)


@on(4)
def all_ranks_raise_where_one_of_them_may_not(folder):
    model, _ = make()
    model.first.requires_grad_(False)
    shard(model)
    average = polyak.WeightAverage(model, polyak.Uniform())
    average.update()
    if distributed.get_rank() == 2:
        with torch.no_grad():
            model.first.weight._local_tensor.add_(1)
    text = "is frozen" if distributed.get_rank() == 2 else "another rank raised an error, which says why"
    with pytest.raises(polyak.StateError, match=text):
        average.export(folder / "frozen.safetensors")
    assert not (folder / "frozen.safetensors").exists()


@on(4)
def files_of_two_dimensions_of_ranks(folder):
    for name in ("both", "replicated", "tensor parallel"):
        model = sharded_layout_checks.LAYOUTS[name](sharded_layout_checks.make())
        average = polyak.WeightAverage(model, polyak.Uniform())
        average.update()
        path = folder / f"{name}.safetensors"
        average.export(path)
        assert zoo.bit_equal(load_file(path), average.weights())


@on(4)
def whole_tensors_are_asked_for_once_for_each_tie(folder):
    model, _ = make()
    shard(model)
    average = polyak.WeightAverage(model, polyak.Uniform())
    average.update()
    with CommDebugMode() as counter:
        weights = average.weights()
    assert weights["head.weight"] is weights["embedding.weight"]
    # And what ranks agree on to begin.
    assert counter.get_total_counts() == 1 + sum(1 for _ in model.parameters())
