"""Writes one run to `benchmarks/results/`: JSON to compare, markdown to read."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.import_time import ImportTime
from benchmarks.tables import Table
from benchmarks.update import Measurement

FOLDER = Path(__file__).parent / "results"


def as_record(measurement: Measurement) -> dict[str, object]:
    return {
        "shape": measurement.shape.title,
        "entries": measurement.shape.entries,
        "rounds": measurement.rounds,
        "milliseconds": {row.contender.name: asdict(row.time) for row in measurement.rows},
        "verdicts": [asdict(verdict) for verdict in measurement.verdicts()],
    }


def write(
    machine: dict[str, str],
    measurements: Sequence[Measurement],
    imported: ImportTime | None,
    tables: Sequence[Table],
) -> list[Path]:
    stem = f"cpu-{machine['threads']}-threads"
    record = {
        "machine": machine,
        "updates": [as_record(measurement) for measurement in measurements],
        "import": asdict(imported) if imported else None,
    }
    heading = "\n".join(
        ("# One update and one import", "", *(f"- {key}: {value}" for key, value in machine.items()), "")
    )
    files = {
        FOLDER / f"{stem}.json": json.dumps(record, indent=2) + "\n",
        FOLDER / f"{stem}.md": "\n".join((heading, *(table.markdown() for table in tables))),
    }
    FOLDER.mkdir(exist_ok=True)
    for path, text in files.items():
        path.write_text(text)
    return list(files)
