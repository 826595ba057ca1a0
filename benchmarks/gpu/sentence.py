"""The README's sentence on GPUs, made from the records: `python -m benchmarks.gpu.sentence --write` updates it."""

import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.pages import README, write_text
from benchmarks.records import records

MARK = "gpu"
WIDTH = 120
NOT_YET = (
    "Not yet run on a GPU. The GPU kernel is tested in Triton's interpreter, and its launches up to the driver; "
    "`python benchmarks/gpu_run.py OUT` runs all tests and benchmarks on a GPU."
)
# The verdicts of a record that the sentence quotes, by averages, model and measure.
QUOTED = {
    ("float32", "1000 tensors of 32x32", "times as fast as timm ModelEmaV3"): (
        "an update of 1000 small tensors is {:.1f} times as fast as timm's ModelEmaV3"
    ),
    ("float32", "Llama 1.1B", "percent of the copy rate"): (
        "an update of 1.1 billion float32 parameters runs at {:.0f} % of the copy rate"
    ),
    ("mixed", "Llama 1.1B", "percent of the copy rate"): "one from bfloat16 to float32 at {:.0f} %",
}


def sentence(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The sentence on the latest record of `gpu_run.py` on a GPU, from records by the stems of their files."""
    on_gpu = {name: each for name, each in found.items() if "gpu" in each["machine"] and "parts" in each}
    if not on_gpu:
        return NOT_YET
    name, record = max(on_gpu.items(), key=lambda each: each[1]["machine"]["date"])
    machine = record["machine"]
    facts = [tests_passed(record)] if record["tests"] else []
    values = {(each["suite"], each["shape"], each["what"]): each["value"] for each in record["verdicts"]}
    facts += [text.format(values[key]) for key, text in QUOTED.items() if key in values]
    where = f"On one {machine['gpu']}, with torch {machine['torch']}, {machine['date']}"
    return f"{where}: {'; '.join(facts) or 'no results'} ([record](benchmarks/results/{name}.md))."


def tests_passed(record: Mapping[str, Any]) -> str:
    files = record["tests"].values()
    passed = sum(file["passed"] for file in files)
    others = sum(len(file["failed"]) + file["skipped"] + bool(file["under_way"]) for file in files)
    return f"{passed} of {passed + others} GPU tests passed"


def wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def main() -> None:
    text = wrapped(sentence(records()))
    print(text, end="")
    if "--write" in sys.argv:
        write_text(README, MARK, text)


if __name__ == "__main__":
    main()
