"""Times updates one after another: `python -m benchmarks.gpu.updates cuda 140 float32:llama-1b mixed:small`.

Each is said when it is done. One that fails is named, and the next begins.
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

# Seconds: a measurement that begins later would most likely not be done in the box.
LEAST = 15.0
# On a CPU only the way is tried: what is timed there is in the records of `python -m benchmarks`.
ROUNDS_ON_CPU = 5
# Of other libraries those that may be the fastest; the rest would take too long on the largest models.
FAST_PEERS = ("timm ModelEmaV3", "torch AveragedModel", "ema-pytorch")
TOO_SLOW = "too slow for a model as large as this"


def main(device: str, seconds: float, names: Sequence[str]) -> int:
    """Returns how many have failed."""
    end = time.monotonic() + seconds
    emit(machine=machine.describe(device))
    num_failed = 0
    for name in names:
        if end - time.monotonic() < LEAST:
            emit(note=f"{name} was not begun, as no time was left")
            continue
        started = time.monotonic()
        try:
            say(measure_one(name, torch.device(device)))
        except (ImportError, torch.OutOfMemoryError) as error:
            emit(note=f"{name} is left out: {type(error).__name__}: {error}")
        except Exception as error:
            num_failed += 1
            traceback.print_exc()
            emit(failure=f"{name}: {type(error).__name__}: {error}")
        gc.collect()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return num_failed


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
    """Who is timed, and who is not."""
    everybody = suite.all_contenders(device)
    too_slow = [
        each
        for each in everybody
        if shape.on_gpu_only and each.kind in (Kind.PEER, Kind.SEED) and each.name not in FAST_PEERS
    ]
    return [each for each in everybody if each not in too_slow], too_slow


def say(measurement: Measurement) -> None:
    found = verdicts([measurement])
    table = tables.update_table(measurement)
    print(table.markdown())
    emit(update=as_record(measurement), table=asdict(table), verdicts=[asdict(verdict) for verdict in found])


if __name__ == "__main__":
    raise SystemExit(min(1, main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])))
