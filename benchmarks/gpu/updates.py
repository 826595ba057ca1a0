"""Times updates one after another: `python -m benchmarks.gpu.updates cuda 140 float32:llama-1b mixed:small`.

Each measurement is reported when it is done. If one fails, it is named and the next one starts.
"""

import gc
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks import machine, tables
from benchmarks.bounds import verdicts
from benchmarks.contender import Contender, Kind
from benchmarks.gpu.emit import emit
from benchmarks.results import as_record
from benchmarks.shapes import SHAPES, Shape
from benchmarks.suites import SUITES, Suite
from benchmarks.update import Measurement, measure

# Seconds: a measurement that starts later would hardly be done before the time box is over.
LEAST = 15.0
# A run on a CPU is only a trial.
ROUNDS_ON_CPU = 5
# The other libraries that are timed on the largest models; the rest would take too long there.
FAST_PEERS = ("timm ModelEmaV3", "torch AveragedModel", "ema-pytorch")
TOO_SLOW = "too slow for a model as large as this"


def main(device: str, seconds: float, names: Sequence[str]) -> int:
    """Returns the number of failures."""
    end = time.monotonic() + seconds
    emit(machine=machine.describe(device))
    num_failed = num_measured = 0
    for name in names:
        if end - time.monotonic() < LEAST:
            emit(note=f"{name} was not started for lack of time")
            continue
        started = time.monotonic()
        try:
            report(measure_one(name, torch.device(device)))
            num_measured += 1
        except (ImportError, torch.OutOfMemoryError) as error:
            emit(note=f"{name} is left out: {type(error).__name__}: {error}")
        except Exception as error:
            num_failed += 1
            traceback.print_exc()
            emit(failure=f"{name}: {type(error).__name__}: {error}")
        gc.collect()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    if not num_measured:
        emit(failure="nothing was measured")
    return num_failed + (not num_measured)


def measure_one(name: str, device: torch.device) -> Measurement:
    suite_name, shape_name = name.split(":")
    suite = next(suite for suite in SUITES if suite.name == suite_name)
    shape = next(shape for shape in SHAPES if shape.name == shape_name)
    timed, too_slow = divided(suite, shape, device)
    rounds = ROUNDS_ON_CPU if device.type == "cpu" else None
    measurement = measure(suite, shape, device=device, rounds=rounds, contenders=timed)
    measurement.left_out.update({contender.name: TOO_SLOW for contender in too_slow})
    return measurement


def divided(suite: Suite, shape: Shape, device: torch.device) -> tuple[list[Contender], list[Contender]]:
    """The contenders that are timed, and those that are not."""
    everybody = suite.all_contenders(device)
    too_slow = [
        each
        for each in everybody
        if shape.on_gpu_only and each.kind in (Kind.PEER, Kind.SEED) and each.name not in FAST_PEERS
    ]
    return [each for each in everybody if each not in too_slow], too_slow


def report(measurement: Measurement) -> None:
    found = verdicts([measurement])
    table = tables.update_table(measurement)
    print(table.markdown())
    emit(update=as_record(measurement), table=asdict(table), verdicts=[asdict(verdict) for verdict in found])


if __name__ == "__main__":
    raise SystemExit(min(1, main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])))
