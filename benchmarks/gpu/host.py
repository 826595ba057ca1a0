"""Reports what averages in CPU memory cost the training: `python -m benchmarks.gpu.host cuda`."""

import sys
from dataclasses import asdict

import torch

from benchmarks import host, machine
from benchmarks.gpu.emit import emit

if __name__ == "__main__":
    device = sys.argv[1]
    emit(machine=machine.describe(device))
    found = host.measure(host.SIZES[device], torch.device(device))
    emit(host=found.record, table=asdict(host.table(found, device)))
