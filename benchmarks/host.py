"""What an average on the host costs the training beside it: `python -m benchmarks.host [--device cuda] [--write]`.

On a GPU: the time of a step of a language model with about a billion parameters in bfloat16, with and without an update
after each, and the rate of the copies against that of one large pinned copy. Everywhere: how much of the worker's time
lies beside training steps, from a trace. On a CPU the engine is the same, with plain copies, and the worker takes its
time from the training's cores, so that the trace is what counts there.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

import polyak
from benchmarks import machine
from benchmarks.language import STEP, Size, Training
from benchmarks.rates import PCIE
from benchmarks.records import FOLDER, markdown, write_files
from benchmarks.table import Table, digits, mark
from benchmarks.timing import Spread, spread
from polyak.store import store as local
from polyak.store.updates.host import NUM_SETS
from polyak.store.updates.transfer import PlainCopies

WORKER = "polyak: update on the host"
MOST_TIMES_AS_LONG = 1.02
LEAST_OF_RATE = 0.85

GIBIBYTE = 1 << 30

Interval = tuple[float, float]


SIZES = {
    "cuda": Size(2048, 20, 16, 32_000, 8, 2048, torch.bfloat16, turns=6, steps=10),
    "cpu": Size(512, 4, 8, 4_000, 4, 128, torch.float32, turns=8, steps=4),
}


@dataclass(frozen=True)
class HostResult:
    """Times are in milliseconds; rates are in GiB a second, and None without a GPU."""

    parameters: int
    alone: Spread
    with_updates: Spread
    in_place: Spread
    steps: int
    updates: int
    worker: float
    overlap: float
    staging_bytes: int
    reference_rate: float | None = None
    idle_rate: float | None = None
    training_rate: float | None = None

    @property
    def times_as_long(self) -> float:
        return self.with_updates.median / self.alone.median

    @property
    def of_rate(self) -> float | None:
        return None if self.reference_rate is None or self.idle_rate is None else self.idle_rate / self.reference_rate

    @property
    def record(self) -> dict[str, Any]:
        """As it is kept, with the rate of the copies by the name that estimates look for: beside a training if seen."""
        rate = self.training_rate or self.idle_rate
        return {**asdict(self), **({PCIE: rate * GIBIBYTE} if rate else {})}


@contextmanager
def beside_the_model(device: torch.device):
    """Where there is no accelerator, averages are made as if the model were on one."""
    before = local.transfer_for
    if device.type == "cpu":
        local.transfer_for = lambda sources, averages, parameters: PlainCopies(sources)
    try:
        yield
    finally:
        local.transfer_for = before


def finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def measure(size: Size, device: torch.device) -> HostResult:
    training = Training(size, device)
    with beside_the_model(device):
        average = polyak.WeightAverage(training.model, polyak.Exponential(0.999), device="cpu")
    in_place = polyak.WeightAverage(training.model, polyak.Exponential(0.999))

    # An update of the weights of the step before: the last copy of a turn lies beside a step, too.
    def step_with(average: polyak.WeightAverage) -> None:
        average.update()
        training.step()

    calls = {"alone": training.step, "beside": partial(step_with, average), "in place": partial(step_with, in_place)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        turn(call, 3, device)
    average.wait()
    first = average.num_updates
    for _ in range(size.turns):
        for name, call in calls.items():
            times[name].append(turn(call, size.steps, device))
            average.wait()
    updates = average.num_updates - first
    intervals, copies = trace(training, average, size.steps, device)
    worker = intervals.get(WORKER, [])
    staging = average.report().num_staging_bytes
    set_bytes = staging // NUM_SETS
    found = HostResult(
        training.num_parameters,
        *map(spread, times.values()),
        size.turns * size.steps,
        updates,
        worker=statistics.mean(end - start for start, end in worker) / 1e3,
        overlap=shared(worker, intervals[STEP]) / length(worker),
        staging_bytes=staging,
    )
    if device.type != "cuda":
        return found
    return replace(
        found,
        reference_rate=reference_rate(min(set_bytes, GIBIBYTE), device),
        idle_rate=idle_rate(average, set_bytes, device),
        training_rate=set_bytes * len(worker) / GIBIBYTE / (copies / 1e6) if copies else None,
    )


def turn(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Milliseconds of a step, of several in a row."""
    finish(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    finish(device)
    return (time.perf_counter() - started) * 1e3 / steps


def trace(
    training: Training, average: polyak.WeightAverage, steps: int, device: torch.device
) -> tuple[dict[str, list[Interval]], float]:
    """When training and worker were at work, in microseconds, and how long the GPU copied to the host."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=everywhere) as found:
        for _ in range(steps):
            training.step()
            average.update()
        # The training goes on, on a GPU for a while after it was launched.
        training.step()
        with record_function(STEP):
            finish(device)
        average.wait()
    intervals: dict[str, list[Interval]] = {}
    copies = 0.0
    for event in found.events():
        where = (event.time_range.start, event.time_range.end)
        if event.device_type == torch.autograd.DeviceType.CPU:
            if event.name in (STEP, WORKER):
                intervals.setdefault(event.name, []).append(where)
        elif event.name.startswith("Memcpy DtoH"):
            copies += where[1] - where[0]
    return intervals, copies


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def shared(some: Sequence[Interval], others: Sequence[Interval]) -> float:
    """How much of some intervals lies in others, of which no two overlap.

    >>> shared([(0, 10), (20, 30)], [(5, 22), (29, 40)])
    8
    """
    return sum(max(0, min(end, last) - max(start, first)) for start, end in some for first, last in others)


def reference_rate(size: int, device: torch.device) -> float:
    """GiB a second of one copy to pinned memory, the fastest of several."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    return fastest(lambda: target.copy_(source, non_blocking=True), size, device)


def idle_rate(average: polyak.WeightAverage, size: int, device: torch.device) -> float:
    """GiB a second of the copies of an update, while nothing else runs."""
    host = average._core.store.updates
    return fastest(lambda: host._sets[0].staging.start().wait(), size, device)


def fastest(copy: Callable[[], object], size: int, device: torch.device, rounds: int = 10) -> float:
    return size / GIBIBYTE / (min(turn(copy, 1, device) for _ in range(rounds)) / 1e3)


def table(found: HostResult, device: str) -> Table:
    gpu = device == "cuda"
    rows = [
        ("step alone, ms", with_quartiles(found.alone), ""),
        ("step and update, ms", with_quartiles(found.with_updates), ""),
        ("step and update in place, ms", with_quartiles(found.in_place), ""),
        (
            "times as long",
            f"{found.times_as_long:.3f}",
            f"<= {MOST_TIMES_AS_LONG}: {mark(found.times_as_long <= MOST_TIMES_AS_LONG)}" if gpu else "",
        ),
        ("updates of steps", f"{found.updates} of {found.steps}", ""),
        ("update in the worker, ms", digits(found.worker), ""),
        ("of it beside training steps", f"{100 * found.overlap:.0f} %", ""),
        ("staging memory, MiB", digits(found.staging_bytes / (1 << 20)), ""),
    ]
    if found.of_rate is not None:
        rows += [
            ("one large pinned copy, GiB/s", digits(found.reference_rate or 0.0), ""),
            ("copies of an update, idle, GiB/s", digits(found.idle_rate or 0.0), ""),
            ("copies of an update, training, GiB/s", digits(found.training_rate or 0.0), ""),
            (
                "of the rate, idle",
                f"{found.of_rate:.2f}",
                f">= {LEAST_OF_RATE}: {mark(found.of_rate >= LEAST_OF_RATE)}",
            ),
        ]
    title = f"An average on the host, {found.parameters / 1e6:.1f} M parameters, {device}"
    note = "Of times of steps the median, and the quartiles of turns."
    if not gpu:
        note += " Here the worker takes its time from the training's cores; no bound is set for it."
    return Table(title, ("", "", "bound"), rows, note=note)


def with_quartiles(time: Spread) -> str:
    return f"{digits(time.median)} ({digits(time.lower)} to {digits(time.upper)})"


def write(found: HostResult, device: str, folder: Path = FOLDER) -> list[Path]:
    about = machine.describe(device)
    stem = f"host-cpu-{about['threads']}-threads" if device == "cpu" else f"host-{device}"
    text = markdown(about, [table(found, device)])
    return write_files(stem, {"machine": about, "host": found.record}, text, folder)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: the GPU if there is one.")] = "",
    write_results: Annotated[bool, typer.Option("--write", help="Also write it to benchmarks/results/.")] = False,
) -> None:
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120)
    console.print(", ".join(f"{key} {value}" for key, value in machine.describe(where).items()))
    found = measure(SIZES[where], torch.device(where))
    console.print(table(found, where).rich())
    if write_results:
        for path in write(found, where):
            console.print(f"wrote {path.name}")


if __name__ == "__main__":
    typer.run(main)
