"""Tests and benchmarks on a GPU that is available for minutes: `python benchmarks/gpu_run.py OUT [--seconds 450]`.

The most valuable parts run first. Each runs in processes of its own, in a time box: a part that fails, hangs or breaks
CUDA costs its time box and nothing else. OUT gets a log of each part and a record, which is written again after each
part; copy its two files `gpu-*` to benchmarks/results/. Exit code: 0 if all parts have passed, else 1.

It runs in a checkout that is not installed:

    python3 setup.py -q egg_info build_ext --inplace || echo NO C; python3 benchmarks/gpu_run.py OUT
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu import box, parts
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.record import INTERRUPTED, NOT_STARTED, PASSED, PartRecord, Record


def main(arguments: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for the logs and the record")
    parser.add_argument("--seconds", type=float, default=450, help="for all parts")
    parser.add_argument("--only", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a trial, on small models")
    given = parser.parse_args(arguments)
    only = given.only.split(",")
    if unknown := set(only) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is unknown; choose from {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit kills the part's processes
    record = Record(given.device, parts.missing(parts.PACKAGES))
    if record.missing:
        print(f"not installed: {', '.join(record.missing)}", flush=True)
    run([part for part in PARTS if part.name in only], record, given.out, seconds=given.seconds)
    print("\n".join(table.markdown() for table in record.all_tables()), end="")
    return 0 if all(part.outcome == PASSED for part in record.parts) else 1


def run(chosen: Sequence[Part], record: Record, out: Path, *, seconds: float) -> None:
    """Runs parts one after another, and writes the record after each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for part in chosen:
        left = end - time.monotonic()
        found = PartRecord(part.name, NOT_STARTED, box=min(part.seconds, left))
        record.parts.append(found)
        try:
            if left < part.least:
                found.notes.append(f"{left:.0f} s were left, and it needs {part.least:.0f}")
            else:
                run_part(part, found, record, out)
        finally:
            record.write(out)
        print(f"{part.name}: {found.outcome}, {found.seconds:.0f} s", *found.failures[:5], sep="\n  ", flush=True)


def run_part(part: Part, found: PartRecord, record: Record, out: Path) -> None:
    found.outcome = INTERRUPTED
    started = time.monotonic()
    exit_codes = box.run(
        part.commands(record.device, found.box),
        seconds=found.box,
        log=out / f"{part.name}.log",
        take=lambda process, line: record.take(found, process, line),
    )
    found.seconds = time.monotonic() - started
    record.end(found, exit_codes)


if __name__ == "__main__":
    raise SystemExit(main())
