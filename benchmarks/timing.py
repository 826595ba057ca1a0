"""Times calls in turn, so that what drifts on the machine hits all of them equally."""

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and the quartiles around it."""

    median: float
    lower: float
    upper: float


def spread(milliseconds: Sequence[float]) -> Spread:
    if len(milliseconds) == 1:
        return Spread(*milliseconds * 3)
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Spread(median, lower, upper)


def milliseconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return (perf_counter() - started) * 1e3


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times each call once a round, in another order every round."""
    names = list(calls)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(names)
            for name in names:
                times[name].append(milliseconds(calls[name]))
    finally:
        gc.enable()
    return times
