"""What the commands have in common: options, text from files made harmless for a terminal, numbers, and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

import typer

from polyak.errors import PolyakError
from polyak.files.layouts import Note

Format: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", help="The layout of the input; detected if omitted.")
]
Names: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Names of the averaged parameters in order, for layouts without names: a list in JSON, or one a line.",
    ),
]
SkipObjects: TypeAlias = Annotated[
    bool, typer.Option("--skip-objects", help="Skip objects of unknown classes; their code never runs.")
]
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")
_CUT = "..."


def read_names(path: Path | None) -> list[str] | None:
    """Names from a file, where one was given.

    Raises:
        typer.BadParameter: there are none in it.
    """
    if path is None:
        return None
    try:
        text = path.read_text("utf-8")
        given: Any = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(
            f"{path.name!r} holds neither a list in JSON nor lines of text", param_hint="--names"
        ) from error
    names = [name.strip() if isinstance(name, str) else name for name in cast("list[Any]", given)]
    names = [name for name in names if name != ""]
    if not names or not all(isinstance(name, str) for name in names):
        raise typer.BadParameter(f"{path.name!r} holds no names, or something else than names", param_hint="--names")
    return names


# How to give what is needed, if "give --option" does not say it.
_ADVICE: Mapping[tuple[str, ...], str] = {
    ("average",): "choose one by --average",
    ("decay",): "give --decay for another",
    ("format",): "choose one by --format",
    ("model",): "give its model to polyak.convert()",
    ("model", "names"): "give --names in the order of model.parameters()",
    ("skip_objects", "run_pickled_code"): "--skip-objects reads the tensors and plain values around it, and nothing "
    "runs; polyak.read(..., run_pickled_code=True) runs the code, if you trust whoever wrote the file",
}


def inert(text: str, *, limit: int = 80) -> str:
    r"""Text without characters that a terminal obeys or does not show, and with its middle left out if it is long.

    Example:
        >>> inert("\x1b[31mred"), inert("a" * 50 + "b" * 50, limit=11)
        ('\\x1b[31mred', 'aaaa...bbbb')
    """
    if len(text) > limit:
        half = (limit - len(_CUT)) // 2
        text = f"{text[:half]}{_CUT}{text[-half:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def as_options(said: Exception | Note) -> str:
    """What the library says, with its arguments under the names that they have on the command line.

    Example:
        >>> as_options(PolyakError("it could be of two formats", needs=("format",)))
        'it could be of two formats; choose one by --format'
        >>> as_options(PolyakError("'x' is unknown", argument="format"))
        "--format 'x' is unknown"
    """
    if not isinstance(said, (PolyakError, Note)):
        return str(said)
    argument = said.argument if isinstance(said, PolyakError) else None
    text = said.text if argument is None else f"{_option(argument)} {said.text}"
    advice = _ADVICE.get(said.needs, f"give {' or '.join(map(_option, said.needs))}")
    return f"{text}; {advice}" if said.needs else text


def _option(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def counted(count: int, what: str) -> str:
    """A count of things.

    Example:
        >>> counted(1, "tensor"), counted(1000, "tensor")
        ('1 tensor', '1,000 tensors')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def of_bytes(count: int) -> str:
    """Bytes in the unit in which there are less than a thousand.

    Example:
        >>> of_bytes(999), of_bytes(1_234_567)
        ('999 bytes', '1.23 MB')
    """
    size, unit = float(count), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{count} bytes" if unit == 0 else f"{size:.3g} {_UNITS[unit]}"


def share(part: int, whole: int) -> str:
    """A share in percent.

    Example:
        >>> share(1, 3), share(1, 1_000_000)
        ('33.3 %', '0.0001 %')
    """
    return f"{100 * part / whole:.3g} %" if whole else "0 %"


def number(value: float) -> str:
    """A number, or what it is instead.

    Example:
        >>> number(0.01234567), number(math.nan)
        ('0.01235', 'not finite')
    """
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "infinite" if math.isinf(value) else "not finite"
    return str(value)
