"""Times calls in turn, so that what drifts on the machine hits all of them equally."""

import gc
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

LEAST_ROUNDS = 5
SLEEP_CYCLES = 20_000_000  # some 10 ms


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


Timer = Callable[[Callable[[], object]], float]


def milliseconds(call: Callable[[], object]) -> float:
    """On a CPU, where a call that has returned is done."""
    started = perf_counter()
    call()
    return (perf_counter() - started) * 1e3


def end_to_end(call: Callable[[], object]) -> float:
    """On a GPU, from the call until the GPU is done."""
    torch.cuda.synchronize()
    started = perf_counter()
    call()
    torch.cuda.synchronize()
    return (perf_counter() - started) * 1e3


def on_gpu(call: Callable[[], object]) -> float:
    """The GPU's own time: it sleeps until the host has given it all its work, as if it were still busy training."""
    torch.cuda.synchronize()
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP_CYCLES)
    started.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended)


def timer_for(device: torch.device, *, in_all: bool) -> Timer:
    """`in_all`: with the host's own time, which an update of large tensors hides behind the GPU's other work."""
    if device.type == "cpu":
        return milliseconds
    return end_to_end if in_all else on_gpu


@dataclass(frozen=True)
class Turns:
    """Milliseconds of one contender, a number for each of its turns.

    Attributes:
        first: the first call of a turn, after others filled the caches.
        time: the median of the calls that followed; or the first, where there was one call only.
    """

    first: list[float]
    time: list[float]


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    num_calls: int = 1,
    timer: Timer = milliseconds,
    seconds: float = math.inf,
) -> dict[str, Turns]:
    """Gives each call one turn a round, of `num_calls` calls in a row, in another order every round.

    After `seconds` no round begins, but for the first few.
    """
    names = list(calls)
    shuffle = random.Random(0).shuffle
    turns = {name: Turns([], []) for name in names}
    gc.collect()
    gc.disable()
    started = perf_counter()
    try:
        for number in range(rounds):
            if number >= LEAST_ROUNDS and perf_counter() - started > seconds:
                break
            shuffle(names)
            for name in names:
                first, *others = [timer(calls[name]) for _ in range(num_calls)]
                turns[name].first.append(first)
                turns[name].time.append(statistics.median(others or [first]))
    finally:
        gc.enable()
    return turns
