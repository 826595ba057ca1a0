"""What becomes of the others when a rank is lost: `python lost_ranks.py FOLDER` runs each case on three real ranks.

A case is called as `case(rank, folder)` with a process group whose timeout is short. What it returns, or the error that
it raises, is left in `FOLDER/CASE.RANK.json` with the seconds that it took.
"""

import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which fully_shard imports, in each fork anew where that comes first
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak.average
import zoo

SIZE = 3
TIMEOUT = 3.0
LOST = 2


def _shared():
    torch.manual_seed(0)
    model = zoo.mlp()
    average = polyak.WeightAverage(model, shard_over=distributed.group.WORLD)
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update()
    return model, average


def _sharded():
    torch.manual_seed(0)
    model = fully_shard(zoo.mlp(), mesh=init_device_mesh("cpu", (SIZE,)))
    average = polyak.WeightAverage(model)
    average.update()
    return model, average


def _error(call):
    """What a call raises, as text."""
    try:
        call()
    except polyak.PolyakError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def lost_before_a_swap(rank, folder):
    model, average = _shared()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if rank == LOST:
        os._exit(1)
    said = _error(average.swap_in)
    average.update()
    return said, zoo.bit_equal(model.state_dict(), kept) and not average.is_swapped


def lost_inside_of_a_swap(rank, folder):
    _, average = _shared()
    average.swap_in()
    if rank == LOST:
        os._exit(1)
    said = _error(average.swap_out)
    return said, "inside of swapped()" in _error(average.update)


def late_for_a_swap(rank, folder):
    _, average = _shared()
    if rank == LOST:
        time.sleep(2 * TIMEOUT)
        return "", True
    return _error(average.swap_in), not average.is_swapped


def lost_before_an_export(rank, folder):
    _, average = _sharded()
    path = folder / "lost.safetensors"
    average.export(path)
    kept = path.read_bytes()
    distributed.barrier()
    if rank == LOST:
        os._exit(1)
    said = _error(lambda: average.export(path))
    return said, path.read_bytes() == kept and [each.name for each in folder.glob("lost.*")] == [path.name]


def lost_before_a_report(rank, folder):
    _, average = _sharded()
    if rank == LOST:
        os._exit(1)
    return _error(average.report), "message between ranks failed" in _error(average.weights)


def destroyed_too_early(rank, folder):
    model, average = _shared()
    sharded, other = _sharded()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distributed.barrier()
    distributed.destroy_process_group()
    calls = [average.swap_in, average.weights, average.report, average.module, other.weights, other.report]
    calls += [lambda: other.export(folder / "never.safetensors"), average.check_in_sync]
    calls += [lambda: polyak.WeightAverage(sharded)]
    said = {_error(call).partition(":")[0] + str("the process group was destroyed" in _error(call)) for call in calls}
    average.update(), other.update()
    with other.swapped():
        pass
    intact = zoo.bit_equal(model.state_dict(), kept) and not (folder / "never.safetensors").exists()
    return str(said), intact


def lost_in_the_middle_of_a_save(rank, folder):
    _, average = _sharded()
    first, second = folder / "step-1", folder / "step-2"
    checkpoint.save({"average": average}, checkpoint_id=first)

    class Dies(checkpoint.FileSystemWriter):
        def write_data(self, plan, planner):
            if rank == LOST:
                os._exit(1)
            return super().write_data(plan, planner)

    average.update()
    try:
        checkpoint.save({"average": average}, storage_writer=Dies(second))
        said = "nothing was raised"
    # torch raises what its backend does.
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, polyak.read(first).counters["num_updates"] == 1 and "FileFormatError" in _error(
        lambda: polyak.read(second)
    )


CASES = {
    case.__name__: case
    for case in (
        lost_before_a_swap,
        lost_inside_of_a_swap,
        late_for_a_swap,
        lost_before_an_export,
        lost_before_a_report,
        destroyed_too_early,
        lost_in_the_middle_of_a_save,
    )
}


def _rank_main(rank, name, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{name}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=TIMEOUT),
    )
    started = time.monotonic()
    try:
        said, intact = CASES[name](rank, folder)
    except BaseException as error:
        said, intact = f"not expected: {type(error).__name__}: {error}", False
    seconds = time.monotonic() - started
    (folder / f"{name}.{rank}.json").write_text(json.dumps({"said": said, "intact": intact, "seconds": seconds}))
    os._exit(0)


def main(folder):
    warnings.simplefilter("ignore")
    for name in CASES:
        processes = []
        for rank in range(SIZE):
            process = os.fork()
            if process == 0:
                _rank_main(rank, name, folder)
            processes.append(process)
        for process in processes:
            os.waitpid(process, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
