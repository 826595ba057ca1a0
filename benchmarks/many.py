"""Many small tensors: updates with warm and with cold caches, and rarer calls: `python -m benchmarks.many`.

Before a cold call 100 MB of other memory are read and written, as a training step does between two updates.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn

import polyak
from benchmarks import limits, ours, tables, timm_file
from benchmarks.bounds import CLASSIC, OURS, Verdict
from benchmarks.contender import DECAY, Running
from benchmarks.shapes import small_tensors
from benchmarks.table import Table, digits
from benchmarks.timing import Spread, milliseconds, spread
from benchmarks.update import settle_allocator

OTHER_BYTES = 100_000_000
LIMIT, PEER = "one flat lerp_", "timm ModelEmaV3"
WARM_UPS = WARM_CALLS = 5


def linear_modules() -> nn.Module:
    """1500 parameters of 24x24 in 750 modules."""
    modules = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(750)))
    for module in modules:
        module.register_parameter("other", nn.Parameter(torch.randn(24, 24)))
    return modules


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.activation = nn.SiLU()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)
        self.value, self.output, self.router = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.norm, self.other_norm = nn.RMSNorm(32), nn.RMSNorm(32)
        self.experts = nn.ModuleList(_Expert() for _ in range(64))


def mixture_of_experts() -> nn.Module:
    """60 layers of 64 experts, each a module: 12,060 tensors in 19,741 modules."""
    return nn.Sequential(*(_Layer() for _ in range(60)))


@dataclass(frozen=True)
class UpdateTimes:
    """Milliseconds of one update by contender: warm, after other updates, and cold, after other memory was used."""

    title: str
    warm: dict[str, Spread]
    cold: dict[str, Spread]

    def times(self, name: str, other: str, *, cold: bool = False) -> float:
        """The time of the first contender in units of the second's."""
        found = self.cold if cold else self.warm
        return found[name].median / found[other].median


@dataclass(frozen=True)
class CallTimes:
    """Milliseconds of rarer calls, by name. The first swap makes tables that later ones use."""

    title: str
    times: dict[str, float]


def measure_updates(title: str, model: nn.Module, *, rounds: int) -> UpdateTimes:
    """All contenders in turn."""
    other = torch.ones(OTHER_BYTES // 4)
    flat = limits.FLAT_FORMS["flat lerp_"](model)
    running: dict[str, Running] = {
        OURS: ours.weight_average(model),
        CLASSIC: ours.model_ema(model),
        PEER: timm_file.model_ema_v3(model),
        LIMIT: flat,
    }
    warm: dict[str, list[float]] = {name: [] for name in running}
    cold: dict[str, list[float]] = {name: [] for name in running}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, each in running.items():
                for _ in range(WARM_UPS):
                    each.update()
                warm[name].append(statistics.median(milliseconds(each.update) for _ in range(WARM_CALLS)))
        # Not between the warm ones: caches keep what was used several times longer than what was used once.
        for _ in range(rounds):
            for name, each in running.items():
                other.add_(1.0)
                cold[name].append(milliseconds(each.update))
    finally:
        gc.enable()
    return UpdateTimes(
        title,
        {name: spread(times) for name, times in warm.items()},
        {name: spread(times) for name, times in cold.items()},
    )


def measure_calls(count: int, *, rounds: int) -> CallTimes:
    """Medians for a `WeightAverage` of `count` tensors of 32x32."""
    model = small_tensors(count)
    times: dict[str, list[float]] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        gc.collect()
        times.setdefault(name, []).append(milliseconds(call))

    for _ in range(rounds):
        made: list[polyak.WeightAverage] = []
        note("WeightAverage()", lambda made=made: made.append(polyak.WeightAverage(model, polyak.Exponential(DECAY))))
        (average,) = made
        average.update()
        for name in ("first swap", "swap"):
            note(f"{name} in", average.swap_in)
            note(f"{name} out", average.swap_out)
        note("state_dict()", average.state_dict)
        state = average.state_dict()
        note("load_state_dict()", lambda average=average, state=state: average.load_state_dict(state))
        note("weights()", average.weights)
        note("report()", average.report)
    return CallTimes(f"{count:,} tensors of 32x32", {name: statistics.median(each) for name, each in times.items()})


@dataclass(frozen=True)
class Many:
    """All of it.

    Attributes:
        updates: on an idle machine.
        calls: on an idle machine.
        crowded: updates beside processes that keep all cores busy.
    """

    updates: list[UpdateTimes]
    calls: list[CallTimes]
    crowded: UpdateTimes

    def tables(self) -> list[Table]:
        return [updates_table([*self.updates, self.crowded]), calls_table(self.calls)]


@contextmanager
def busy_processes() -> Iterator[None]:
    """As many processes as there are cores keep them busy, as data loaders do."""
    program = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(program) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(*, rounds: int = 30) -> Many:
    settle_allocator()
    updates = [
        measure_updates("1000 tensors of 32x32", small_tensors(), rounds=rounds),
        measure_updates("1500 tensors of 24x24 in 750 modules", linear_modules(), rounds=rounds),
        measure_updates("12,060 tensors in 19,741 modules", mixture_of_experts(), rounds=max(rounds // 4, 3)),
    ]
    calls = [measure_calls(1000, rounds=9), measure_calls(10_000, rounds=3)]
    # Last, because updates that had to wait make the next ones run on one thread.
    with busy_processes():
        crowded = measure_updates("1000 tensors of 32x32, all cores busy", small_tensors(), rounds=rounds)
    return Many(updates, calls, crowded)


def measure_apart() -> Many:
    """In a process of its own: what ran before decides where small tensors lie, and how long they take."""
    command = [sys.executable, "-m", "benchmarks.many", "--as-json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output)
    updates = [_update_times(each) for each in found["updates"]]
    return Many(updates, [CallTimes(**each) for each in found["calls"]], _update_times(found["crowded"]))


def _update_times(found: dict[str, Any]) -> UpdateTimes:
    warm, cold = ({name: Spread(**time) for name, time in found[each].items()} for each in ("warm", "cold"))
    return UpdateTimes(found["title"], warm, cold)


def updates_table(measured: list[UpdateTimes]) -> Table:
    rows = [
        (
            f"{each.title}, {'cold' if cold else 'warm'}",
            *(digits(found[name].median) for name in (OURS, CLASSIC, PEER, LIMIT)),
            f"{found[OURS].median / found[LIMIT].median:.2f}",
            f"{found[PEER].median / found[OURS].median:.1f}",
        )
        for each in measured
        for cold, found in ((False, each.warm), (True, each.cold))
    ]
    return Table(
        title="One update of many small tensors, float32, median ms",
        columns=("", OURS, CLASSIC, PEER, LIMIT, "of the flat lerp_", "times as fast as timm"),
        rows=rows,
        note="Cold: 100 MB of other memory were read and written before each call, as a training step does.",
    )


def calls_table(measured: list[CallTimes]) -> Table:
    names = list(measured[0].times)
    return Table(
        title="Rarer calls, median ms",
        columns=("", *names),
        rows=[(each.title, *(digits(each.times[name]) for name in names)) for each in measured],
    )


def most(what: str, title: str, bound: float, value: float) -> Verdict:
    return Verdict(what, "float32", title, f"<= {bound:g}", value, value <= bound, "")


def least(what: str, title: str, bound: float, value: float) -> Verdict:
    return Verdict(what, "float32", title, f">= {bound:g}", value, value >= bound, PEER)


def verdicts(many: Many) -> Iterator[Verdict]:
    """The bounds, and whether they were reached."""
    small, modules, experts = many.updates
    thousand, ten_thousand = many.calls
    yield most("of timm's time", many.crowded.title, 1, many.crowded.times(OURS, PEER))
    yield least("warm: times as fast as timm", small.title, 25, small.times(PEER, OURS))
    yield most("cold: of a cold flat lerp_", small.title, 1.6, small.times(OURS, LIMIT, cold=True))
    yield least("ModelEma, warm: times as fast as timm", small.title, 15, small.times(PEER, CLASSIC))
    yield most("ModelEma, warm: of WeightAverage's time", small.title, 1.6, small.times(CLASSIC, OURS))
    yield least("warm: times as fast as timm", modules.title, 21, modules.times(PEER, OURS))
    yield most("cold: of a cold flat lerp_", modules.title, 3, modules.times(OURS, LIMIT, cold=True))
    yield most("warm: ms of an update", experts.title, 10, experts.warm[OURS].median)
    for calls, bounds in (
        (thousand, {"swap in": 7, "swap out": 2.5, "WeightAverage()": 25, "state_dict()": 4}),
        (ten_thousand, {"swap in": 90, "swap out": 30}),
    ):
        for name, bound in bounds.items():
            yield most(f"ms of {name}", calls.title, bound, calls.times[name])


def main(rounds: int = 30, as_json: bool = False) -> None:
    many = measure(rounds=rounds)
    if as_json:
        print(json.dumps(asdict(many)))
        return
    for table in [*many.tables(), tables.verdict_table(list(verdicts(many)))]:
        Console(width=170).print(table.rich())


if __name__ == "__main__":
    typer.run(main)
