"""Runs checks in several processes that are started once for all of them: `python ranks.py FOLDER MODULE...`.

Processes are forked from one that has imported what is slow to import. The checks of a module are its functions with
the mark `on`; those for four ranks run first and those for one last, which may read what was left for them.
"""

import importlib
import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which fully_shard imports, in each fork anew where that comes first
from torch import distributed

import polyak.average  # noqa: F401  # which polyak imports when it is asked for

_SIZES = (4, 3, 2, 1)


def on(size):
    """Marks a check that is called as `check(folder)` on so many ranks."""

    def mark(function):
        function.num_ranks = size
        return function

    return mark


def checks_of(module):
    """The checks of a module by name, in the order in which they run."""
    found = {name: value for name, value in vars(module).items() if hasattr(value, "num_ranks")}
    return dict(sorted(found.items(), key=lambda item: -item[1].num_ranks))


def _rank_main(rank, size, checks, folder):
    torch.set_num_threads(1)
    # A fork shares the parent's random numbers, and file of a rendezvous.
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{size}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    for name, check in checks.items():
        started = time.monotonic()
        try:
            torch.manual_seed(0)
            check(folder)
            distributed.barrier()
        except BaseException:
            (folder / f"{name}.{rank}.json").write_text(json.dumps({"error": traceback.format_exc()}))
            os._exit(1)
        seconds = time.monotonic() - started
        (folder / f"{name}.{rank}.json").write_text(json.dumps({"error": "", "seconds": seconds}))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)


def _run(size, checks, folder):
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            _rank_main(rank, size, checks, folder)
        processes.append(process)
    failed = False
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status and not failed:
            failed = True
            time.sleep(1)  # others may be about to fail, and to say why
            for other in processes:
                os.kill(other, 9)
    return failed


def main(folder, names):
    warnings.simplefilter("error")
    for kind in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", kind)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    warnings.filterwarnings("ignore", message="polyak has no C kernel here")
    modules = [importlib.import_module(name) for name in names]
    checks = {name: check for module in modules for name, check in checks_of(module).items()}
    for size in _SIZES:
        chosen = {name: check for name, check in checks.items() if check.num_ranks == size}
        if chosen and _run(size, chosen, folder):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
