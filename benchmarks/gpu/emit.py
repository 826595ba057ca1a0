"""How a part reports results: lines of JSON among everything else that it prints. Needs the standard library only."""

import json
from typing import Any, TextIO

PREFIX = "@polyak "


def emit(file: TextIO | None = None, **found: Any) -> None:
    """Prints results and flushes, so that they are kept if the process is killed afterwards."""
    print(PREFIX + json.dumps(found), file=file, flush=True)


def emitted(line: str) -> dict[str, Any]:
    """The results in a line; empty for other lines, and for a line that was cut off when its process was killed."""
    _, _, text = line.partition(PREFIX)
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return {}
