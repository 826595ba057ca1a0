"""`polyak inspect FILE`: what is in a file, without a model and without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from polyak.files.containers import Verification
from polyak.files.inspection import Account, Distance, Other, ProfileAccount, WeightSet, plain
from polyak.files.inspection import inspect as account_of
from polyak.files.layouts import examine

from .text import Format, Names, SkipObjects, as_options, counted, inert, number, of_bytes, read_names, share

_WIDTH = 120
_MAX_ROWS = 40
_MAX_NAMES = 8
_RIGHT = ("tensors", "numbers", "bytes", "NaN", "infinite")


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A file of torch.save or safetensors, or a folder of Hugging Face's form or "
            "torch.distributed.checkpoint.",
            show_default=False,
        ),
    ],
    format: Format = None,
    names: Names = None,
    skip_objects: SkipObjects = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Verify all checksums. Exit with code 1 if anything is damaged."),
    ] = False,
) -> None:
    """What is in a file: its layout, its averages and weights, how they were made and how far they are apart.

    Without --verify a part of a large file is read, and distances are estimates.
    """
    given = read_names(names)
    found = examine(file, format=format, names=[] if given is None else [given], skip_objects=skip_objects)
    with _progress(wanted=verify) as progress:
        account = account_of(found, verify=verify, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(plain(account), indent=2, allow_nan=False) + "\n")
    else:
        console = Console(markup=False, highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = max(console.width, _WIDTH)
        show(account, console)
    if account.verification is not None and account.verification.problems:
        raise typer.Exit(1)


@contextmanager
def _progress(*, wanted: bool) -> Generator[Callable[[int, int], None] | None, None, None]:
    """A bar where people can see it; what is printed elsewhere stays as it is."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def show(account: Account, console: Console) -> None:
    """Prints an account."""
    about = f"{account.format}: {account.writer}, {of_bytes(account.num_bytes)}"
    console.print(Text.assemble((inert(account.path, limit=200), "bold"), "\n", about))
    heads = ("weights", "where", "tensors", "numbers", "bytes", "dtypes")
    console.print(_table(heads, [_set(each) for each in account.sets]))
    console.print(Padding(_facts(account), (0, 0, 1, 1), expand=False))
    if account.distances:
        _show_distances(account.distances, console)
    _show_nonfinite(account, console)
    if account.verification is not None:
        _show_verification(account.verification, console)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE)
    for head in heads:
        table.add_column(Text(head), justify="right" if head in _RIGHT else "left", overflow="fold")
    for row in rows[:_MAX_ROWS]:
        table.add_row(*map(Text, row))
    if len(rows) > _MAX_ROWS:
        table.add_row(f"and {len(rows) - _MAX_ROWS:,} more")
    return table


def _some(texts: Iterable[str], separator: str = ", ") -> str:
    """The first of them, joined."""
    given = list(texts)
    rest = len(given) - _MAX_NAMES
    return separator.join([*given[:_MAX_NAMES], *([f"and {rest:,} more"] if rest > 0 else [])])


def _set(given: WeightSet) -> tuple[str, ...]:
    tensors = f"{given.num_tensors:,}"
    if given.num_distinct != given.num_tensors:
        tensors += f" ({given.num_distinct:,} distinct)"
    return (
        inert(given.name),
        _some(map(inert, given.where or given.files), "\n"),
        tensors,
        f"{given.num_numbers:,}",
        of_bytes(given.num_bytes),
        ", ".join(f"{dtype} {count:,}" for dtype, count in given.dtypes.items()),
    )


def _facts(account: Account) -> Table:
    """What there is to say in a line each."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    lines = {
        "counters": ", ".join(f"{inert(name)} {number(value)}" for name, value in account.counters.items()),
        "decay": "" if account.decay is None else f"{account.decay!r}{_ages(account)}",
        "profile": _some((_profile(each, several=len(account.profiles) > 1) for each in account.profiles), "\n"),
        **{
            f"ties in {inert(each.name)}": _some((_some(map(inert, tie), " = ") for tie in each.ties), "\n")
            for each in account.sets
        },
        "missing": _some(map(inert, account.missing)),
        "notes": "\n".join(inert(as_options(note), limit=400) for note in account.notes),
        "also in it": _some(map(_other, account.others), "\n"),
        "metadata": _some(map(inert, account.metadata)),
    }
    for what, text in lines.items():
        if text:
            facts.add_row(Text(what), Text(text))
    return facts


def _profile(profile: ProfileAccount, *, several: bool) -> str:
    name = f"{inert(profile.average)}: " if several else ""
    return f"{name}{inert(profile.profile, limit=200)}{_ages(profile)}"


def _ages(of: Account | ProfileAccount) -> str:
    ages = [("half-life", of.half_life), ("mean age", of.mean_age)]
    return "".join(f", {what} {number(age)}" for what, age in ages if age is not None)


def _other(other: Other) -> str:
    held = f", {counted(other.num_tensors, 'tensor')}, {of_bytes(other.num_bytes)}" if other.num_tensors else ""
    return f"{inert(other.name)}: {inert(other.kind)}{held}"


def _show_distances(distances: Sequence[Distance], console: Console) -> None:
    """A row for each module, and a column for each of the first few averages."""
    averages = list(dict.fromkeys(distance.average for distance in distances))
    by_module: dict[str | None, dict[str, float]] = {}
    for distance in distances:
        by_module.setdefault(distance.module, {})[distance.average] = distance.relative
    wholes = [distance for distance in distances if distance.module is None]
    read, numbers = sum(each.num_read for each in wholes), sum(each.num_numbers for each in wholes)
    title = " norm(average - raw) / norm(raw)"
    if read != numbers:
        title += f", estimated from {share(read, numbers)} of the numbers"
    if len(averages) > _MAX_NAMES:
        title += f"; of the first {_MAX_NAMES} of {len(averages):,} averages"
    shown = averages[:_MAX_NAMES]
    rows = [
        (
            "all of it" if module is None else inert(module),
            *(number(found[average]) if average in found else "" for average in shown),
        )
        for module, found in by_module.items()
    ]
    console.print(Text(title))
    console.print(_table(("module", *map(inert, shown)), rows))


def _show_nonfinite(account: Account, console: Console) -> None:
    read = account.reading
    among = "" if read.is_exact else f", of the {share(read.num_read, read.num_numbers)} that were looked at"
    if not account.nonfinite:
        console.print(Text(f" every number is finite{among}"))
        return
    console.print(Text(f" numbers that are not finite{among}"))
    rows = [
        (inert(each.weights), inert(each.name), f"{each.num_nan:,}", f"{each.num_infinite:,}")
        for each in account.nonfinite
    ]
    console.print(_table(("weights", "tensor", "NaN", "infinite"), rows))


def _show_verification(verification: Verification, console: Console) -> None:
    compared = verification.num_fitting + len(verification.problems)
    fit = f" {verification.num_fitting:,} of {compared:,} checksums fit, {of_bytes(verification.num_bytes)}"
    fit = fit if compared else " there was no checksum to compare with"
    console.print(Text("\n".join([fit, *(f" {inert(note, limit=200)}" for note in verification.notes)])))
    if verification.problems:
        rows = [(inert(each.file), inert(each.record), inert(each.problem)) for each in verification.problems]
        console.print(Text(" damaged"))
        console.print(_table(("file", "record", "problem"), rows))
