"""Where the host's time goes in one update of many small tensors: each part is timed by itself, all in turn."""

from dataclasses import dataclass

import torch

import polyak
from benchmarks.contender import DECAY, WEIGHT
from benchmarks.shapes import small_tensors
from benchmarks.timing import in_turn, spread

WHOLE = "update() in all"
CALLS = 5


@dataclass(frozen=True)
class Account:
    """Microseconds, medians of warm calls; `rest` is what the parts leave of the whole."""

    whole: float
    parts: dict[str, float]

    @property
    def rest(self) -> float:
        return self.whole - sum(self.parts.values())


def measure(rounds: int = 100, *, device: torch.device | str = "cpu") -> Account:
    with torch.device(device):
        model = small_tensors()
    average = polyak.WeightAverage(model, polyak.Exponential(DECAY))
    core = average._core

    def clock_and_growth() -> None:
        core.clock.tick(None).growths(core.profiles.values(), since=core.store.updates.since)

    def kernel() -> None:
        core.store.updates.plan.run([WEIGHT])

    average.update()
    calls = {
        WHOLE: average.update,
        "check that the source is the same": core.follow_source,
        "clock and growth": clock_and_growth,
        "kernel": kernel,
    }
    # A GPU is not waited for: it is done long before the host has given it the next update.
    turns = in_turn(calls, rounds, num_calls=CALLS)
    parts = {name: spread(each.time).median * 1e3 for name, each in turns.items()}
    whole = parts.pop(WHOLE)
    return Account(whole, parts)
