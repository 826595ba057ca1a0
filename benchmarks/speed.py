"""The README's table of times, made from the record: `python -m benchmarks.speed --write` updates it."""

import re
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.bounds import CLASSIC, OURS
from benchmarks.gpu.sentence import README, records
from benchmarks.suites import FLOAT32
from benchmarks.table import Table, digits

RECORD = "cpu-2-threads"
PLACE = re.compile(r"(<!-- speed -->\n)(.*?)(\n<!-- /speed -->)", re.DOTALL)
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
    """Medians in float32, a line for each model."""
    rows = []
    for update in record["updates"]:
        if update["averages"] == FLOAT32.title:
            times = update["milliseconds"]
            rows.append((update["shape"], *(digits(times[name]["median"]) for name in COLUMNS.values())))
    return Table("", ("", *COLUMNS), rows).rows_in_markdown()


def main() -> None:
    made = table(records()[RECORD])
    if "--write" in sys.argv:
        text = README.read_text()
        README.write_text(PLACE.sub(lambda found: found[1] + made + found[3], text))
    print(made)


if __name__ == "__main__":
    main()
