"""Options that several commands have, and names of parameters from a file that the user wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

import typer

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
