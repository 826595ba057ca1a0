"""Reports the machine: `python -m benchmarks.gpu.about cuda`."""

import sys

from benchmarks import machine
from benchmarks.gpu.emit import emit

if __name__ == "__main__":
    emit(machine=machine.describe(sys.argv[1]))
