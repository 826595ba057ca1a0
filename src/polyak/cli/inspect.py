"""`polyak inspect FILE`: what is in a file, without a model and without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from polyak.files.inspection import inspect as account_of
from polyak.files.inspection import plain
from polyak.files.layouts import examine

from .options import Format, Names, SkipObjects, read_names
from .show import show

_WIDTH = 120


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
