"""The commands, and how the program ends, whatever happens."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from .convert import convert
from .inspect import inspect
from .text import as_options, inert

_MAX_ERROR = 2000
# As a shell says of a program that was ended because nobody reads it any more.
_CLOSED = 141

app = typer.Typer(
    name="polyak",
    help="Averages of the weights of PyTorch models, in files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(inspect)
app.command()(convert)


def _show_version(wanted: bool) -> None:
    if wanted:
        # Packages do not import the package itself, which knows what a checkout that is not installed is called.
        typer.echo(sys.modules["polyak"].__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Runs the command line. Errors that a user can do something about are one line; the exit code is then 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character is shown its number.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code: str | int | None = 0
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except BrokenPipeError:
        # Whoever read it has enough. What is left must not be written when Python ends, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _CLOSED
    except OSError as error:
        what = error.strerror if error.strerror else str(error)
        code = _fail(f"{os.fspath(error.filename)!r}: {what}" if error.filename else what)
    # Of an argument, or of a number that is too large for a dtype.
    except ValueError as error:
        code = _fail(as_options(error))
    sys.exit(code)


def _fail(what: str) -> int:
    sys.stderr.write(f"polyak: {inert(what, limit=_MAX_ERROR)}\n")
    return 2
