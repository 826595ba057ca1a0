"""What was measured, as tables that can be printed and written."""

from collections.abc import Sequence
from dataclasses import dataclass

import rich.box
import rich.table

from benchmarks.import_time import BUDGET, ImportTime
from benchmarks.timing import Spread
from benchmarks.update import LEAST_SPEED_UP, MOST_OF_THE_PEER, Measurement


@dataclass(frozen=True)
class Table:
    """The first columns are text, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number < self.num_text else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if number < self.num_text else "---:" for number in range(len(self.columns))]
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
        return "\n".join((f"### {self.title}", "", *lines, ""))


def mark(reached: bool) -> str:
    return "pass" if reached else "short"


def quartiles(time: Spread) -> str:
    return f"{time.lower:.2f} .. {time.upper:.2f}"


def update_table(measurement: Measurement) -> Table:
    shape = measurement.shape
    fastest = min(row.time.median for row in measurement.rows)
    return Table(
        title=f"One update, {shape.title}, {shape.entries} entries, {measurement.rounds} rounds",
        columns=("contender", "median ms", "quartiles", "of the fastest", "roundings an update"),
        rows=[
            (
                row.contender.name,
                f"{row.time.median:.2f}",
                quartiles(row.time),
                f"{row.time.median / fastest:.2f}",
                f"{row.error:.1f}",
            )
            for row in sorted(measurement.rows, key=lambda row: row.time.median)
        ],
    )


def verdict_table(measurements: Sequence[Measurement]) -> Table:
    return Table(
        title=f"Must reach: at most {MOST_OF_THE_PEER:g} of any peer, at least {LEAST_SPEED_UP:g} times the seed",
        columns=("shape", "class", "fastest peer", "of the peer", "times the seed", "of the flat lerp"),
        rows=[
            (
                measurement.shape.title,
                verdict.contender,
                verdict.fastest_peer,
                f"{verdict.of_peer:.2f} {mark(verdict.never_slower)}",
                f"{verdict.speed_up:.2f} {mark(verdict.fast_enough)}",
                f"{verdict.of_limit:.2f}",
            )
            for measurement in measurements
            for verdict in measurement.verdicts()
        ],
        num_text=3,
    )


def import_table(measured: ImportTime, rounds: int) -> Table:
    lines = (
        ("import torch", measured.torch, ""),
        ("import torch, polyak", measured.both, ""),
        ("import polyak, torch loaded", measured.after_torch, mark(measured.within_budget)),
    )
    rows = [(name, f"{time.median:.0f}", f"{time.lower:.0f} .. {time.upper:.0f}", note) for name, time, note in lines]
    rows.append(("difference of the first two medians", f"{measured.added:.0f}", "", ""))
    return Table(
        title=f"Imports, {rounds} fresh processes each",
        columns=("statement", "median ms", "quartiles", f"budget {BUDGET:g} ms"),
        rows=rows,
    )
