"""Prints every table: `python -m benchmarks [--suites float32] [--shapes small,vit] [--rounds 20] [--write]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks import account, error, import_time, launches, machine, many, results, scaling, tables, update
from benchmarks.bounds import Verdict, verdicts
from benchmarks.contender import Contender
from benchmarks.error_bounds import error_verdicts
from benchmarks.records import FOLDER
from benchmarks.results import Results
from benchmarks.shapes import SHAPES, Shape
from benchmarks.suites import FLOAT32, SUITES, Suite
from benchmarks.table import Table

WIDTH = 150
Named = TypeVar("Named", Shape, Contender, Suite)


def chosen(rows: Sequence[Named], names: str) -> list[Named]:
    """The rows whose name holds one of the names, which are separated by commas."""
    found = [row for row in rows if any(name.strip().lower() in row.name.lower() for name in names.split(","))]
    if not found:
        raise typer.BadParameter(f"{names!r} is none of {', '.join(row.name for row in rows)}")
    return found


class Shown(Results):
    """Results whose tables are printed as they come, and written if there is a folder for them."""

    def __init__(self, console: Console, device: str, folder: Path | None = None) -> None:
        super().__init__(machine.describe(device), device)
        self._console = console
        self._folder = folder
        console.print(", ".join(f"{key} {value}" for key, value in self.machine.items()))

    def show(self, table: Table) -> None:
        self.tables.append(table)
        self._console.print(table.rich())
        if self._folder:
            results.write(self, self._folder)

    def say(self, text: str) -> None:
        self._console.print(text)

    def finish(self) -> None:
        """Draws the curves, and writes it all with the picture."""
        if self._folder is None:
            return
        if self.curves:
            try:
                results.draw_curves(self, self._folder)
                self.say(f"wrote {self.picture}")
            except ImportError as error:
                self.say(f"no picture: {error}")
        for path in results.write(self, self._folder):
            self.say(f"wrote {path.name}")


def measure_updates(shown: Shown, suites: str, shapes: str, contenders: str, rounds: int | None) -> None:
    device = torch.device(shown.device)
    for suite in chosen(SUITES, suites):
        everybody = suite.all_contenders(device)
        timed = [each for each in everybody if not contenders or each in chosen(everybody, contenders)]
        for shape in chosen(SHAPES, shapes):
            if shape.name not in suite.shapes or (device.type == "cpu" and shape.on_gpu_only):
                continue
            try:
                measurement = update.measure(suite, shape, device=device, rounds=rounds, contenders=timed)
            except (ImportError, torch.OutOfMemoryError) as error:
                shown.say(f"{suite.title}, {shape.title}: left out ({type(error).__name__}: {error})")
                continue
            shown.measurements.append(measurement)
            shown.verdicts = [*verdicts(shown.measurements), *many_verdicts(shown)]
            shown.show(tables.update_table(measurement))
    if device.type == "cuda":
        shown.verdicts.append(one_launch())


def one_launch() -> Verdict:
    count = launches.count()
    return Verdict("launches of one update", FLOAT32.name, "1000 tensors of 32x32", "<= 1", count, count <= 1, "")


def devices() -> list[str]:
    """A GPU first, because it may be at hand for a short time."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def main(
    suites: Annotated[str, typer.Option(help="Parts of names, as in: float32,compensated.")] = "",
    shapes: Annotated[
        str, typer.Option(help="Some of: small, resnet50, vit, gpt2, convnext, bert, llama-1b, llama-7b.")
    ] = "",
    contenders: Annotated[str, typer.Option(help="Parts of names, as in: polyak,flat.")] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="For every shape, instead of its own number.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: the GPU if there is one, then the CPU.")] = "",
    curves: Annotated[bool, typer.Option(help="How time grows with parameters and with tensors.")] = True,
    small: Annotated[bool, typer.Option(help="Many small tensors: cold updates, swaps and more, a minute.")] = True,
    errors: Annotated[bool, typer.Option(help="The errors against float64, which take a minute.")] = True,
    error_steps: Annotated[int, typer.Option(min=1, help="Of the training run; the noisy one is 10 times that.")] = (
        error.STEPS
    ),
    imports: Annotated[int, typer.Option(min=0, help="Fresh processes for each import.")] = 5,
    write: Annotated[bool, typer.Option(help="Also write it all to benchmarks/results/.")] = False,
) -> None:
    if write and (suites or shapes or contenders):
        raise typer.BadParameter("--write is for whole runs; leave --suites, --shapes and --contenders out")
    console = Console(width=WIDTH)
    for where in [device] if device else devices():
        shown = Shown(console, where, FOLDER if write else None)
        if where == "cpu" and small:
            measure_many(shown)
        measure_updates(shown, suites, shapes, contenders, rounds)
        shown.account = account.measure(device=where)
        shown.show(tables.account_table(shown.account))
        if curves:
            shown.curves += scaling.curves(where)
            for curve in shown.curves:
                shown.show(tables.curve_table(curve))
        if where == "cpu":
            measure_the_rest(shown, errors=errors, steps=error_steps, imports=imports)
        if shown.verdicts:
            shown.show(tables.verdict_table(shown.verdicts))
            if any(each.suite is FLOAT32 for each in shown.measurements):
                shown.show(tables.short_table(map(results.as_record, shown.measurements)))
        shown.finish()


def measure_many(shown: Shown) -> None:
    """Many small tensors on a CPU."""
    shown.many = many.measure_apart()
    for table in shown.many.tables():
        shown.show(table)
    shown.verdicts = many_verdicts(shown)


def many_verdicts(shown: Shown) -> list[Verdict]:
    return list(many.verdicts(shown.many)) if shown.many else []


def measure_the_rest(shown: Shown, *, errors: bool, steps: int, imports: int) -> None:
    """What does not depend on a device."""
    if errors:
        for run in error.both_runs(steps):
            shown.errors.append(run)
            shown.show(tables.error_table(run))
        shown.error_verdicts += error_verdicts(shown.errors)
        shown.show(tables.error_verdict_table(shown.error_verdicts))
    if imports:
        shown.imported = import_time.measure(imports)
        shown.show(tables.import_table(shown.imported, imports))


if __name__ == "__main__":
    typer.run(main)
