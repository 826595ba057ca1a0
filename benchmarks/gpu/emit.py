"""How a part says what it has found: a line of JSON among whatever else it prints. Needs Python's own library only."""

import json
from typing import Any, TextIO

PREFIX = "@polyak "


def emit(file: TextIO | None = None, **found: Any) -> None:
    """Says it at once, so that it is not lost if the part is ended afterwards."""
    print(PREFIX + json.dumps(found), file=file, flush=True)


def emitted(line: str) -> dict[str, Any]:
    """What a line says; nothing if it is another line, or was cut off because its process was ended."""
    _, _, said = line.partition(PREFIX)
    try:
        return json.loads(said) if said else {}
    except ValueError:
        return {}
