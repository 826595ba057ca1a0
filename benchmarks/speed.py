"""The README's table of times, made from the record: `python -m benchmarks.speed --write` updates it."""

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.bounds import CLASSIC, OURS
from benchmarks.pages import README, write_text
from benchmarks.records import records
from benchmarks.suites import FLOAT32
from benchmarks.table import Table, digits

RECORD = "cpu-2-threads"
MARK = "speed"
COLUMNS = {
    "`WeightAverage`": OURS,
    "`ModelEma`": CLASSIC,
    "timm V3": "timm ModelEmaV3",
    "torch AveragedModel": "torch AveragedModel",
    "ema-pytorch": "ema-pytorch",
    "Lightning": "Lightning EMAWeightAveraging",
    "timm ModelEma": "timm ModelEma",
    "one flat `lerp_`": "flat lerp_",
}


def table(record: Mapping[str, Any]) -> str:
    """Median ms in float32, a line for each model."""
    rows = []
    for update in record["updates"]:
        if update["averages"] == FLOAT32.title:
            times = update["milliseconds"]
            rows.append((update["shape"], *(digits(times[name]["median"]) for name in COLUMNS.values())))
    return Table("", ("", *COLUMNS), rows).rows_in_markdown() + "\n"


def main() -> None:
    made = table(records()[RECORD])
    if "--write" in sys.argv:
        write_text(README, MARK, made)
    print(made, end="")


if __name__ == "__main__":
    main()
