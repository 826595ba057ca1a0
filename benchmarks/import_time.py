"""What `import polyak` adds to `import torch`, in fresh processes."""

import os
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.timing import Spread, spread

BUDGET = 60.0
NAME_BUDGET = 80.0

TORCH = """
from time import perf_counter
started = perf_counter()
import torch
print(perf_counter() - started)
"""
POLYAK = """
from time import perf_counter
started = perf_counter()
import torch
between = perf_counter()
import polyak
after = perf_counter()
polyak.WeightAverage
print(after - started, after - between, perf_counter() - after)
"""


@dataclass(frozen=True)
class ImportTime:
    """Milliseconds.

    `after_torch` is timed inside one process, once torch is loaded. It is judged, because `added`, the difference of
    two medians that are twenty times as large, wavers by more than the budget on a busy machine. `first_name` is the
    time of `polyak.WeightAverage`, the first name that is used, after that.
    """

    torch: Spread
    both: Spread
    after_torch: Spread
    first_name: Spread

    @property
    def added(self) -> float:
        return self.both.median - self.torch.median

    @property
    def within_budget(self) -> bool:
        return self.after_torch.median <= BUDGET


def run(program: str) -> list[float]:
    # With bytecode, as installed packages have it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return [float(seconds) * 1e3 for seconds in output.split()]


def measure(rounds: int) -> ImportTime:
    run(POLYAK)  # fills the caches
    torch_alone: list[float] = []
    both: list[float] = []
    after_torch: list[float] = []
    first_name: list[float] = []
    for _ in range(rounds):
        torch_alone += run(TORCH)
        total, added, named = run(POLYAK)
        both.append(total)
        after_torch.append(added)
        first_name.append(named)
    return ImportTime(spread(torch_alone), spread(both), spread(after_torch), spread(first_name))
