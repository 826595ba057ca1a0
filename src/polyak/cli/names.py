"""Names of parameters, from a file that the user wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import typer


def read_names(path: Path) -> list[str]:
    """Names from a file.

    Raises:
        typer.BadParameter: there are none in it.
    """
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
