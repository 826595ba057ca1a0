"""How many bytes a second were measured on which machine, from what stands in `benchmarks/results/`.

A rate is whatever a record holds under a key that ends in `_bytes_per_second`, at any depth, and what follows from
times of updates. So a benchmark that stores a new one need not be known here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import FOLDER, records
from benchmarks.suites import SUITES, Suite

PCIE = "pcie_bytes_per_second"  # from one GPU to pinned memory of the host


@dataclass(frozen=True)
class Machine:
    """One kind of machine: what it is, and its rates by name."""

    name: str
    rates: dict[str, float] = field(default_factory=dict[str, float])


def update_rate(device: str, suite: Suite) -> str:
    """The name of the rate at which `update()` reads and writes."""
    return f"{device}: {suite.title}"


def machines(folder: Path = FOLDER) -> list[Machine]:
    """Those that results are of; several files may be of one."""
    found: dict[tuple[str, str], Machine] = {}
    # Files of a GPU come first, because the others do not say which one the machine has.
    for record in sorted(records(folder).values(), key=lambda record: "gpu" not in record["machine"]):
        about = record["machine"]
        kind = about["processor"], about["cores"]
        name = ", ".join([*([about["gpu"]] if "gpu" in about else []), about["processor"], f"{about['cores']} cores"])
        found.setdefault(kind, Machine(name)).rates.update(rates_of(record))
    return list(found.values())


def rates_of(record: dict[str, Any]) -> dict[str, float]:
    """All rates of one record, by name; of updates that of the model with most parameters, which no cache holds."""
    rates = dict(_named_rates(record))
    by_title = {suite.title: suite for suite in SUITES}
    for update in sorted(record.get("updates", []), key=lambda update: update["parameters"]):
        suite = by_title[update["averages"]]
        own = update["milliseconds"].get(suite.contenders[0].name)
        if own:
            num_bytes = update["parameters"] * suite.bytes_per_parameter
            rates[update_rate(update["device"], suite)] = num_bytes / (own["median"] / 1e3)
    return rates


def _named_rates(node: Any) -> Iterator[tuple[str, float]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key.endswith("_bytes_per_second") and isinstance(value, int | float):
                yield key, float(value)
            yield from _named_rates(value)
    elif isinstance(node, list):
        for value in node:
            yield from _named_rates(value)
