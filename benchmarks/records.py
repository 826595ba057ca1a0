"""Records of runs as files: JSON to compare, markdown to read. Needs the standard library only."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import Table

FOLDER = Path(__file__).parent / "results"


def records(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """All records, by the stems of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def markdown(
    machine: Mapping[str, str],
    tables: Sequence[Table],
    picture: str | None = None,
    *,
    title: str = "What averages cost",
) -> str:
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    if picture:
        lines += [f"![one update's time by the number of parameters, and of tensors]({picture})", ""]
    return "\n".join((*lines, *(table.markdown() for table in tables)))


def write_files(stem: str, record: Mapping[str, Any], text: str, folder: Path = FOLDER) -> list[Path]:
    """JSON and markdown of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    for path, content in zip(paths, (json.dumps(record, indent=2) + "\n", text), strict=True):
        write_atomically(path, content)
    return paths


def write_atomically(path: Path, content: str) -> None:
    """Leaves the file as it was if the process is killed while it writes."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
