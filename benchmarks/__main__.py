"""Prints every table: `python -m benchmarks [--shapes small,vit] [--rounds 20] [--write]`."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from benchmarks import import_time, machine, results, tables, update
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.shapes import SHAPES, Shape

WIDTH = 120
Named = TypeVar("Named", Shape, Contender)


def chosen(rows: Sequence[Named], names: str) -> list[Named]:
    """The rows whose name holds one of the names, which are separated by commas."""
    found = [row for row in rows if any(name.strip().lower() in row.name.lower() for name in names.split(","))]
    if not found:
        raise typer.BadParameter(f"{names!r} is none of {', '.join(row.name for row in rows)}")
    return found


def main(
    shapes: Annotated[str, typer.Option(help="Some of: small, resnet50, vit, gpt2.")] = "",
    contenders: Annotated[str, typer.Option(help="Parts of names, as in: polyak,flat.")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="For every shape, instead of its own number.")] = None,
    imports: Annotated[int, typer.Option(min=0, help="Fresh processes for each import.")] = 10,
    write: Annotated[bool, typer.Option(help="Also write the tables to benchmarks/results/.")] = False,
) -> None:
    console = Console(width=WIDTH)
    about = machine.describe()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    shown: list[tables.Table] = []

    def show(table: tables.Table) -> None:
        shown.append(table)
        console.print(table.rich())

    measured: list[update.Measurement] = []
    timed = chosen(CONTENDERS, contenders)
    for shape in chosen(SHAPES, shapes):
        measured.append(update.measure(shape, rounds, timed))
        show(tables.update_table(measured[-1]))
    if any(measurement.verdicts() for measurement in measured):
        show(tables.verdict_table(measured))
    imported = None
    if imports:
        imported = import_time.measure(imports)
        show(tables.import_table(imported, imports))
    if write:
        for path in results.write(about, measured, imported, shown):
            console.print(f"wrote {path.name}")


if __name__ == "__main__":
    typer.run(main)
