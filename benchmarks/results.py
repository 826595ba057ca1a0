"""What one run of `python -m benchmarks` measured, and its files in `benchmarks/results/`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.account import Account
from benchmarks.bounds import Verdict
from benchmarks.contender import Kind
from benchmarks.error import ErrorRun
from benchmarks.error_bounds import ErrorVerdict
from benchmarks.import_time import ImportTime
from benchmarks.many import Many
from benchmarks.records import FOLDER, markdown, write_files
from benchmarks.scaling import Curve
from benchmarks.table import Table
from benchmarks.update import Measurement


@dataclass
class Results:
    """All that one run measured on one device, and the tables that say it."""

    machine: dict[str, str]
    device: str = "cpu"
    measurements: list[Measurement] = field(default_factory=list[Measurement])
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    account: Account | None = None
    curves: list[Curve] = field(default_factory=list[Curve])
    errors: list[ErrorRun] = field(default_factory=list[ErrorRun])
    error_verdicts: list[ErrorVerdict] = field(default_factory=list[ErrorVerdict])
    many: Many | None = None
    imported: ImportTime | None = None
    tables: list[Table] = field(default_factory=list[Table])
    picture: str | None = None

    @property
    def stem(self) -> str:
        return f"cpu-{self.machine['threads']}-threads" if self.device == "cpu" else self.device

    def record(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "updates": [as_record(measurement) for measurement in self.measurements],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "account": {**asdict(self.account), "rest": self.account.rest} if self.account else None,
            "many": asdict(self.many) if self.many else None,
            "curves": [asdict(curve) for curve in self.curves],
            "errors": [asdict(run) for run in self.errors],
            "error_verdicts": [{**asdict(verdict), "reached": verdict.reached} for verdict in self.error_verdicts],
            "import": asdict(self.imported) if self.imported else None,
        }


def as_record(measurement: Measurement) -> dict[str, Any]:
    limit = measurement.fastest(Kind.LIMIT)
    return {
        "averages": measurement.suite.title,
        "shape": measurement.shape.title,
        "entries": measurement.shape.entries,
        "parameters": measurement.parameters,
        "device": measurement.device,
        "rounds": measurement.rounds,
        "calls": measurement.shape.num_calls,
        "limit": limit.contender.name if limit else "",
        "left_out": dict(measurement.left_out),
        "milliseconds": {row.contender.name: asdict(row.time) for row in measurement.rows},
        "first_milliseconds": {row.contender.name: asdict(row.first) for row in measurement.rows},
    }


def write(results: Results, folder: Path = FOLDER) -> list[Path]:
    """What was measured so far."""
    text = markdown(results.machine, results.tables, results.picture)
    return write_files(results.stem, results.record(), text, folder)


def draw_curves(results: Results, folder: Path = FOLDER) -> None:
    from benchmarks.plot import draw

    machine = results.machine
    about = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    picture = f"{results.stem}.png"
    draw(results.curves, folder / picture, about=f"{about}, torch {machine['torch']}")
    results.picture = picture
